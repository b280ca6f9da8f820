"""Errors as RFC 9457 problem details.

`type` is always `about:blank`: the member `kind` (a slug such as `wrong-state`) is what a program tests for, so there
are no type URIs to keep alive. `title` is RFC 9110's phrase for the status, whatever phrase this Python knows it by.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from harnessd import errors
from harnessd.errors import NoSuchRoute, Refused

MEDIA_TYPE = "application/problem+json"

STATUS: dict[type[Refused], int] = {
    Refused: 400,
    errors.BadRequest: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NoSuchJob: 404,
    errors.NoSuchRun: 404,
    errors.NoSuchRoute: 404,
    errors.WrongState: 409,
    errors.AmbiguousJob: 409,
    errors.MailboxClosed: 409,
    errors.NotPython: 409,
    errors.TooLarge: 413,
    errors.BadData: 422,
    errors.MailboxFull: 429,
    errors.Unavailable: 503,
    errors.NotRead: 504,
}
HEADERS: dict[int, dict[str, str]] = {
    401: {"www-authenticate": "Bearer"},
    413: {"connection": "close"},  # the rest of the body is not read
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
}
# What no class of error stands for.
_OTHER_KINDS = {400: "client-gone", 500: "internal-error"}
_BY_HTTP = (405, 408, 414, 429, 431)
# HTTPStatus has other phrases for these in Python 3.11 and 3.12 than in 3.13.
TITLES = {413: "Content Too Large", 414: "URI Too Long", 422: "Unprocessable Content"}
SHOWN_PATH_CHARS = 120

logger = logging.getLogger(__name__)


def status_of(error: Refused) -> int:
    """The HTTP status of a refusal: its class's, or the nearest base class's."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def kinds() -> dict[int, list[str]]:
    """Every kind of problem that a request can be answered with, by its status."""
    found = [(status, cls.kind) for cls, status in STATUS.items() if cls is not Refused]
    found += [*_OTHER_KINDS.items(), *((status, _slug(title(status))) for status in _BY_HTTP)]
    by_status: dict[int, list[str]] = {}
    for status, kind in sorted(found):
        by_status.setdefault(status, []).append(kind)
    return by_status


def problem(error: Refused) -> Response:
    """The answer to a request that was refused."""
    more = {"job": error.job, "state": error.state}
    return _response(status_of(error), error.kind, str(error), more)


def response_for(exc: Exception, *, path: str = "", routes: Sequence[str] = ()) -> Response:
    """The answer to whatever a handler raised: a refusal, Starlette's HTTPException, or a defect (500, logged here).

    `routes` are the templates (`/jobs/{name}/hb`) among which a 404 looks for what `path` may have meant.
    """
    if isinstance(exc, Refused):
        return problem(exc)
    if isinstance(exc, HTTPException):
        return _http_response(exc, path, routes)
    if isinstance(exc, ClientDisconnect):  # nobody is left to read this, and nothing here is broken
        return _response(400, _OTHER_KINDS[400], "the client went away before its request was complete")
    logger.error("cannot answer %r: unexpected %s", path[:SHOWN_PATH_CHARS], type(exc).__name__, exc_info=exc)
    return _response(500, _OTHER_KINDS[500], "cannot answer: an error inside harnessd, whose log has the traceback")


def nearest(path: str, routes: Sequence[str]) -> list[str]:
    """At most three of the routes that look most like the path, with its own names in place of `{name}`."""
    parts = path.split("/")
    filled = ("/".join(_fill(route.split("/"), parts)) for route in routes)
    return get_close_matches(path, list(dict.fromkeys(filled)), n=3, cutoff=0.7)


def _fill(template: list[str], parts: list[str]) -> list[str]:
    padded = parts + template[len(parts) :]
    return [mine if slot.startswith("{") else slot for slot, mine in zip(template, padded, strict=False)]


def _http_response(exc: HTTPException, path: str, routes: Sequence[str]) -> Response:
    shown = path[:SHOWN_PATH_CHARS]
    if exc.status_code == 404:
        close = nearest(shown, routes)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        return problem(NoSuchRoute(f"cannot serve {shown or 'this path'}: no such route{hint}"))
    headers = {name.lower(): value for name, value in (exc.headers or {}).items()}
    detail = exc.detail
    if exc.status_code == 405:
        detail = f"cannot use this method on {shown or 'this path'}: allowed are {headers.get('allow', 'others')}"
    return _response(exc.status_code, _slug(title(exc.status_code)), detail, headers=headers)


def title(status: int) -> str:
    """The status in words."""
    return TITLES.get(status) or HTTPStatus(status).phrase


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _response(
    status: int,
    kind: str,
    detail: str,
    more: Mapping[str, str | None] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    body: dict[str, object] = {"type": "about:blank", "title": title(status), "status": status}
    body |= {"detail": detail, "kind": kind}
    body |= {key: value for key, value in (more or {}).items() if value is not None}
    sent = {**HEADERS.get(status, {}), **(headers or {})}
    return Response(json.dumps(body) + "\n", status, sent, MEDIA_TYPE)
