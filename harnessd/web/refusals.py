"""Records whom the guard has refused, a few a second at the most: whoever asks too often must not fill the history."""

from __future__ import annotations

import time
from collections.abc import Callable

from harnessd.errors import Refused
from harnessd.server.records import Event, Record

A_SECOND = 5


class Refusals:
    """The guard tells it of each refusal."""

    def __init__(self, record: Callable[[Record], None]) -> None:
        self._record = record
        self._second = 0
        self._in_it = 0
        self._left_out = 0

    def __call__(self, peer: str, path: str, error: Refused) -> None:
        now_ns = time.time_ns()
        if now_ns // 10**9 != self._second:
            self._second, self._in_it = now_ns // 10**9, 0
        self._in_it += 1
        if self._in_it > A_SECOND:
            self._left_out += 1
            return
        data = {"path": path[:200], "kind": error.kind, "why": str(error)[:300], "left_out": self._left_out}
        self._left_out = 0
        self._record(Event("refused", now_ns // 1000, actor=peer[:100] or None, data=data))
