"""The queue of one receiver: what it is to be told, in order, until it has taken it or that is given up.

The queue is in memory and in the database at once: a notice is stored with what caused it, and is stored as done when
it is. A server that begins finds in the database what the one before it did not bring.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import islice, takewhile
from typing import Any

from sqlalchemy import Connection, select

from harnessd.server import schema
from harnessd.server.courier import Courier, Undelivered
from harnessd.server.records import Event, EventKind, Notice, NoticesDone, Record
from harnessd.server.shapes import ReceiverHealth

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 300.0
TRIES = 5  # of a message that the receiver refuses
MOST_WAITING = 10_000
MOST_AGE_S = 7 * 86_400.0
_A_MESSAGE = 50  # notices
_log = logging.getLogger(__name__)


def load(connection: Connection) -> list[Notice]:
    """Return what is in the outbox, the oldest first."""
    return [Notice(**row) for row in connection.execute(select(schema.outbox).order_by(schema.outbox.c.id)).mappings()]


class Outbox:
    """Brings one receiver its notices. `write` makes a message of the bodies, `record` takes what became of them."""

    def __init__(
        self,
        receiver: str,
        courier: Courier,
        window_s: float,
        write: Callable[[Sequence[dict[str, Any]]], Awaitable[bytes]],
        record: Callable[[Record], None],
    ) -> None:
        self.receiver = receiver
        self._courier = courier
        self._window_s = window_s
        self._write = write
        self._record = record
        self._queue: deque[Notice] = deque()
        self._filled = asyncio.Event()
        self._failures = 0  # one after the other
        self._refusals = 0  # of the message that is next
        self._error: str | None = None
        self._task = self._begin()

    def put(self, notice: Notice) -> None:
        self._queue.append(notice)
        self._filled.set()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def change(self, courier: Courier, window_s: float) -> None:
        """Bring what waits and what comes in another way, at once."""
        self.stop()
        self._courier, self._window_s = courier, window_s
        self._failures = self._refusals = 0
        self._task = self._begin()

    def stop(self) -> asyncio.Task[None]:
        """Bring nothing more; return the task that is about to end."""
        self._task.cancel()
        return self._task

    def health(self) -> ReceiverHealth:
        return {"receiver": self.receiver, "waiting": len(self._queue), "error": self._error}

    def _begin(self) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self._work(self._courier))

    async def _work(self, courier: Courier) -> None:
        try:
            await self._bring_all(courier)
        finally:
            await courier.close()

    async def _bring_all(self, courier: Courier) -> None:
        while True:
            await self._filled.wait()
            await self._gather()
            self._give_up_old()
            if batch := self._next():
                await asyncio.sleep(await self._bring(batch, courier))
            if not self._queue:
                self._filled.clear()

    async def _gather(self) -> None:
        """Wait for what else happens in the window of the first."""
        if self._queue:
            since_s = time.time() - self._queue[0].at_us / 1e6
            await asyncio.sleep(min(max(0.0, self._window_s - since_s), self._window_s))

    def _next(self) -> list[Notice]:
        if not self._queue:
            return []
        until_us = self._queue[0].at_us + self._window_s * 1e6
        return list(islice(takewhile(lambda notice: notice.at_us <= until_us, self._queue), _A_MESSAGE))

    async def _bring(self, batch: list[Notice], courier: Courier) -> float:
        """Return how long to wait before the next try."""
        try:
            message = await self._write([json.loads(notice.body) for notice in batch])
            await courier.send(message)
        except Undelivered as failure:
            return self._failed(batch, failure)
        except Exception as error:  # whatever it is, the others are not held up by it, and it is tried again
            _log.exception("cannot tell %s", self.receiver)
            return self._failed(batch, Undelivered(type(error).__name__))
        if self._failures:
            _log.info("%s is told again, after %d failures", self.receiver, self._failures)
        tries = self._failures + 1
        self._done(batch, "notified", {"tries": tries} if tries > 1 else {})
        return 0.0

    def _failed(self, batch: list[Notice], failure: Undelivered) -> float:
        self._failures += 1
        self._refusals += failure.refused
        if self._error is None:
            _log.error("cannot tell %s: %s; it is tried again", self.receiver, failure)
        self._error = str(failure)
        if self._refusals >= TRIES:
            self._give_up(batch, f"refused {TRIES} times: {failure}")
            return 0.0
        delay_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._failures - 1, 32)) * random.uniform(0.8, 1.2)
        return max(delay_s, failure.after_s)

    def _give_up_old(self) -> None:
        oldest_us = (time.time() - MOST_AGE_S) * 1e6
        if old := list(takewhile(lambda notice: notice.at_us < oldest_us, self._queue)):
            self._give_up(old, "older than a week")
        if (surplus := len(self._queue) - MOST_WAITING) > 0:
            self._give_up(list(islice(self._queue, surplus)), f"more than {MOST_WAITING} wait")

    def _give_up(self, notices: list[Notice], why: str) -> None:
        _log.error("%d notices for %s are given up: %s", len(notices), self.receiver, why)
        error, failures = self._error, self._failures
        self._done(notices, "notify-failed", {"why": why})
        self._error, self._failures = error or why, failures

    def _done(self, notices: list[Notice], kind: EventKind, data: Mapping[str, Any]) -> None:
        """Take the first ones out, here and in the database, and record what has become of them."""
        now_us = time.time_ns() // 1000
        for notice in notices:
            self._queue.popleft()
            told = {"receiver": self.receiver, "id": notice.id, "kind": notice.kind, **data}
            self._record(Event(kind, now_us, notice.job, notice.run_id, data=told))
        self._record(NoticesDone(tuple(notice.id for notice in notices)))
        self._failures = self._refusals = 0
        self._error = None

    def drop(self) -> Iterable[int]:
        """Forget what waits; return its ids."""
        ids = [notice.id for notice in self._queue]
        self._queue.clear()
        return ids
