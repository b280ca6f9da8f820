"""Moments and lengths of time as people type them, in whole microseconds."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from functools import lru_cache

from harnessd.errors import BadRequest

LATEST_US = 253_402_300_800_000_000  # the year 10000: no ISO time goes further

_UNIT_US = {"ms": 10**3, "s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86_400 * 10**6, "w": 7 * 86_400 * 10**6}
SPAN = r"[0-9]{1,12}(?:\.[0-9]{1,3})?(?:ms|s|m|h|d|w)"
EPOCH = r"[0-9]{1,11}(?:\.[0-9]{1,9})?"
_SPAN = re.compile(f"(?={SPAN}$)([0-9.]+)([a-z]+)")
_EPOCH = re.compile(EPOCH)
_LOST_PLUS = re.compile(r"([T ][0-9:.]+) ([0-9]{2}:?[0-9]{2})")  # `+01:00` in a query whose + was not escaped
_EPOCH_START = datetime(1970, 1, 1, tzinfo=UTC)


def moment_us(text: str, now_us: int, name: str) -> int:
    """Return the moment that the text names, in microseconds since the epoch.

    It is `now`, relative to now (`-15m`, `-7d`; units ms s m h d w), ISO 8601 (UTC unless it has an offset), or seconds
    since the epoch. What is before the epoch is the epoch. Raise BadRequest, naming the parameter.
    """
    if text == "now":
        return now_us
    if text.startswith("-") and (length := _span_us(text[1:])) is not None:
        return max(0, now_us - length)
    found = _epoch_us(text) if _EPOCH.fullmatch(text) else _iso_us(_LOST_PLUS.sub(r"\1+\2", text))
    if found is None:
        wanted = "it takes an ISO time (2026-01-31T08:00:00Z), seconds since the epoch, or a time ago (-15m, -7d)"
        hint = f"; did you mean '-{text[:60]}'?" if _span_us(text) is not None else ""
        raise BadRequest(f"cannot use {name}={text[:60]!r}: {wanted}{hint}")
    return min(max(0, found), LATEST_US - 1)


def span_us(text: str, name: str) -> int:
    """Return the length of `60s`, `1.5h` or `500ms` in microseconds. Raise BadRequest, naming the parameter."""
    length = _span_us(text)
    if not length:
        raise BadRequest(f"cannot use {name}={text[:60]!r}: it takes a length of time, as in 500ms, 60s, 15m, 2h or 7d")
    return length


def iso(at_us: int) -> str:
    """Return the moment in ISO 8601, UTC, with microseconds."""
    seconds, part = divmod(at_us, 1_000_000)
    return f"{_to_the_second(seconds)}.{part:06d}Z"


@lru_cache(maxsize=1024)
def _to_the_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _span_us(text: str) -> int | None:
    found = _SPAN.fullmatch(text)
    return min(round(float(found[1]) * _UNIT_US[found[2]]), LATEST_US) if found else None


def _epoch_us(text: str) -> int:
    whole, _, part = text.partition(".")
    return int(whole) * 1_000_000 + int(part[:6].ljust(6, "0"))


def _iso_us(text: str) -> int | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    past = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH_START
    return (past.days * 86_400 + past.seconds) * 1_000_000 + past.microseconds
