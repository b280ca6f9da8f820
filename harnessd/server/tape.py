"""Reads a journal: what a run said, from an offset on, once.

The offset is stored in the transaction of the rows that were read, so a tape opened at the stored offset reads exactly
what is not yet stored. Whatever is in the file becomes lines or torn lines. Nothing is ever cut off the file: a run
appends to it all the while. What is stored is given back to the filesystem as a hole.

`Line` is a tuple because making one is a third of the work of reading one.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import time
from itertools import count
from math import isinf
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harnessd.wire import is_deep

Kind = Literal["status", "ack", "error", "torn", "gap"]

MAX_LINE_BYTES = 1 << 20  # a longer line is torn
TORN_BYTES = 64 << 10  # of a torn line are kept
HOLE_BYTES = 64 << 10  # space is given back in such pieces, so that the call is rare
UNNUMBERED = 1 << 40  # where the numbers of lines without one begin; their offset is added
_LATEST_S = 253_402_300_800  # the year 10000: no ISO time goes further
_RESYNCS = 16

_OUR_LINES = re.compile(
    r'^\{"seq":(\d{1,12}),"t":(\d{1,11}\.\d{1,9}),"(status|error|ack(?=":\d{1,18}\}\n))":(.*)\}\n',
    re.ASCII | re.MULTILINE,
)
_START = b'{"seq":'
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2  # fallocate(2)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Line(NamedTuple):
    """One thing that a run said. `text` is the JSON of the value, or as it stood there if the line is torn."""

    run: int
    seq: int
    at_us: int
    kind: Kind
    text: str


class Tape:
    """One journal. `offset` is the next byte to read, `lines` how many lines there were before it.

    With `counts_lines` the lines are numbered here, whatever number they bear: what a foreign program writes.
    """

    def __init__(self, path: Path, run: int, *, offset: int = 0, lines: int = 0, counts_lines: bool = False) -> None:
        """Open the journal; raise OSError when that cannot be done."""
        self.run = run
        self.offset = offset
        self.lines = lines
        self.cuts = 0  # how often the file was cut to nothing
        self._counts_lines = counts_lines
        self._path = path
        self._open = -1
        self._fd()
        self._given_back = 0
        self._scanned = 0
        self._is_new = True

    def read(self, limit_bytes: int = 1 << 20, final: bool = False) -> list[Line]:
        """Return lines of about the next `limit_bytes`, at least one line; none only if there is none to read now.

        A line that has not ended is left for later, unless this is `final`. Raise OSError when the file cannot be read.
        """
        self.notice_cut()
        if self._is_new:
            self._skip_hole()
        lines: list[Line] = []
        before = -1
        while not lines and self.offset != before:  # a piece may be all empty lines
            before = self.offset
            lines = self._piece(min(limit_bytes, MAX_LINE_BYTES), final)
        return lines

    def notice_cut(self) -> None:
        """Begin anew where somebody wrote with > in place of >>. Raise OSError when the file cannot be looked at."""
        if os.fstat(self._fd()).st_size < self.offset:
            self.offset = self._scanned = self._given_back = 0
            self.cuts += 1

    def _piece(self, limit_bytes: int, final: bool) -> list[Line]:
        data = os.pread(self._fd(), limit_bytes, self.offset)
        end = data.rfind(b"\n") + 1
        if not end and len(data) == limit_bytes:
            data = os.pread(self._fd(), MAX_LINE_BYTES + 1, self.offset)
            end = data.find(b"\n") + 1
        if not end and len(data) > MAX_LINE_BYTES:
            return self._overlong(data, final)
        if not end and final:
            end = len(data)
        piece = data[:end]
        lines = self._ours(piece)
        if lines is None:
            lines = self._parse(piece)
        self.offset += end
        return lines

    def rewind(self, offset: int, lines: int) -> None:
        """Go back to what is stored: what was read since then could not be."""
        self.offset, self.lines, self._scanned = offset, lines, 0

    def give_back(self, upto: int) -> None:
        """Give the whole blocks before `upto`, which must be stored, back to the filesystem."""
        end = min(upto, self.offset) // HOLE_BYTES * HOLE_BYTES
        if end > self._given_back and self._open >= 0:  # of a journal that ended, the file goes soon
            # A filesystem without holes keeps the space until the journal is removed, and counts it as unread.
            mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
            if _libc.fallocate(self._fd(), mode, self._given_back, end - self._given_back) == 0:
                self._given_back = end

    def backlog_bytes(self) -> int:
        """Return how many bytes were written and not read."""
        return max(0, os.fstat(self._fd()).st_size - self.offset)

    def close(self) -> None:
        """Give the descriptor back. A tape that is used again opens the journal anew."""
        if self._open >= 0:
            os.close(self._open)
            self._open = -1

    def _fd(self) -> int:
        if self._open < 0:
            self._open = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        return self._open

    def _ours(self, data: bytes) -> list[Line] | None:
        """Return the lines of a piece in which every one is as our own writer writes it, else None."""
        try:
            found = _OUR_LINES.findall(data.decode())
            if len(found) != data.count(b"\n") + (data[-1:] not in (b"", b"\n")):
                return None
            run, numbers = self.run, count(self.lines + 1)
            lines = [
                Line(run, next(numbers) if self._counts_lines else int(seq), int(float(at) * 1e6 + 0.5), kind, text)
                for seq, at, kind, text in found
                if _scan(text, 0)[1] == len(text) and not is_deep(text)
            ]
        except _NO_RECORD:
            return None
        if len(lines) != len(found):
            return None
        self.lines += len(lines)
        return lines

    def _parse(self, data: bytes) -> list[Line]:
        lines: list[Line] = []
        now_us, at = time.time_ns() // 1000, self.offset
        for raw in data.split(b"\n"):
            if raw:
                try:
                    seq, at_us, kind, text = _record(raw, now_us)
                except _NO_RECORD:
                    self._torn(raw, at, now_us, lines)
                else:
                    self._add(lines, at, at_us, kind, text, seq)
            at += len(raw) + 1
        return lines

    def _torn(self, raw: bytes, at: int, now_us: int, lines: list[Line]) -> None:
        """Add a line that is no record as a torn one, and the record that is glued behind it if there is one.

        What it is glued to may be whole, too, and only lack the newline for which there was no room."""
        where = len(raw)
        for _ in range(_RESYNCS):
            where = raw.rfind(_START, 1, where + len(_START) - 1)
            if where < 0:
                break
            try:
                glued = _record(raw[where:], now_us)
            except _NO_RECORD:
                continue
            try:
                first = _record(raw[:where], now_us)
            except _NO_RECORD:
                first = (-1, now_us, "torn", _bounded(raw[:where]))
            for offset, (seq, at_us, kind, text) in ((0, first), (where, glued)):
                self._add(lines, at + offset, at_us, kind, text, seq)
            return
        self._add(lines, at, now_us, "torn", _bounded(raw), -1)

    def _add(self, lines: list[Line], at: int, at_us: int, kind: Kind, text: str, seq: int) -> None:
        self.lines += 1
        number = self.lines if self._counts_lines else at + UNNUMBERED if seq < 0 else seq
        lines.append(Line(self.run, number, at_us, kind, text))

    def _overlong(self, data: bytes, final: bool) -> list[Line]:
        """Skip a line of more than MAX_LINE_BYTES, once it has ended."""
        at = max(self._scanned, self.offset + len(data))
        while piece := os.pread(self._fd(), MAX_LINE_BYTES, at):
            newline = piece.find(b"\n")
            at += len(piece) if newline < 0 else newline + 1
            if newline >= 0:
                break
        else:
            self._scanned = at
            if not final:
                return []
        lines: list[Line] = []
        self._add(lines, self.offset, time.time_ns() // 1000, "torn", _bounded(data), -1)
        self.offset = at
        return lines

    def _skip_hole(self) -> None:
        """Go past space given back before: the offset is behind it, unless the database that had it is lost."""
        self._is_new = False
        try:
            self.offset = os.lseek(self._fd(), self.offset, os.SEEK_DATA)
        except OSError:
            pass  # nothing is written behind the offset yet


def _record(raw: bytes, now_us: int) -> tuple[int, int, Kind, str]:
    """Return number (-1: none), time, kind and JSON text of a line; raise one of _NO_RECORD for a torn one."""
    text = raw.decode().strip()
    line, end = _scan(text, 0)
    if not isinstance(line, dict) or end != len(text):
        raise ValueError("no JSON object, or something behind it")
    kind = next((kind for kind in _KINDS if kind in line), None)
    if kind is None or (kind == "ack" and not _is_id(line["ack"])):
        raise ValueError("no status, error or acknowledged command")
    seq: Any = line.get("seq")
    at: Any = line.get("t")
    if type(seq) is not int or not 0 <= seq < UNNUMBERED:
        seq = -1
    at_us = int(at * 1e6 + 0.5) if type(at) in (int, float) and 0 <= at < _LATEST_S else now_us
    said = json.dumps(line[kind], separators=(",", ":"), allow_nan=False)
    if is_deep(said):
        raise ValueError("nested too deep")
    return seq, at_us, kind, said


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**18


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise ValueError(f"{text[:20]} is past the range of a double: nobody could be told it as JSON")
    return value


def _bounded(raw: bytes) -> str:
    return raw[:TORN_BYTES].decode("utf-8", "backslashreplace")


_KINDS: tuple[Kind, ...] = ("status", "ack", "error")
_NO_RECORD = (ValueError, StopIteration, RecursionError)  # not of this form, no JSON, or nested too deep
_decoder = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)
_scan = _decoder.scan_once  # type: ignore[attr-defined]  # what raw_decode calls: (text, index) -> (value, end)
