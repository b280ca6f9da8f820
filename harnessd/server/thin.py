"""Leaves out statuses of a job that says more than is kept: first, last and evenly between stay.

A bucket of credit fills at the allowed rate up to one second's worth. Time is the lines' own, so the same lines are
thinned alike at any pace of reading. Only statuses are left out, and never the last one of those read together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harnessd.server.tape import Line

GAP_SECONDS = 10  # one gap is told of in so much time


@dataclass(frozen=True, slots=True)
class Pace:
    """What is carried from one read to the next: the credit, and the gap that is not yet told of."""

    run: int
    credit: float | None = None  # None: full
    at_us: int = 0  # of the last status
    missing: int = 0
    first_seq: int = 0
    last_seq: int = 0
    since_us: int = 0


@dataclass(frozen=True, slots=True)
class Thinned:
    lines: list[Line]  # what stays, with a line of kind `gap` when one is due
    dropped: int
    pace: Pace


def thin(lines: Sequence[Line], max_rate: float, pace: Pace, final: bool = False) -> Thinned:
    """Return what is kept of the lines at `max_rate` statuses a second; `final` tells of a gap at once."""
    statuses = [line for line in lines if line.kind == "status"]
    stays, dropped = list(lines), list[Line]()
    if statuses:
        credit = _credit(statuses, max_rate, pace)
        if len(statuses) > credit:
            kept = _spread(len(statuses), int(credit))
            dropped = [line for index, line in enumerate(statuses) if index not in kept]
            out = set(map(id, dropped))
            stays = [line for line in lines if id(line) not in out]
        left = max(0.0, credit - len(statuses) + len(dropped))
        pace = replace(pace, credit=min(max_rate, left), at_us=statuses[-1].at_us)
    if dropped:
        pace = _missed(pace, dropped)
    if pace.missing and (final or not dropped or pace.at_us - pace.since_us >= GAP_SECONDS * 1_000_000):
        stays.append(_gap(pace))
        pace = replace(pace, missing=0)
    return Thinned(stays, len(dropped), pace)


def _credit(statuses: Sequence[Line], max_rate: float, pace: Pace) -> float:
    if math.isinf(max_rate):
        return max_rate
    first_us, last_us = statuses[0].at_us, statuses[-1].at_us
    saved = max_rate if pace.credit is None else pace.credit + max_rate * _seconds(pace.at_us, first_us)
    return min(max_rate, saved) + max_rate * _seconds(first_us, last_us)


def _seconds(since_us: int, until_us: int) -> float:
    return max(0, until_us - since_us) / 1e6


def _spread(count: int, room: int) -> set[int]:
    if room < 2:
        return {count - 1}
    return {round(number * (count - 1) / (room - 1)) for number in range(room)}


def _missed(pace: Pace, dropped: Sequence[Line]) -> Pace:
    if pace.missing:
        return replace(pace, missing=pace.missing + len(dropped), last_seq=dropped[-1].seq)
    first = dropped[0]
    return replace(pace, missing=len(dropped), first_seq=first.seq, last_seq=dropped[-1].seq, since_us=first.at_us)


def _gap(pace: Pace) -> Line:
    data = {"count": pace.missing, "first_seq": pace.first_seq, "last_seq": pace.last_seq}
    return Line(pace.run, pace.last_seq, pace.at_us, "gap", json.dumps(data))
