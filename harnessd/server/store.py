"""The one writer. Whoever has something to keep puts it here and goes on; a thread commits it.

Nothing that happens to the database reaches a caller of `put`. While the database fails, records wait here, within
bounds, and the lines of journals wait in the journals: `put_lines` says through its future whether they are stored, and
the offset of the journal is in the same transaction, so that a line is stored once, whatever is killed when.

A database that is damaged or gone is set aside by name, and a new one begun with the jobs and runs that are known.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Self

from sqlalchemy import Engine

from harnessd.errors import StoreError
from harnessd.server.backlog import Backlog, Waiting
from harnessd.server.database import Database, Trouble
from harnessd.server.health import CommitTimes, Health
from harnessd.server.known import Known
from harnessd.server.records import Event, JobRow, Keep, Loaded, Record
from harnessd.server.retention import Trim
from harnessd.server.shapes import Storage
from harnessd.server.tape import Line
from harnessd.server.writer import Lines, Writer, Written

COMMIT_SECONDS = 0.05  # between the beginnings of two commits
LINES_WAITING = 60_000  # more than that, or than these bytes, and `full()` asks for a pause
BYTES_WAITING = 64 << 20
WAL_LOOK_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Chore:
    """Work in steps, each done only when nothing waits to be committed."""

    steps: Callable[[Writer], Iterator[int]]
    running: Iterator[int] | None = None
    total: int = 0
    done: Future[int] = field(default_factory=lambda: _promise())


class Store:
    """See the module. Any thread may call, and none waits for the database.

    `on_committed` is told the events of each commit, with their ids, in order, in the store's own thread.
    """

    def __init__(self, where: str | os.PathLike[str]) -> None:
        self.on_committed: Callable[[Sequence[Event]], None] = _ignore
        self._database = Database(where)
        self._writer: Writer | None = None
        self._loaded: Loaded | None = None
        self._wake = threading.Condition()  # held for what both sides touch: the next four
        self._backlog = Backlog()
        self._chores: deque[_Chore] = deque()
        self._known = Known()
        self._health = Health()
        self._on_seen: Callable[[Sequence[JobRow]], object] | None = None  # set: what is put ignores what is stored
        self._next_commit = 0.0
        self._next_wal_look = 0.0
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="harnessd-store", daemon=True)

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> Self:
        """Open the database at an SQLAlchemy URL or a path, and make or migrate its tables.

        Raise NewerSchema or StoreError for one that is not for this code. Whatever else is wrong with it is said by
        `health()` and tried again later.
        """
        store = cls(where)
        for _ in range(2):  # again when a damaged one was set aside
            try:
                store._connect()
                break
            except StoreError:
                raise
            except Exception as error:  # the daemon boots with any database, or with none
                store._failed(error, [])
        store._thread.start()
        return store

    def load(self) -> Loaded:
        """Return what the database knew when it was opened."""
        return self._loaded or Loaded(error=self._health.error)

    def unseen(self, on_seen: Callable[[Sequence[JobRow]], object]) -> None:
        """Whoever puts rows of jobs could not read those that are stored: keep what only these say, as soon as they can
        be read, and then call `on_seen` with them, in the store's thread."""
        self._on_seen = on_seen

    def put(self, record: Record) -> None:
        """Keep the record; it is committed at once, or within 50 ms when there is much."""
        with self._wake:
            self._known.note(record)
            self._add(record)

    def together(self) -> AbstractContextManager[object]:
        """In this context, all that its thread puts is committed in one transaction. Not for long: the store waits."""
        return self._wake

    def put_lines(
        self, run: int, lines: Sequence[Line], offset: int, count: int, dropped: int = 0, since: int | None = None
    ) -> Future[None]:
        """Store the lines of a run, and that its journal is read up to `offset`, which is behind `count` lines.

        `dropped` statuses were left out between them. The future is done once that is committed; callbacks run in
        the store's thread. It has a StoreError when that did not come to pass: then go back to what was stored last
        and read again after a while. With `since`, the offset at which the lines begin, they are refused as well when
        those before them were, so that any number of them may be on the way, and when the database has them: with
        Misplaced, which says where to read on.
        """
        tape = Lines(run, lines, since, offset, count, dropped, _promise())
        with self._wake:
            if not self._refuses_lines() and not self._closing:
                self._add(tape)
                return tape.stored
        _refuse(
            [tape], StoreError(f"cannot store the lines of run {run}: {self._health.error or 'the store is closed'}")
        )
        return tape.stored

    def full(self) -> bool:
        """Return whether so many lines wait that reading more would only take memory."""
        return self._backlog.lines > LINES_WAITING or self._backlog.bytes > BYTES_WAITING

    def is_failing(self) -> bool:
        """Return whether storage fails and lines that can wait had better do so: some others will find out."""
        with self._wake:
            return self._refuses_lines() or (self._health.error is not None and self._backlog.lines > 0)

    def _refuses_lines(self) -> bool:
        return self._health.error is not None and time.monotonic() < self._health.retry_at

    def flush(self) -> Future[None]:
        """Return a future that is done when all that was put before is committed."""
        done: Future[None] = _promise()
        with self._wake:
            if not self._closing:
                self._add(done)
                return done
        _refuse([done], StoreError("cannot flush: the store is closed"))
        return done

    @property
    def readers(self) -> Engine:
        """Connections that only read. Tell `suspect` of errors they raise."""
        return self._database.readers

    def suspect(self, error: Exception) -> None:
        """A reader had this error: if it means that the database is damaged, it is set aside."""
        if self._database.trouble(error) is Trouble.LOST:
            with self._wake:
                self._add(error)

    @property
    def error(self) -> str | None:
        """Why nothing can be stored now."""
        return self._health.error

    def health(self) -> Storage:
        """Return whether storage works (`ok`, `error`, `since_us`), what waits, and figures of the commits."""
        with self._wake:
            return {
                **self._health.report(),
                "queue": len(self._backlog),
                "lines_waiting": self._backlog.lines,
                "dropped": self._backlog.dropped,
                "wal_bytes": self._database.wal_bytes(),
            }

    def commit_times(self) -> CommitTimes:
        with self._wake:
            return self._health.commit_times()

    def trim(self, now_us: int, keep: Keep, by_job: Mapping[str, Keep] | None = None) -> Future[int]:
        """Forget what is older or more than is kept, in small steps; the future says how many rows that were."""
        return self._chore(lambda writer: iter(Trim(writer.connection, now_us, keep, by_job or {})))

    def close(self, timeout_s: float = 10.0) -> None:
        """Commit what waits, if that is possible, and let go of the database."""
        with self._wake:
            self._closing = True
            self._health.retry_at = 0.0  # once more, whatever was before
            self._wake.notify()
        self._thread.join(timeout_s)

    def _add(self, item: Waiting) -> None:
        self._backlog.add(item)
        self._wake.notify()

    # what follows runs in the store's thread

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            if batch:
                self._attempt(batch)
            else:
                self._step(self._chores[0])
            self._bound_wal()
        self._disconnect()
        self._database.dispose()
        closed = StoreError("cannot store: the store was closed")
        _refuse(self._backlog.drain(), closed)
        for chore in self._chores:
            chore.done.set_exception(closed)

    def _next(self) -> list[Waiting] | None:
        """Wait for work: a batch to commit, an empty one for a step of a chore, None when the store is closed."""
        with self._wake:
            while True:
                now, failing = time.monotonic(), self._health.error is not None
                due = max(self._next_commit, self._health.retry_at if failing else 0.0)
                if self._backlog and (now >= due or (self._closing and now >= self._health.retry_at)):
                    return self._backlog.take()
                if self._closing:
                    return None
                if self._chores and not failing:
                    return []
                self._wake.wait(due - now if self._backlog else None)

    def _attempt(self, batch: list[Waiting]) -> None:
        began = time.monotonic()
        self._next_commit = 0.0 if self._backlog.is_urgent() else began + COMMIT_SECONDS
        try:
            if self._loaded is None or self._on_seen:
                batch = self._see(batch)
            written = self._write(batch)
        except Exception as error:  # nothing that a database or a record does may end this thread
            self._failed(error, batch)
        else:
            self._committed(began, batch, written)

    def _see(self, batch: Sequence[Waiting]) -> list[Waiting]:
        """Connect. Return the batch anew: it was numbered and filled in before it was known what the database has."""
        if self._writer is None:
            self._connect()
        assert self._loaded
        jobs = [row for row in self._loaded.jobs if row.removed_us is None]
        on_seen, self._on_seen = self._on_seen, None
        with self._wake:
            self._backlog.put_back([_unnumbered(item) for item in batch])
            if on_seen:
                self._backlog.complete(jobs)
            batch = self._backlog.take()
        if on_seen:
            _tell(on_seen, jobs)
        return batch

    def _write(self, batch: Sequence[Waiting]) -> Written:
        for item in batch:
            if isinstance(item, Exception):
                raise item
        writer = self._writer or self._connect()
        self._database.check()
        items = [item for item in batch if not isinstance(item, Future | Exception)]
        written = writer.write(items, self._backlog.last_event)
        self._database.check()  # or it went into a file that nobody will ever see
        return written

    def _committed(self, began: float, batch: Sequence[Waiting], written: Written) -> None:
        with self._wake:
            self._backlog.last_event += written.from_lines
            for item in batch:
                if isinstance(item, Lines) and item not in written.refused:
                    self._known.progressed(item.run, item.offset, item.count)
            if (since_us := self._health.committed(began)) is not None:
                data = {"ok": True, "since_us": since_us, "dropped": self._backlog.dropped}
                self._backlog.add(Event("storage", time.time_ns() // 1000, data=data))
        for item in batch:
            if isinstance(item, Lines) and item in written.refused:
                item.stored.set_exception(written.refused[item])
            elif isinstance(item, Lines):
                item.stored.set_result(None)
            elif isinstance(item, Future):
                item.set_result(None)
        if written.events:
            _tell(self.on_committed, written.events)

    def _failed(self, error: Exception, batch: Sequence[Waiting]) -> None:
        connected = self._writer is not None
        self._disconnect()
        trouble = self._database.trouble(error)
        failure = StoreError(f"cannot store: {error}")
        if trouble is Trouble.ROWS and connected and batch:
            self._sort_out(batch, failure, error)
            return
        kept = [item for item in batch if not isinstance(item, Lines | Exception)]
        with self._wake:
            first = self._health.failed(error)
            lines = [*(item for item in batch if isinstance(item, Lines)), *self._backlog.take_lines()]
            # It may be that only the answer was lost: no other events must get the ids of these.
            self._backlog.last_event += sum(len(item.lines) for item in lines)
            if trouble is Trouble.LOST:
                self._backlog.put_back([*self._begin_anew(error), *(_unnumbered(item) for item in kept)])
                if first:
                    self._health.retry_at = 0.0  # a new database has not failed yet
            else:
                self._backlog.put_back([*kept, _storage(error)] if first else kept)
        if first:
            log.error("storage fails: %s", error)
        _refuse(lines, failure)

    def _sort_out(self, batch: Sequence[Waiting], failure: StoreError, error: Exception) -> None:
        """Something in the batch cannot be stored: the rest will be, one by one."""
        if len(batch) > 1:
            with self._wake:
                self._backlog.put_back(batch, singly=True)
            return
        log.error("a record is dropped, it cannot be stored: %r", batch[0], exc_info=error)
        self._backlog.dropped += 1
        _refuse(batch, failure)

    def _begin_anew(self, error: Exception) -> list[Record]:
        """Set the database aside; return what a new one begins with."""
        try:
            aside = self._database.set_aside()
        except OSError as refused:
            log.error("cannot set the database aside: %s", refused)
            return []
        above_all_given = time.time_ns() // 1_000_000
        self._backlog.last_event = max(self._backlog.last_event, above_all_given)
        note = _storage(error, set_aside=str(aside) if aside else None)
        return [*self._known.records(), note]

    def _connect(self) -> Writer:
        self._writer = Writer(self._database.connect())
        loaded = self._writer.load()
        self._loaded = self._loaded or loaded
        with self._wake:
            self._known.learn(loaded)
            self._backlog.last_event = max(self._backlog.last_event, loaded.last_event)
        return self._writer

    def _disconnect(self) -> None:
        for chore in self._chores:
            chore.running = None  # it begins again
        if self._writer:
            self._writer.close()
            self._writer = None

    def _chore(self, steps: Callable[[Writer], Iterator[int]]) -> Future[int]:
        chore = _Chore(steps)
        with self._wake:
            self._chores.append(chore)
            self._wake.notify()
        return chore.done

    def _step(self, chore: _Chore) -> None:
        try:
            chore.running = chore.running or chore.steps(self._writer or self._connect())
            chore.total += next(chore.running)
        except StopIteration:
            self._chores.popleft()
            chore.done.set_result(chore.total)
        except Exception as error:  # the future takes it to whoever waits
            self._chores.popleft()
            chore.done.set_exception(error)
            self.suspect(error)
            self._disconnect()

    def _bound_wal(self) -> None:
        now = time.monotonic()
        if self._writer and now >= self._next_wal_look:
            self._next_wal_look = now + WAL_LOOK_SECONDS
            try:
                self._database.bound_wal(self._writer.connection)
            except Exception as error:  # no room in the database itself, or damage: the next commit finds out
                log.warning("cannot shorten the write-ahead log: %s", error)
                self.suspect(error)
                self._disconnect()


def _promise() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # what was asked for happens, whether or not somebody still waits for it
    return future


def _ignore(*_: object) -> None:
    pass


def _unnumbered(item: Waiting) -> Waiting:
    return replace(item, id=0) if isinstance(item, Event) else item


def _storage(error: Exception, **data: Any) -> Event:
    return Event("storage", time.time_ns() // 1000, data={"ok": False, "error": str(error), **data})


def _refuse(items: Iterable[Waiting], error: StoreError) -> None:
    for item in items:
        future = item.stored if isinstance(item, Lines) else item
        if isinstance(future, Future):
            future.set_exception(error)


def _tell(callback: Callable[..., object], *args: object) -> None:
    try:
        callback(*args)
    except Exception:  # a listener's fault is not the storage's
        log.exception("a listener of the store failed")
