"""Reading a log forward from any offset, and finding where its last lines begin."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import BinaryIO

from harnessd.server.rotation import Log

CHUNK_BYTES = 64 << 10


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
    """Return where the last `lines` lines before `end` begin, at least `low`. Raises RotatedAway, OSError."""
    if not lines:
        return end
    wanted = lines
    for at, size, newlines in _newlines(log, low, end - 1):  # the newline at the end is no beginning of a line
        if newlines < wanted:
            wanted -= newlines
            continue
        chunk = _read_at(log, at, size)
        where = size
        for _ in range(wanted):
            where = chunk.rfind(b"\n", 0, where)
        return at + where + 1
    return low


def _newlines(log: Log, low: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield offset, size and number of newlines of one chunk after the other, the last first."""
    while end > low:
        piece = log.piece(end - 1)  # a rotated file is counted forward, since it may be compressed
        start = max(low, piece[0] if piece else end - CHUNK_BYTES)
        yield from reversed(list(_counted(log, start, end)))
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
