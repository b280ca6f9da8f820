"""The routes of history: statuses, runs, events and samples, of one job or of all; and the status as of a moment."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

from starlette.responses import Response, StreamingResponse

from harnessd.errors import BadRequest, NoSuchJob, WrongState
from harnessd.server import asked, bodies
from harnessd.server.asked import Asked, What
from harnessd.server.rows import Page
from harnessd.server.shapes import Status
from harnessd.server.timespan import moment_us
from harnessd.web import formats
from harnessd.web.call import ALL, Call, answer
from harnessd.web.follow import EventStream, Follower, stored

if TYPE_CHECKING:
    from harnessd.server.history import History  # loads SQL, which a script does without

FOLLOWING = ("follow", "kind", "cursor", "job")


async def history(call: Call) -> Response:
    return await _rows(call, "history", await _job_or_all(call))


async def runs(call: Call) -> Response:
    return await _rows(call, "runs", await _job(call))


async def events(call: Call) -> Response:
    job = await _job_or_all(call)
    _id(call.header("last-event-id"))
    return await _follow(call, job) if _follows(call) else await _rows(call, "events", job)


async def metrics(call: Call) -> Response:
    return await _rows(call, "metrics", await _job(call))


async def status_at(call: Call, when: str) -> Response:
    """The last status that was not later than the moment."""
    at_us = moment_us(when, _now_us(), "at")
    name = await _job(call)
    row = await _history(call).status_at(name, at_us)
    entry = call.entry if any(entry.name == name for entry in call.entries()) else None
    line = entry.last_status if entry else None
    if entry and line and line.at_us <= at_us and (row is None or (line.run, line.seq) > (row[2], row[3])):
        return answer(bodies.status(entry))  # it is not stored yet
    at, _, run, seq, text = row or (None, name, None, None, "null")
    body: Status = {"job": name, "run": run, "seq": seq, "at": at, "status": json.loads(text)}
    return answer(body)


OVER_ALL = frozenset((history, events))  # with `all` for a name these answer once, with the rows of all jobs


# which job


async def _job(call: Call) -> str:
    """Return the name of the job, which may be one that was removed and has left its history."""
    name = call.scope["path_params"].get("name")
    if name is None or name == ALL:
        _history(call)
        return call.entry.name
    return await _known(call, name)


async def _job_or_all(call: Call) -> str | None:
    """Return the name of the job, None for all of them."""
    name = call.scope["path_params"].get("name", ALL)
    asked_for = call.parameter("job")
    if name != ALL and asked_for is not None:
        raise BadRequest("cannot use job: the path names one already")
    name = name if asked_for is None else asked_for
    if name == ALL:
        _history(call)
        return None
    return await _known(call, name)


async def _known(call: Call, name: str) -> str:
    call.check_seen(name)
    try:
        call.find(name)
    except NoSuchJob:
        kept = call.context.history
        if kept is None or not await kept.has_job(name):
            raise
    _history(call)
    return name


def _history(call: Call) -> History:
    if call.context.history is None:
        raise WrongState("cannot show history: a script keeps no history unless state_dir is set")
    return call.context.history


# rows


async def _rows(call: Call, what: What, job: str | None) -> Response:
    shape = formats.chosen(call.parameter("format"), call.header("accept") or "")
    given = [(name, value) for name, value in call.query if name not in _taken(call, what)]
    wanted = asked.parse(what, job, given, _now_us(), all_rows=shape != "json")
    wanted = replace(wanted, among=call.visitor.jobs if job is None else None)
    if shape != "json" and what in ("runs", "metrics") and call.scope["path_params"].get("name") == ALL:
        raise BadRequest(f"cannot answer in {shape} for each of all jobs: ask for one, or for JSON")
    kept = _history(call)
    page = await kept.page(wanted)
    if shape == "json":
        return Response(formats.json_page(wanted, page), media_type=formats.MEDIA_TYPES[shape])
    if call.scope["method"] == "HEAD":
        return Response(media_type=formats.MEDIA_TYPES[shape])
    return StreamingResponse(_lines(kept, shape, wanted, page), media_type=formats.MEDIA_TYPES[shape])


def _taken(call: Call, what: What) -> tuple[str, ...]:
    each = what in ("runs", "metrics") and call.scope["path_params"].get("name") == ALL
    if each:
        return ("tag", "state")
    return ("job", "follow") if what == "events" else ("job",) if what == "history" else ()


async def _lines(kept: History, shape: formats.Format, wanted: Asked, page: Page) -> AsyncIterator[bytes]:
    """Yield the rows a page at a time, each read when the client has taken the one before it."""
    left = wanted.limit
    first = True
    while True:
        yield formats.lines(shape, wanted, page.rows, first=first)
        first = False
        left = None if left is None else left - len(page.rows)
        if page.next is None or left == 0:
            return
        wanted = replace(wanted.behind(page.next), limit=left)
        page = await kept.page(wanted)


# following


def _follows(call: Call) -> bool:
    follow = call.switch("follow")
    if follow is None:
        follow = "text/event-stream" in (call.header("accept") or "").lower()
    return follow and call.scope["method"] == "GET"


async def _follow(call: Call, job: str | None) -> Response:
    values = asked.single(call.query, FOLLOWING, "a stream of events")
    followers = call.context.followers
    if followers is None:
        raise WrongState("cannot follow: a script keeps no history unless state_dir is set")
    followers.check_room()
    after = call.header("last-event-id") or values.get("cursor")
    follower = Follower(job, asked.kinds(values.get("kind")), _id(after), call.actor, call.visitor.sees)
    page = await stored(followers.history, follower)
    return EventStream(followers, follower, page, call.context.stopping)


def _id(text: str | None) -> int | None:
    if text is None:
        return None
    if not asked.is_number(text, asked.MOST_NUMBER):
        raise BadRequest(f"cannot follow from {text[:60]!r}: it takes the id of an event")
    return int(text)


def _now_us() -> int:
    return time.time_ns() // 1000
