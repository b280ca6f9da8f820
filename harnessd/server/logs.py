"""What the jobs wrote to stdout and stderr: where it lies, which part of it is whose, and reading it.

A reader holds no part of a log in memory: it asks for the next piece when its client has taken the one before. What a
run wrote is what lies between the offset noted in `LOG.runs` before it was started and that of the next run; these
notes lie beside the log, so that they last as long as it does, whatever becomes of the server and of the database.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from inotify_simple import INotify, flags

from harnessd.server.rotation import Log

if TYPE_CHECKING:
    from harnessd.server.jobspec import LogSettings

_READERS = 4  # threads, for all clients
_IDLE_S = 4.0  # a log that did not grow is looked at so often
_NEVER_SEEN = (0.0, -1)
_RUNS_BYTES = 1 << 20  # size at which the notes on runs are thinned
_RUNS_KEPT = 10_000
_NOTE = re.compile(rb"^(\d{1,18}) (\d{1,18})$", re.MULTILINE)  # a full disk may have left half a line
_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")

Stream = Literal["stdout", "stderr"]


class Runs:
    """Where in a log each run began, in a file beside it: a line a run, its number and the offset."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._path = f"{log.path}.runs"

    def begin(self, run: int) -> None:
        """Note that all that is written from now on is this run's. Raises OSError."""
        first, end = self._log.bounds()
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"%d %d\n" % (run, end))
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        if size > _RUNS_BYTES:
            self._thin(first)

    def range_of(self, run: int) -> tuple[int, int | None] | None:
        """Return where the run's output begins and ends; None for the end of the last run, and for an unknown one."""
        noted = self._noted()
        for number, (this, start) in enumerate(noted):
            if this == run:
                return start, noted[number + 1][1] if number + 1 < len(noted) else None
        return None

    def _noted(self) -> list[tuple[int, int]]:
        try:
            with open(self._path, "rb") as file:
                lines = _NOTE.findall(file.read())
        except FileNotFoundError:
            return []
        return [(int(run), int(offset)) for run, offset in lines]

    def _thin(self, first: int) -> None:
        """Forget the runs of which no output is kept."""
        noted = self._noted()
        kept = [this for this, after in pairwise(noted) if after[1] > max(first, this[1])] + noted[-1:]
        part = f"{self._path}.part"
        with open(part, "wb") as file:
            file.writelines(b"%d %d\n" % each for each in kept[-_RUNS_KEPT:])
        os.replace(part, self._path)


class Logs:
    """The logs of all jobs: made known, rotated, compressed, read, followed. Nothing of it blocks the event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logs: dict[str, Log] = {}
        self._due: dict[str, tuple[float, int]] = {}  # when a log is looked at, and its size then
        self._failing: set[str] = set()
        self._rotated: set[str] = set()  # what may be there to be compressed
        self._readers = ThreadPoolExecutor(_READERS, "log-reader")
        self._rotating = ThreadPoolExecutor(1, "log-rotation")
        self._compressing = ThreadPoolExecutor(1, "log-compression")
        self._busy: dict[ThreadPoolExecutor, Future[None]] = {}
        self._closed = threading.Event()
        self._making = threading.Lock()
        self.changes = Changes()

    def path(self, job: str, stream: Stream, merge: bool) -> str:
        """Return the file that the stream goes to; no other file has a name that ends so."""
        return f"{self._folder}/{job}.{'log' if merge or stream == 'stdout' else 'err'}"

    def _paths(self, job: str, merge: bool) -> list[str]:
        streams: tuple[Stream, ...] = ("stdout",) if merge else ("stdout", "stderr")
        return [self.path(job, stream, merge) for stream in streams]

    def log(self, path: str) -> Log:
        """Return the log; for threads, as it reads what was left of it. Raises OSError."""
        with self._making:
            if path not in self._logs:
                self._logs[path] = Log(Path(path))
            return self._logs[path]

    def of_run(self, job: str, stream: Stream, run: int | None, merge: bool) -> Log:
        """Return the log of the stream: of a run, the one that was noted at its start; for threads. Raises OSError."""
        if run is not None and stream == "stderr":
            for log in (self.log(self.path(job, stream, merged)) for merged in (False, True)):
                if Runs(log).range_of(run):
                    return log
        return self.log(self.path(job, stream, merge))

    def begin(self, job: str, run: int, merge: bool) -> tuple[str, str]:
        """Note where the output of a run begins that is about to start. Return its files for stdout and stderr.

        Some small writes, done here and now: a thread's answer would wait until what loads at a start-up is loaded.
        """
        paths = self._paths(job, merge)
        for path in paths:
            try:
                Runs(self.log(path)).begin(run)
            except OSError as error:  # the run matters more than where its output begins
                _log.error("cannot note where the output of run %s begins in %s: %s", run, path, error)
        return paths[0], "" if merge else paths[1]

    async def in_thread(self, read: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what the function returns, called in a thread for readers."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, partial(read, *args, **kwargs))

    def tick(self, jobs: Iterable[tuple[str, LogSettings]]) -> None:
        """Rotate and compress what has become too long; to be called every second."""
        now = time.monotonic()  # a run keeps the files that it began with, whatever `merge` says by now
        todo = [(path, log) for job, log in jobs for path in self._paths(job, merge=False)]
        self._start(
            self._rotating,
            self._rotate_all,
            [(path, log) for path, log in todo if now >= self._due.get(path, _NEVER_SEEN)[0]],
        )
        self._start(
            self._compressing,
            self._compress_all,
            [path for path, log in todo if log.compress and path in self._rotated],
        )

    def _start(self, executor: ThreadPoolExecutor, work: Callable[[_T], None], todo: _T) -> None:
        """Hand over the work, unless there is none, or what was handed over before still goes on."""
        if not todo:
            return
        before = self._busy.get(executor)
        if before is None or before.done():
            self._busy[executor] = executor.submit(work, todo)

    def _rotate_all(self, todo: list[tuple[str, LogSettings]]) -> None:
        now = time.monotonic()
        for path, settings in todo:
            due, size = self._due.get(path, _NEVER_SEEN)
            if now < due or self._closed.is_set():
                continue
            try:
                now_size = os.stat(path).st_size
                if path not in self._due:
                    self._rotated.add(path)  # an earlier server may have left some
                self._due[path] = (now + (_IDLE_S if now_size == size else 0), now_size)
                if now_size > settings.max_bytes and self.log(path).rotate(settings.max_bytes, settings.keep):
                    self._rotated.add(path)
            except FileNotFoundError:
                self._due[path] = (now + _IDLE_S, 0)  # nothing was written yet
            except OSError as error:
                self._failed(path, "rotate", error)
            else:
                self._failing.discard(path)

    def _compress_all(self, paths: list[str]) -> None:
        for path in paths:
            self._rotated.discard(path)
            try:
                log = self.log(path)
                for start in log.to_compress():
                    if self._closed.is_set():
                        return
                    log.compress(start, self._closed.is_set)
            except OSError as error:
                self._rotated.add(path)
                self._failed(path, "compress", error)

    def _failed(self, path: str, what: str, error: OSError) -> None:
        if path not in self._failing:  # it is tried again every second, and told once
            self._failing.add(path)
            _log.error("cannot %s %s: %s", what, path, error)

    async def close(self) -> None:
        """End the threads; a rotation is finished first, a compression is begun anew by the next server."""
        self._closed.set()
        self.changes.close()
        for executor in (self._readers, self._rotating, self._compressing):
            await asyncio.to_thread(executor.shutdown, cancel_futures=True)


class Changes:
    """Tells when a file is written to: one-shot watches, so that a writer pays for the next one only if it is read."""

    def __init__(self) -> None:
        self._inotify: INotify | None = None
        self._waiting: dict[int, set[asyncio.Future[None]]] = {}

    def next(self, path: str) -> asyncio.Future[None] | None:
        """Return what is done when the file is next written to, None if there is no file."""
        if self._inotify is None:
            self._inotify = INotify(nonblocking=True)
            asyncio.get_running_loop().add_reader(self._inotify.fileno(), self._on_events)
        try:
            watch = self._inotify.add_watch(path, flags.MODIFY | flags.ONESHOT)
        except OSError:
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(watch, set()).add(future)
        future.add_done_callback(lambda done: self._waiting.get(watch, set()).discard(done))
        return future

    def _on_events(self) -> None:
        assert self._inotify
        for event in self._inotify.read(timeout=0):
            if event.mask & flags.MODIFY:
                for future in self._waiting.pop(event.wd, set()):
                    if not future.done():
                        future.set_result(None)

    def close(self) -> None:
        if self._inotify:
            asyncio.get_running_loop().remove_reader(self._inotify.fileno())
            self._inotify.close()
            self._inotify = None
