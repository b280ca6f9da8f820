"""What a request carries: the data of a command, a time to wait, a body within its limit.

A command's data is JSON, or a Python literal because people type `curl -d "{'target_vol':4.2}"`. Nested brackets and
long chains of operators can make `ast.literal_eval` use up the interpreter's stack, so a literal is first walked token
by token: only the tokens of plain data, in an order that no expression has, and at most MAX_DEPTH brackets deep.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from harnessd.errors import BadRequest, TooLarge

MAX_DEPTH = 64
MAX_LITERAL_CHARS = 16 * 1024  # typed by hand; walking this many takes some 40 ms
MAX_INT_BITS = 2048  # under the 640 digits that every Python prints, however it is set up

_ESCAPE = r"""\\(?:[\\'"abfnrtv]|0(?![0-7])|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})"""
_TOKEN = re.compile(
    rf"""[ \t\r\n]*(?:
        (?P<open>[\[({{])
      | (?P<close>[\])}}])
      | (?P<mark>[,:])
      | (?P<value>
            '(?:[^'\\\r\n]|{_ESCAPE})*' (?!')
          | "(?:[^"\\\r\n]|{_ESCAPE})*" (?!")
          | [+-]?(?:0[xX][0-9a-fA-F]+ | (?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?) (?![\w.])
          | (?:True|False|None)(?!\w)
        )
      | (?P<end>\Z)
    )""",
    re.VERBOSE,
)
# Lengths of time from 0 to an hour: for each unit its seconds, the whole numbers under an hour, and the hour.
_UNITS = (
    ("ms", 0.001, "[0-9]{1,6}|[12][0-9]{6}|3[0-5][0-9]{5}", "3600000"),
    ("s?", 1.0, "[0-9]{1,3}|[12][0-9]{3}|3[0-5][0-9]{2}", "3600"),
    ("m", 60.0, "[0-5]?[0-9]", "60"),
    ("h", 3600.0, "0", "1"),
)
_PART = r"\.[0-9]{1,9}"
DURATION = "|".join(
    rf"(?:(?:{under})(?:{_PART})?|{_PART}|{hour}(?:\.0{{1,9}})?){unit}" for unit, _, under, hour in _UNITS
)
_DURATION = re.compile(f"(?=(?:{DURATION})$)([0-9.]+)([a-z]*)")
_UNIT_S = {unit.strip("?"): seconds for unit, seconds, _, _ in _UNITS} | {"": 1.0}

# Where a value lies: (where its container lies, its key or index) or None at the top; spelt out only for an error.
_Where = tuple[Any, str | int] | None


class _NotFinite(ValueError):
    """NaN, Infinity or -Infinity where JSON has a number."""


def command_data(body: bytes, query: Sequence[tuple[str, str]], reserved: frozenset[str]) -> Any:
    """The data of a command, as JSON holds it: from the body or from the parameters that are not reserved; else None.

    Raises BadRequest for a body that is neither JSON nor a Python literal, for what JSON cannot hold, and for data in
    both places.
    """
    given = [(name, value) for name, value in query if name not in reserved]
    if not body.strip():
        return _from_query(given) if given else None
    if given:
        raise BadRequest(f"cannot take data from both the body and the query: drop the body or ?{given[0][0][:60]}=")
    return _plain(_parse(_text(body)), None, MAX_DEPTH)


def duration(text: str, name: str) -> float:
    """Seconds in `5`, `0.5`, `5s`, `500ms`, `2m` or `1h`, from 0 to 3600. Raises BadRequest, naming the parameter."""
    found = _DURATION.fullmatch(text)
    if found is None:
        wanted = "seconds, as in 5, 0.5, 500ms or 2m, from 0 to 3600"
        raise BadRequest(f"cannot use {name}={text[:60]!r}: it takes {wanted}")
    return float(found[1]) * _UNIT_S[found[2]]


async def read_body(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    """The request's whole body. Raises TooLarge without reading further once it is known to pass the limit."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value[:20]) > limit_bytes:
            raise _too_large(limit_bytes)
    chunks: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size_bytes += len(chunk)
        if size_bytes > limit_bytes:
            raise _too_large(limit_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(f"cannot take this body: the limit is {limit_bytes} bytes")


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadRequest(f"cannot read the body: byte {error.start} is not UTF-8") from None


def _from_query(given: list[tuple[str, str]]) -> dict[str, Any]:
    data: dict[str, list[Any]] = {}
    for name, value in given:
        data.setdefault(name, []).append(_query_value(value))
    return {
        _plain(name, None, 0): _plain(values if len(values) > 1 else values[0], (None, name), MAX_DEPTH)
        for name, values in data.items()
    }


def _query_value(text: str) -> Any:
    try:
        return _json(text)
    except ValueError:  # no JSON, so it is the text that it is
        return text


def _parse(text: str) -> Any:
    try:
        return _json(text)
    except _NotFinite as error:
        raise BadRequest(f"cannot read the body: JSON has no {error}") from None
    except json.JSONDecodeError as error:
        why = f"{error.msg} at {_place(text, error.pos)}"
    except ValueError:  # Python's limit of digits, before ours is reached
        raise BadRequest("cannot read the body: an integer with too many digits") from None
    try:
        return _literal(text)
    except BadRequest as error:
        raise BadRequest(f"cannot read the body: not JSON ({why}) and no Python literal ({error})") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise BadRequest(f"cannot read the data: nested deeper than {MAX_DEPTH}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise _NotFinite(name)


def _literal(text: str) -> Any:
    if len(text) > MAX_LITERAL_CHARS:
        raise BadRequest(f"longer than {MAX_LITERAL_CHARS} characters")
    _walk(text)
    try:
        return ast.literal_eval(text)
    except SyntaxError as error:
        raise BadRequest(f"{error.msg} at line {error.lineno}, column {error.offset}") from None
    except TypeError as error:  # a list as a key
        raise BadRequest(str(error)) from None
    except (ValueError, RecursionError, MemoryError):
        raise BadRequest("an expression, not plain data") from None


def _walk(text: str) -> None:
    """Raises BadRequest unless the text is made of a literal's tokens, values parted by marks, and not too deep."""
    position, depth, after_value = 0, 0, False
    while True:
        token = _TOKEN.match(text, position)
        kind = token.lastgroup if token else None
        if token is None or (after_value and kind in ("open", "value")):
            start = len(text) - len(text[position:].lstrip())
            raise BadRequest(f"unexpected {text[start : start + 12]!r} at {_place(text, start)}")
        if kind == "end":
            return
        depth += (kind == "open") - (kind == "close")
        if depth > MAX_DEPTH:
            raise BadRequest(f"nested deeper than {MAX_DEPTH} at {_place(text, token.end() - 1)}")
        after_value = kind in ("close", "value")
        position = token.end()


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"


def _plain(value: Any, where: _Where, room: int) -> Any:
    """The value in JSON's own types, at most `room` containers deep. Raises BadRequest for what JSON cannot hold."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _plain_text(value, where)
    if isinstance(value, int):
        if value.bit_length() > MAX_INT_BITS:
            raise _unfit("an integer with too many digits", where)
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _unfit("a number past the range of a double", where)
        return value
    if not isinstance(value, (list, tuple, dict)):
        raise _unfit(f"a value of type {type(value).__name__}, which JSON cannot hold", where)
    if room == 0:
        raise BadRequest(f"cannot use the data: nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        return _plain_dict(value, where, room - 1)
    return [_plain(item, (where, index), room - 1) for index, item in enumerate(value)]


def _plain_dict(value: dict[Any, Any], where: _Where, room: int) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, item in value.items():
        name = _plain_key(key, where)
        if name in plain:
            raise _unfit(f"two keys that are both {name[:60]!r} in JSON", where)
        plain[name] = _plain(item, (where, name), room)
    return plain


def _plain_key(key: Any, where: _Where) -> str:
    if isinstance(key, str):
        return _plain_text(key, where)
    if key is None or isinstance(key, (bool, int, float)):
        return json.dumps(_plain(key, where, 0))
    raise _unfit(f"a key of type {type(key).__name__}, which JSON cannot hold", where)


def _plain_text(text: str, where: _Where) -> str:
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise _unfit("half of a surrogate pair, which is no character", where)
    return text


def _unfit(what: str, where: _Where) -> BadRequest:
    path = ""
    while where is not None:
        where, step = where
        path = f"[{step}]{path}" if isinstance(step, int) else f".{step}{path}"
    return BadRequest(f"cannot use the data: {'$' + path[:200] if path else 'it'} has {what}")
