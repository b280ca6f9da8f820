"""Reads the journals of the runs: at once when one is written to, at most every 50 ms, each line once.

A journal is watched with a one-shot inotify watch that is renewed after each reading. So a job that writes without a
pause pays for waking the server twenty times a second and not once a line, and a thousand jobs that write nothing cost
nothing.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from inotify_simple import INotify, flags

from harnessd.errors import Misplaced
from harnessd.server.tape import Line, Tape
from harnessd.server.thin import Pace, thin

PAUSE_S = 0.05  # the least time between two readings of one journal
_RETRY_S = 1.0  # until what could not be stored is read again
_CHUNK_BYTES = 64 << 10  # some milliseconds of parsing, in which no request is answered
_CHUNKS_AGAIN = 8  # between two commits, or a job that writes much would never be caught up with
_log = logging.getLogger(__name__)


class LineStore(Protocol):
    """Where lines are stored, together with how far the journal has been read."""

    def put_lines(
        self, run: int, lines: Sequence[Line], offset: int, count: int, dropped: int = 0, since: int | None = None
    ) -> Future[Any]: ...

    def full(self) -> bool: ...

    def is_failing(self) -> bool: ...

    def flush(self) -> Future[Any]: ...


class _Place(NamedTuple):
    """Where in a journal. A later place is greater: in a file that was cut to nothing, the offset begins anew."""

    cuts: int
    offset: int
    lines: int = 0  # before it; not known where the database that has them could not be read


@dataclass(slots=True)
class _Journal:
    run: int
    path: Path
    tape: Tape
    on_lines: Callable[[list[Line]], None]
    max_rate: float
    pace: Pace
    stored: _Place  # up to where it is committed
    sent: dict[tuple[int, int], tuple[_Place, Pace]]  # what may be stored by now, and was not when that was last heard
    stored_pace: Pace  # as it was at `stored`
    watch: int = -1
    read_at: float = 0.0
    timer: asyncio.TimerHandle | None = None
    on_end: Callable[[], None] | None = None  # the run has ended
    ended: bool = False  # and its last line was read
    unreadable: bool = False  # or could not be: it is left to the next server
    pending: int = 0  # batches on their way to the store
    behind: bool = False  # a batch was not stored; all from `stored` on is to be read again


class Reader:
    """Follows every run's journal. Without a store, what was read is given back at once."""

    def __init__(self, store: LineStore | None, on_stored: Callable[[int], None]) -> None:
        self._store = store
        self._on_stored = on_stored  # the journal of a run that has ended is stored to its last line
        self._journals: dict[int, _Journal] = {}
        self._by_watch: dict[int, _Journal] = {}
        self._closed = False
        self._told = False  # that there is no room for watches
        self._inotify = INotify(nonblocking=True)
        asyncio.get_running_loop().add_reader(self._inotify.fileno(), self._on_events)

    def follow(self, run: int, tape: Tape, path: Path, on_lines: Callable[[list[Line]], None], max_rate: float) -> None:
        """Read the run's journal from where the tape stands; at most `max_rate` statuses a second are stored."""
        if self._closed:  # the server leaves, and the run was being forked: the next one adopts it
            tape.close()
            return
        journal = _Journal(run, path, tape, on_lines, max_rate, Pace(run), _place(tape), {}, Pace(run))
        self._journals[run] = journal
        self._read(journal)

    def change_rate(self, run: int, max_rate: float) -> None:
        """Store at most so many statuses of the run a second from now on."""
        if journal := self._journals.get(run):
            journal.max_rate = max_rate

    def finish(self, run: int, on_end: Callable[[], None]) -> None:
        """Read to the end, as the run has ended; then call `on_end`."""
        if self._closed:  # the next server hears of it, too
            return
        journal = self._journals.get(run)
        if journal is None:
            on_end()
            return
        journal.on_end = on_end
        self._read(journal)

    def backlog_bytes(self, run: int) -> int:
        """Return how much of the run's journal is not stored yet; without a store, not read yet."""
        journal = self._journals.get(run)
        if journal is None:
            return 0
        unstored = journal.tape.offset - journal.stored.offset if self._store else 0
        return journal.tape.backlog_bytes() + max(0, unstored)

    def close(self) -> None:
        """Stop reading. What was not read stays in the journals for the next server."""
        self._closed = True
        asyncio.get_running_loop().remove_reader(self._inotify.fileno())
        self._inotify.close()
        for journal in self._journals.values():
            if journal.timer:
                journal.timer.cancel()
        self._journals.clear()

    def _on_events(self) -> None:
        now = time.monotonic()
        for event in self._inotify.read(timeout=0):
            journal = self._by_watch.pop(event.wd, None) if event.mask & flags.MODIFY else None
            if journal:
                journal.watch = -1
                self._later(journal, max(0.0, journal.read_at + PAUSE_S - now))

    def _later(self, journal: _Journal, delay_s: float) -> None:
        if journal.timer is None and not journal.ended:
            loop = asyncio.get_running_loop()
            journal.timer = loop.call_later(delay_s, self._read, journal)

    def _read(self, journal: _Journal) -> None:
        """Read one chunk, and come back for more."""
        if journal.timer:
            journal.timer.cancel()
            journal.timer = None
        if journal.ended:
            return
        if self._store and self._store.full():
            self._later(journal, PAUSE_S)
            return
        journal.read_at = time.monotonic()
        final = journal.on_end is not None
        if not final:
            self._watch(journal)  # before reading, so that a line written meanwhile is told
        try:
            offset = journal.tape.offset
            lines = journal.tape.read(_CHUNK_BYTES, final=final)
        except OSError as error:
            self._on_unreadable(journal, error)
            return
        if journal.tape.offset != offset:
            if lines:
                journal.on_lines(lines)
            self._hand_over(journal, lines, offset)
            self._later(journal, 0)
        elif final:
            if journal.pace.missing:
                self._hand_over(journal, [], offset)
            self._end(journal)
        elif journal.watch < 0:
            self._later(journal, _RETRY_S)

    def _on_unreadable(self, journal: _Journal, error: OSError) -> None:
        _log.error("cannot read the journal of run %s: %s", journal.run, error)
        if journal.on_end:
            journal.unreadable = True
            self._end(journal)
        else:
            self._later(journal, _RETRY_S)

    def _watch(self, journal: _Journal) -> None:
        if journal.watch >= 0:
            return
        try:
            journal.watch = self._inotify.add_watch(journal.path, flags.MODIFY | flags.ONESHOT)
            self._by_watch[journal.watch] = journal
        except OSError as error:  # it was removed, or the user has too many watches: it is looked at now and then
            if error.errno == errno.ENOSPC and not self._told:
                self._told = True
                _log.warning(
                    "cannot watch journals: %s (fs.inotify.max_user_watches); they are read once a second", error
                )

    def _end(self, journal: _Journal) -> None:
        journal.ended = True
        if journal.watch >= 0:
            with suppress(OSError):
                self._inotify.rm_watch(journal.watch)
            self._by_watch.pop(journal.watch, None)
        if journal.behind:
            journal.tape.close()  # until it is tried again: runs may end by the thousand meanwhile
        assert journal.on_end
        journal.on_end()
        self._drop_if_stored(journal)

    # storing

    def _hand_over(self, journal: _Journal, lines: list[Line], since: int) -> None:
        if self._store is None:
            journal.tape.give_back(journal.tape.offset)
        elif not journal.behind:
            self._put(journal, lines, since)

    def _put(self, journal: _Journal, lines: list[Line], since: int) -> None:
        """Have the lines between `since` and where the tape stands stored; not without those before them."""
        assert self._store
        reached = _place(journal.tape)
        journal.pending += 1
        loop = asyncio.get_running_loop()
        thinned = thin(lines, journal.max_rate, journal.pace, final=journal.on_end is not None)
        pace = journal.pace = thinned.pace
        journal.sent[reached[1:]] = (reached, pace)
        future = self._store.put_lines(
            journal.run, thinned.lines, reached.offset, reached.lines, thinned.dropped, since
        )
        future.add_done_callback(lambda done: _in_loop(loop, self._on_put, journal, reached, pace, done))

    def _on_put(self, journal: _Journal, reached: _Place, pace: Pace, done: Future[Any]) -> None:
        journal.pending -= 1
        error = done.exception()
        if isinstance(error, Misplaced) and (error.offset, error.lines) != journal.stored[1:]:
            before = _Place(0, error.offset, error.lines), Pace(journal.run)  # it was so when this server began
            journal.stored, journal.stored_pace = journal.sent.get((error.offset, error.lines), before)
        if error is None:
            journal.stored, journal.stored_pace = reached, pace
            journal.sent = {key: sent for key, sent in journal.sent.items() if sent[0] > reached}
            if reached.cuts == journal.tape.cuts:
                journal.tape.give_back(reached.offset)
            if journal.behind and journal.pending == 0:
                self._catch_up(journal, _CHUNKS_AGAIN)
        elif not journal.behind or journal.pending == 0:
            journal.behind = True
            if journal.ended:
                journal.tape.close()
            asyncio.get_running_loop().call_later(_RETRY_S, self._catch_up, journal)
        self._drop_if_stored(journal)

    def _catch_up(self, journal: _Journal, chunks: int = 1) -> None:
        """Read again what was read but not stored; the lines were told already. While it fails, one chunk each time."""
        assert self._store
        if journal.pending or not journal.behind or journal.run not in self._journals:
            return
        if self._store.is_failing():  # there may be thousands: they are not to be read again for nothing
            asyncio.get_running_loop().call_later(_RETRY_S, self._catch_up, journal)
            return
        tape, stored = journal.tape, journal.stored
        try:
            tape.notice_cut()
            reached = _place(tape)
            journal.pace = journal.stored_pace
            while stored[:2] < reached[:2] and journal.pending < (1 if self._store.full() else chunks):
                stored = self._put_again(journal, stored, reached)
            if journal.pending:
                return
        except OSError as error:
            _log.error("cannot read the journal of run %s again: %s", journal.run, error)
            asyncio.get_running_loop().call_later(_RETRY_S, self._catch_up, journal)
            return
        tape.rewind(stored.offset, stored.lines)
        if journal.ended and journal.pace.missing:
            self._put(journal, [], stored.offset)
            return
        journal.behind = False
        self._later(journal, 0)
        self._drop_if_stored(journal)

    def _put_again(self, journal: _Journal, place: _Place, reached: _Place) -> _Place:
        """Put what follows on that place, and return where the next follows."""
        tape = journal.tape
        begin = place.offset if place.cuts == reached.cuts else 0
        tape.rewind(begin, place.lines)
        try:
            lines = tape.read(min(_CHUNK_BYTES, reached.offset - begin), final=True) if begin < reached.offset else []
            self._put(journal, lines, place.offset)
            return _place(tape)
        finally:
            if tape.offset < reached.offset:  # else its lines were counted anew
                tape.rewind(reached.offset, reached.lines)

    def _drop_if_stored(self, journal: _Journal) -> None:
        if journal.ended and not journal.pending and not journal.behind and journal.run in self._journals:
            del self._journals[journal.run]
            journal.tape.close()
            if journal.unreadable:
                return
            if self._store is None:
                self._remove(journal)
                return
            # Of a run that said nothing, the journal may be all that there is until its row is stored.
            loop = asyncio.get_running_loop()
            self._store.flush().add_done_callback(lambda done: _in_loop(loop, self._remove, journal, done))

    def _remove(self, journal: _Journal, stored: Future[Any] | None = None) -> None:
        if stored and stored.exception():
            return  # the store is closed: the next server reads it again
        with suppress(FileNotFoundError):
            os.unlink(journal.path)
        self._on_stored(journal.run)


def _place(tape: Tape) -> _Place:
    return _Place(tape.cuts, tape.offset, tape.lines)


def _in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    with suppress(RuntimeError):  # the loop is closed: the server ends, and the next one reads it again
        loop.call_soon_threadsafe(function, *args)
