"""One log: the file that a job appends to, and what has been cut off its head.

A job writes to its log itself, with O_APPEND, and nobody may ask it to open another file. So a log is rotated under its
writer: the head is copied into a file of its own, and then given back to the filesystem in place. Where the filesystem
can (ext4, XFS), the head is collapsed: the rest moves to the front, under the lock that an append takes too, so no
append is ever lost or torn. Elsewhere (tmpfs, btrfs, overlays on them) the head becomes a hole, which takes no space.

Every byte keeps the offset that it has in the whole output since the log began. `LOG.at` says which of these offsets
the file begins with. It is replaced as a whole, in this order, and a crash between any two steps changes nothing:

1. the head is copied to `LOG.<offset>`, and is on disk;
2. `LOG.at` says that the head is cut off: from here on the copy counts, and what the head still holds does not;
3. the head is made a hole. Doing it twice is doing it once;
4. `LOG.at` says that there is a hole, and how long;
5. the hole is collapsed. Whether that was done needs no note: a file that does not begin with its hole was collapsed.

Steps 2 to 5 are metadata in one journal of the filesystem, which keeps their order over a power failure too.
"""

from __future__ import annotations

import ctypes
import errno
import gzip
import io
import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

_KEEP_SIZE, _PUNCH_HOLE, _COLLAPSE_RANGE = 1, 2, 8  # fallocate(2), FALLOC_FL_*
_FAR = 1 << 30  # so far behind the end of a log nobody writes meanwhile: a hole punched there changes nothing
_COPY_BYTES = 1 << 20
_PUNCH_BYTES = 1 << 20  # for so much at once the job may have to wait
_AT_ONCE = 16  # heads copied before the log is shortened
_GZIP_LEVEL = 1  # three times as fast as the usual 6, for a tenth more space
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class RotatedAway(Exception):
    """The bytes that were to be read are no longer kept."""


@dataclass(frozen=True, slots=True)
class State:
    """What `LOG.at` says. All of it in bytes of the whole output."""

    cut: int = 0  # where the log begins: all before it was cut off
    shifted: int = 0  # what the file's first byte is; up to `cut` it is no longer log
    punched: bool = False  # from `shifted` to `cut` there is a hole, unless the file was collapsed
    kept: tuple[int, ...] = ()  # where the rotated files begin; one ends where the next begins, the last at `cut`


class Log:
    """One log. One thread at a time may rotate it, one may compress it, any number may read it."""

    def __init__(self, path: Path) -> None:
        """Take over the log as it was left, also in the middle of a rotation. Raises OSError."""
        self.path = path
        self._lock = threading.Lock()  # held while offsets in the file move
        self._compressed: set[int] = set()
        self._collapses = True  # until the filesystem says otherwise
        self._given_back = 0
        self._state = self._found()

    # reading

    def bounds(self) -> tuple[int, int]:
        """Return the first offset that is kept, and the one behind the last byte."""
        with self._lock:
            state = self._state
            try:
                size = os.stat(self.path).st_size
            except FileNotFoundError:
                size = 0
        return (state.kept[0] if state.kept else state.cut), max(state.cut, state.shifted + size)

    def read(self, offset: int, limit: int) -> bytes | None:
        """Return what the log holds at the offset, b"" at its end, None if that was cut off."""
        with self._lock:
            if offset < self._state.cut:
                return None
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return b""
            try:
                return os.pread(fd, limit, offset - self._state.shifted)
            finally:
                os.close(fd)

    def piece(self, offset: int) -> tuple[int, int] | None:
        """Return where the rotated file that has this byte begins and ends, None if the log has it."""
        state = self._state
        if offset >= state.cut:
            return None
        found = next((piece for piece in pairwise((*state.kept, state.cut)) if piece[0] <= offset < piece[1]), None)
        if found is None:
            raise RotatedAway
        return found

    def open_piece(self, start: int) -> BinaryIO:
        """Open the rotated file that begins there, compressed or not. Raises RotatedAway."""
        plain, compressed = self._names(start)
        try:
            return open(plain, "rb")
        except FileNotFoundError:
            pass  # it was compressed
        try:
            return gzip.open(compressed)  # type: ignore[return-value]  # a GzipFile reads and seeks as one
        except FileNotFoundError:
            raise RotatedAway from None

    # rotating

    def rotate(self, max_bytes: int, keep: int) -> int:
        """Cut off heads of `max_bytes`, in whole blocks. Return how many there were; raise OSError, no byte lost."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            block = os.fstatvfs(fd).f_bsize
            length = max(block, max_bytes // block * block)
            self._give_back(fd)  # what a crash has left
            heads = max(0, self._length(fd) - 1) // length  # something is always left, as a collapse wants it
            if heads:
                behind = (os.fstat(fd).st_size + _FAR) // block * block
                _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, behind, block)  # nothing is cut off that cannot be given back
                self._cut(fd, length, heads, keep)
                self._give_back(fd)
            return heads
        finally:
            os.close(fd)

    def _length(self, fd: int) -> int:
        length = os.fstat(fd).st_size - (self._state.cut - self._state.shifted)
        if length < 0:  # somebody has emptied it: what is written from now on comes at its front
            self._save(replace(self._state, shifted=self._state.cut, punched=False))
        return max(0, length)

    def _cut(self, fd: int, length: int, heads: int, keep: int) -> None:
        """Cut off the heads, each into a file of its own; those that would not be kept into none."""
        if not os.path.exists(self._at):
            self._begin()
        cut, shifted = self._state.cut, self._state.shifted
        starts = [cut + number * length for number in range(heads)]
        skipped, starts = starts[: max(0, heads - keep)], starts[max(0, heads - keep) :][:_AT_ONCE]
        for start in starts:
            self._copy(fd, start - shifted, length, self._names(start)[0])
        self._drop(max(0, len(self._state.kept) + len(starts) - keep))
        for start in skipped:
            _remove(self._names(start)[0])  # a crash may have left it
        end = cut + (len(skipped) + len(starts)) * length
        self._save(State(end, shifted, kept=(*self._state.kept, *starts)))

    def _copy(self, fd: int, at: int, length: int, to: str) -> None:
        part = f"{to}.part"
        try:
            with open(part, "wb", opener=_private) as target:
                end = at + length
                while at < end:
                    if not (sent := os.sendfile(target.fileno(), fd, at, min(_COPY_BYTES, end - at))):
                        raise OSError(errno.EIO, "the log was cut short meanwhile", os.fspath(self.path))
                    at += sent
                os.fdatasync(target.fileno())
            os.replace(part, to)
        except OSError:
            _remove(part)
            raise

    def _drop(self, number: int) -> None:
        """Remove the oldest rotated files."""
        with self._lock:  # so that none of them is compressed meanwhile
            starts, kept = self._state.kept[:number], self._state.kept[number:]
            self._state = replace(self._state, kept=kept)
        for start in starts:
            plain, compressed = self._names(start)
            for name in (
                f"{compressed}.part",
                plain,
                compressed,
            ):  # as long as one of the last two is there, it is kept
                _remove(name)
        self._compressed.difference_update(starts)

    def _give_back(self, fd: int) -> None:
        """Give the space of what was cut off back to the filesystem, and move the rest to the front."""
        state = self._state
        head = state.cut - state.shifted
        if head == self._given_back or os.fstat(fd).st_size <= head:
            return
        for at in range(self._given_back, head, _PUNCH_BYTES):
            _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, at, min(_PUNCH_BYTES, head - at))
        self._given_back = head
        if not self._collapses:
            return
        self._save(replace(state, punched=True))
        os.fdatasync(fd)  # or the collapse writes all of this to disk while the job waits
        with self._lock:
            try:
                _fallocate(fd, _COLLAPSE_RANGE, 0, head)
            except OSError:
                self._collapses = False  # the hole stays, and grows
                return
            self._state = replace(state, shifted=state.cut)
            self._given_back = 0

    # compressing

    def to_compress(self) -> list[int]:
        """Return where the rotated files begin that are not compressed."""
        return [start for start in self._state.kept if start not in self._compressed]

    def compress(self, start: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """Compress a rotated file, as a whole or, when `stopped` meanwhile, not at all. Raises OSError."""
        plain, compressed = self._names(start)
        part = f"{compressed}.part"
        try:
            with open(plain, "rb") as source, open(part, "wb", opener=_private) as target:
                with gzip.GzipFile("", "wb", _GZIP_LEVEL, target, mtime=0) as packed:
                    while (chunk := source.read(_COPY_BYTES)) and not stopped():
                        packed.write(chunk)
                target.flush()
                os.fdatasync(target.fileno())
        except FileNotFoundError:  # that is done, or it is no longer kept
            self._compressed.add(start)
            return
        except OSError:
            _remove(part)
            raise
        with self._lock:
            if chunk or start not in self._state.kept:
                _remove(part)
                return
            os.replace(part, compressed)
            self._compressed.add(start)
        os.unlink(plain)

    # what is on disk

    @property
    def _at(self) -> str:
        return f"{self.path}.at"

    def _names(self, start: int) -> tuple[str, str]:
        plain = f"{self.path}.{start:020d}"  # sorted by name they are in order
        return plain, f"{plain}.gz"

    def _save(self, state: State) -> None:
        part = f"{self._at}.part"
        with open(part, "w", opener=_private) as file:
            json.dump(asdict(state), file)
            file.flush()
            os.fdatasync(file.fileno())
        os.replace(part, self._at)
        with self._lock:
            self._state = state

    def _found(self) -> State:
        try:
            with open(self._at, encoding="utf-8") as file:
                found = json.load(file)
            state = State(int(found["cut"]), int(found["shifted"]), bool(found["punched"]), tuple(found["kept"]))
        except FileNotFoundError:
            return State()
        except (ValueError, TypeError, KeyError):  # not written by us: as if it were not there
            os.replace(self._at, f"{self._at}.damaged")
            return State()
        while state.kept and not any(map(os.path.exists, self._names(state.kept[0]))):
            state = replace(state, kept=state.kept[1:])
        if state.punched and not _begins_with_hole(self.path):
            state = replace(state, shifted=state.cut)
        return replace(state, punched=False)

    def _begin(self) -> None:
        """Write `LOG.at` for the first time. If it is gone and rotated files are there, number on from their end."""
        end = 0
        for path in self.path.parent.glob(f"{self.path.name}.{'[0-9]' * 20}*"):
            start, _, suffix = path.name.removeprefix(f"{self.path.name}.").partition(".")
            if suffix in ("", "gz"):
                with self.open_piece(int(start)) as file:
                    end = max(end, int(start) + file.seek(0, io.SEEK_END))
        self._save(State(cut=end, shifted=end))


def _begins_with_hole(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return os.lseek(file.fileno(), 0, os.SEEK_DATA) > 0
    except OSError:  # there is no file, or nothing in it
        return False


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, f"fallocate: {os.strerror(number)}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass  # that is what was wanted
