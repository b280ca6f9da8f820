"""The append side of a journal: what a run says, one JSON object a line, one write(2) each.

Why a file and not a queue or a socket: nobody has to be there to take it. The server may be dead, replaced or busy and
the job does not notice; and what was written outlives the job, the server and the keeper. It lies in memory, so that a
busy disk never stalls a job.

Every line has a number, a time (epoch seconds) and one of `status`, `ack` (the id of a command that was read) or
`error` (why the job ended).
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from harnessd.job import pulse
from harnessd.wire import MAX_STATUS_BYTES, is_deep

_MAX_DEPTH = 64
_BLOCK_BYTES = 512  # the unit of st_blocks, see stat(2)


class Journal:
    """Appends lines. Usable from every thread and forked child; nothing in it waits for anybody."""

    def __init__(self, fd: int, pulse_fd: int, max_bytes: int) -> None:
        self._fd = fd
        self._pulse_fd = pulse_fd
        self._max_bytes = max_bytes
        self._identity = _identity(os.fstat(fd))
        self._lead = ""  # a newline after a write that was cut short, so that the next line stands alone
        self._warned = False

    def status(self, value: Any) -> bool:
        """Append a status. Return whether it was written; say once on stderr why not."""
        try:
            text = encode(value)
        except Exception as error:  # out of memory or of stack: the job's own trouble must not become ours to raise
            return self._refuse(repr(error))
        if len(text) > MAX_STATUS_BYTES:
            return self._refuse(f"it has {len(text)} bytes, at most {MAX_STATUS_BYTES} are allowed")
        return self._append("status", text, self._max_bytes)

    def ack(self, id: int) -> None:
        """Append that the command was read, also when the journal is full."""
        self._append("ack", str(id), sys.maxsize)

    def error(self, text: str) -> None:
        """Append why the job ended."""
        self._append("error", json.dumps(text[:4096]), sys.maxsize)

    def _append(self, kind: str, text: str, max_bytes: int) -> bool:
        try:
            now = os.fstat(self._fd)
            if _identity(now) != self._identity:  # closed by the job, and the number is in use for a file of its own
                return self._refuse("the job has closed its journal")
            if now.st_blocks * _BLOCK_BYTES > max_bytes:
                return self._refuse(f"the journal is full, {max_bytes} bytes wait to be stored")
            number = pulse.next_number(self._pulse_fd)
            line = f'{self._lead}{{"seq":{number},"t":{time.time():.6f},"{kind}":{text}}}\n'.encode("ascii")
            written = os.write(self._fd, line)
        except OSError as error:
            return self._refuse(error.strerror or str(error))
        self._lead = "" if written == len(line) else "\n"
        return written >= len(line) - 1 or self._refuse("the disk is full")  # without its newline it is whole as well

    def _refuse(self, why: str) -> bool:
        if not self._warned:
            self._warned = True
            try:
                print(f"harnessd: cannot write the status: {why}", file=sys.stderr, flush=True)
            except (OSError, ValueError, AttributeError):
                pass  # the job's stderr is closed, full or replaced: then there is nobody to tell
        return False


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_ino, stat.st_dev


def encode(value: Any) -> str:
    """Return the value as ASCII JSON, whatever it is: NaN becomes null, what JSON cannot hold becomes its repr."""
    try:
        if not is_deep(text := _encode(value)):
            return text
    except Exception:  # NaN, a cycle, a key or a number JSON cannot hold, a __repr__ that raises: built piece by piece
        pass
    return _encode(_plain(value, ()))


def _known(value: Any) -> Any:
    """Return what stands in JSON for an object of a type that JSON does not know."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(tolist := getattr(value, "tolist", None)):  # numpy's scalars and arrays
        return tolist()
    return repr(value)


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=_known).encode


def _plain(value: Any, above: tuple[int, ...]) -> Any:
    try:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return value if str(value) else None  # str() refuses what has too many digits for JSON too
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if id(value) in above or len(above) > _MAX_DEPTH:
            return repr(value)
        inside = (*above, id(value))
        if isinstance(value, Mapping):
            return {_key(key): _plain(item, inside) for key, item in list(value.items())}
        if isinstance(value, list | tuple):
            return [_plain(item, inside) for item in list(value)]
        return _plain(_known(value), inside)
    except Exception:  # an object of the job's own that fails when it is looked at is no reason to fail the job
        return _failing(value)


def _key(key: Any) -> str:
    try:
        if isinstance(key, str):
            return key
        if key is None or isinstance(key, bool | int | float):
            return json.dumps(key)
        return str(_known(key))
    except Exception:  # as above
        return _failing(key)


def _failing(value: Any) -> str:
    return f"<{type(value).__name__}>"
