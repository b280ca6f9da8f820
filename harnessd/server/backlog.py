"""What waits to be committed, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from harnessd.server.known import completed
from harnessd.server.records import Event, JobRow, Notice, RunEnded, Sample
from harnessd.server.writer import Item, Lines

MOST_RECORDS = 100_000  # that wait while the database fails
LINES_A_BATCH = 20_000  # about
BYTES_A_BATCH = 16 << 20

# A future is a flush: all before it is committed. An exception is what a reader of the database met.
Waiting = Item | Future[None] | Exception
_FOLLOWS = (JobRow, Notice)  # stored in one transaction with the event before it, which is with a run's end before it


class Backlog:
    """Not for two threads at once."""

    def __init__(self) -> None:
        self.lines = 0  # of journals, that wait
        self.bytes = 0  # of these
        self.dropped = 0  # records for which there was no room
        self.last_event = 0  # the highest id that was given
        self._queue: deque[Waiting] = deque()
        self._singly = 0  # so many at the front come in batches of one
        self._full_at = MOST_RECORDS

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, item: Waiting) -> None:
        self._queue.append(item)
        self._count(item, 1)
        if len(self._queue) > self._full_at:
            self._shed()
            self._full_at = max(MOST_RECORDS, len(self._queue) + MOST_RECORDS // 20)  # looked through now and then

    def put_back(self, items: Sequence[Waiting], singly: bool = False) -> None:
        """Put the items before all others; with `singly` each of them will be a batch of its own."""
        self._queue.extendleft(reversed(items))
        for item in items:
            self._count(item, 1)
        self._singly = len(items) if singly else 0

    def take(self) -> list[Waiting]:
        """Return the next batch. Its events have their ids from now on, also when they are put back."""
        batch: list[Waiting] = []
        singly = self._singly > 0
        room = 1 if singly else LINES_A_BATCH
        least = self.bytes - BYTES_A_BATCH
        self._singly = max(0, self._singly - 1)
        while self._queue and ((room > 0 and self.bytes > least) or (not singly and self._belongs(batch[-1]))):
            item = self._queue.popleft()
            if isinstance(item, Event) and not item.id:
                self.last_event += 1
                item = replace(item, id=self.last_event)
            room -= 1 - self._count(item, -1)
            batch.append(item)
        return batch

    def _belongs(self, before: Waiting) -> bool:
        return isinstance(before, RunEnded) or isinstance(self._queue[0], _FOLLOWS)

    def complete(self, stored: Iterable[JobRow]) -> None:
        """Lay what waits of jobs over their rows that are stored."""
        rows = {row.name: row for row in stored}
        for number, item in enumerate(self._queue):
            if isinstance(item, JobRow) and item.name in rows:
                self._queue[number] = completed(item, rows[item.name])

    def take_lines(self) -> list[Lines]:
        """Return all lines that wait, out of their order with the rest: they are not stored for now."""
        lines = [item for item in self._queue if isinstance(item, Lines)]
        self._queue = deque(item for item in self._queue if not isinstance(item, Lines))
        self.lines = self.bytes = 0
        return lines

    def drain(self) -> Iterable[Waiting]:
        """Return all that waits, for good."""
        items, self._queue, self.lines, self.bytes = list(self._queue), deque(), 0, 0
        return items

    def is_urgent(self) -> bool:
        return self._singly > 0

    def _count(self, item: Waiting, sign: int) -> int:
        if not isinstance(item, Lines):
            return 0
        lines = sign * len(item.lines)
        self.lines += lines
        self.bytes += sign * item.bytes
        return lines

    def _shed(self) -> None:
        """Make room: rows of jobs go of which there is a later one, then samples, then the oldest events."""
        last = {item.name: id(item) for item in self._queue if isinstance(item, JobRow)}
        passed = {id(item) for item in self._queue if isinstance(item, JobRow) and last[item.name] != id(item)}
        samples = [item for item in self._queue if isinstance(item, Sample)]
        events = [item for item in self._queue if isinstance(item, Event)]
        lost = {id(item) for item in [*samples, *events][: max(0, MOST_RECORDS // 10 - len(passed))]}
        self._queue = deque(item for item in self._queue if id(item) not in passed | lost)
        self.dropped += len(lost)
