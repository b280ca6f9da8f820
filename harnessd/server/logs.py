"""What the jobs wrote to stdout and stderr: where it lies, which part of it is whose, and reading it.

A reader holds no part of a log in memory: it asks for the next piece when its client has taken the one before. What a
run wrote is what lies between the offset noted in `LOG.runs` before it was started and that of the next run; these notes
lie beside the log, so that they last as long as it does, whatever becomes of the server and of the database.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, ParamSpec, TypeVar

from inotify_simple import INotify, flags

from harnessd.server.rotation import Log, RotatedAway

if TYPE_CHECKING:
    from harnessd.server.jobspec import LogSettings

CHUNK_BYTES = 64 << 10
_READERS = 4  # threads, for all clients
_IDLE_S = 4.0  # a log that did not grow is looked at so often
_RUNS_BYTES = 1 << 20  # size at which the notes on runs are thinned
_RUNS_KEPT = 10_000
_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")

Stream = Literal["stdout", "stderr"]


class Cursor:
    """Reads a log from an offset on, across the rotated files. One thread at a time."""

    def __init__(self, log: Log, offset: int) -> None:
        self.offset = offset
        self._log = log
        self._file: BinaryIO | None = None
        self._file_end = 0
        self._lock = threading.Lock()

    def read(self, limit: int) -> bytes:
        """Return at most so many bytes, b"" at the end of the log. Raises RotatedAway, OSError."""
        with self._lock:
            if self._file is None:
                data = self._log.read(self.offset, limit)
                if data is not None:
                    self.offset += len(data)
                    return data
                self._open()
            assert self._file
            data = self._file.read(min(limit, self._file_end - self.offset))
            if not data:
                raise OSError(f"cannot read {self._log.path}: the rotated file before {self._file_end} is too short")
            self.offset += len(data)
            if self.offset == self._file_end:
                self._close()
            return data

    def close(self) -> None:
        with self._lock:
            self._close()

    def _open(self) -> None:
        piece = self._log.piece(self.offset)
        assert piece  # as the log did not have it
        start, self._file_end = piece
        self._file = self._log.open_piece(start)
        self._file.seek(self.offset - start)

    def _close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


def tail(log: Log, low: int, end: int, lines: int) -> int:
    """Return where the last `lines` lines before `end` begin, at least `low`."""
    wanted = lines
    for at, size, newlines in _newlines(log, low, end - 1):  # the newline at the end is no beginning of a line
        if not wanted or newlines < wanted:
            wanted -= newlines
            continue
        chunk = _read_at(log, at, size)
        where = len(chunk)
        for _ in range(wanted):
            where = chunk.rfind(b"\n", 0, where)
        return at + where + 1
    return low if lines else end


def _newlines(log: Log, low: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield offset, size and number of newlines of one chunk after the other, the last first."""
    while end > low:
        piece = log.piece(end - 1)
        start = max(low, piece[0] if piece else log.bounds()[0])
        if piece is None:
            start = max(start, end - CHUNK_BYTES)
        counts = list(_counted(log, start, end))  # forward, as a compressed file is read
        yield from reversed(counts)
        end = start


def _counted(log: Log, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    cursor = Cursor(log, start)
    try:
        while cursor.offset < end:
            at = cursor.offset
            data = cursor.read(min(CHUNK_BYTES, end - at))
            if not data:
                return
            yield at, len(data), data.count(b"\n")
    finally:
        cursor.close()


def _read_at(log: Log, at: int, size: int) -> bytes:
    cursor = Cursor(log, at)
    try:
        data = b""
        while len(data) < size and (more := cursor.read(size - len(data))):
            data += more
        return data
    finally:
        cursor.close()
