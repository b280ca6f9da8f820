"""What travels between the processes, and nothing else.

Three formats, all JSON, because every one of them is met by a person with `strace`, `tail` or a shell script:

- frames between server and keeper: a length of four bytes, a JSON object, and file descriptors beside it (SCM_RIGHTS);
- packets in a mailbox: one command a packet of a SOCK_SEQPACKET socket, so that threads and forked children of a job
  can read from one mailbox and nobody ever gets half a command;
- lines in a journal: one JSON object a line, each appended with one write(2).
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self

from harnessd.errors import WireError
from harnessd.states import Command

PROTOCOL = 3
MAX_FRAME_BYTES = 64 << 20
MAX_FDS = 16  # in one frame; the kernel's own limit is 253 (SCM_MAX_FD)
MAX_STATUS_BYTES = 256 << 10
MAX_STATUS_DEPTH = 200  # of brackets
MAX_PACKET_BYTES = 128 << 10  # below the smallest usual socket buffer, net.core.wmem_default

Frame = dict[str, Any]
_LENGTH = struct.Struct("!I")
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')
_MARKS = re.compile(r"[\[\]{}]")


def pack_frame(frame: Frame) -> bytes:
    """Return the frame as bytes; file descriptors go beside its first byte, their number is in `fds`."""
    body = json.dumps(frame, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Turns what arrives on a stream socket into frames with their file descriptors."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._fds: deque[int] = deque()

    def receive(self, sock: socket.socket) -> bool:
        """Read what is there now. Return False when the peer is gone; BlockingIOError when nothing is there."""
        try:
            # recv_fds ignores its flags (CPython 3.11), and a descriptor must not reach what is executed here
            data, ancillary, _, _ = sock.recvmsg(1 << 16, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return False
        fds = array("i")
        for _, kind, content in ancillary:
            if kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        self.feed(data, fds.tolist())
        return bool(data)

    def feed(self, data: bytes, fds: list[int] | None = None) -> None:
        self._bytes += data
        self._fds.extend(fds or ())

    def close(self) -> None:
        """Close the descriptors that no frame has claimed."""
        while self._fds:
            os.close(self._fds.popleft())

    def next(self) -> tuple[Frame, list[int]] | None:
        """Return the next whole frame and its descriptors, or None; raise WireError for what is no frame."""
        if len(self._bytes) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes)
        if length > MAX_FRAME_BYTES:
            raise WireError(f"cannot read the frame: {length} bytes, at most {MAX_FRAME_BYTES} are allowed")
        end = _LENGTH.size + length
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[_LENGTH.size : end])
        del self._bytes[:end]
        frame = _object(body, "frame")
        wanted = frame.get("fds", 0)
        if not isinstance(wanted, int) or not 0 <= wanted <= len(self._fds):
            raise WireError(f"cannot read the frame: it names {wanted!r} descriptors, {len(self._fds)} came")
        return frame, [self._fds.popleft() for _ in range(wanted)]


def pack_command(cmd: str, data: Any, id: int, time: float) -> bytes:
    """Return one mailbox packet; raise ValueError or TypeError for data that JSON cannot hold."""
    packet = {"cmd": cmd, "data": data, "id": id, "time": time}
    return json.dumps(packet, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def unpack_command(packet: bytes) -> dict[str, Any]:
    """Return the command as `get_msg` hands it to a job; raise WireError for anything else."""
    message = _object(packet, "command")
    try:
        return {
            "cmd": Command(message["cmd"]),
            "data": message.get("data"),
            "id": int(message["id"]),
            "time": float(message["time"]),
        }
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise WireError(f"cannot read the command: {error!r}") from None


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with the changes of a CONFIG laid over it: objects are merged, anything else is replaced."""
    result = dict(config)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


@dataclass(frozen=True, slots=True)
class RunSpec:
    """All that the keeper needs to make one run. With neither entrypoint nor command: the object it was forked with."""

    run: int
    job: str
    mark: int  # worn by every process of the run, see tree.py
    journal: str
    journal_max_bytes: int = 64 << 20
    entrypoint: str = ""  # "module:Class" or "/path/file.py:Class"
    python: str = ""  # another interpreter for the entrypoint
    command: list[str] = field(default_factory=list)
    args: list[str] = field(default_factory=list)
    env: dict[str, str | None] = field(default_factory=dict)  # changes to the keeper's own; None takes one away
    cwd: str = ""
    uid: int | None = None
    gid: int | None = None
    groups: list[int] = field(default_factory=list)
    umask: int | None = None
    nice: int = 0
    limits: dict[str, int] = field(default_factory=dict)  # by the names of setrlimit(2), without RLIMIT_
    caps: dict[str, float] = field(default_factory=dict)  # of the whole run, by a cgroup: memory, cpu (cores), pids
    output: str = ""  # file for stdout and stderr; "": the keeper's own
    errors: str = ""  # file for stderr; "": with stdout
    config: dict[str, Any] = field(default_factory=dict)
    kill_grace: float = 3.0  # seconds between SIGTERM and SIGKILL

    @property
    def is_executed(self) -> bool:
        """Whether another program takes the place of the fork: nothing that is loaded is of use to it."""
        return bool(self.command or self.python)

    def to_frame(self) -> Frame:
        return _fields(self)

    @classmethod
    def from_frame(cls, frame: Frame) -> Self:
        try:
            return cls(**_known(cls, frame))
        except TypeError as error:
            raise WireError(f"cannot read the run's spec: {error}") from None


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How a run ended, kept by the keeper until the server has it stored."""

    run: int
    job: str
    pid: int
    code: int | None  # exit code, None when a signal ended it
    signal: int | None
    core: bool  # a core was dumped
    at: float  # wall clock, epoch seconds
    wall_s: float  # length by the wall clock
    mono_s: float  # length by the monotonic clock
    cpu_s: float  # of the run and its reaped children
    peak_rss_bytes: int
    leftover: int  # processes of its tree that had to be ended after it
    oom: bool = False  # the kernel has killed of it for want of memory
    end_note: dict[str, Any] = field(default_factory=dict)  # of whoever had it ended

    def to_frame(self) -> Frame:
        return _fields(self)

    @classmethod
    def from_frame(cls, frame: Frame) -> Self:
        try:
            return cls(**_known(cls, frame))
        except TypeError as error:
            raise WireError(f"cannot read the exit record: {error}") from None


def _fields(value: RunSpec | ExitRecord) -> Frame:
    """Return the fields by their names, without the copies that dataclasses.asdict makes of what is in them."""
    return {name: getattr(value, name) for name in value.__slots__}


def _known(cls: type, frame: Frame) -> Frame:
    """Leave out what a newer server says: it may replace an older one, while the keeper stays."""
    if not isinstance(frame, dict):
        raise TypeError(f"an object is wanted, not {type(frame).__name__}")
    return {key: value for key, value in frame.items() if key in cls.__slots__}  # type: ignore[attr-defined]


def is_deep(text: str) -> bool:
    """Return whether the JSON is nested deeper than MAX_STATUS_DEPTH: whoever reads it has a stack of some size."""
    if text.count("[") + text.count("{") <= MAX_STATUS_DEPTH:
        return False
    marks = _MARKS.findall(_STRINGS.sub("", text))
    return max(accumulate(1 if mark in "[{" else -1 for mark in marks), default=0) > MAX_STATUS_DEPTH


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"cannot read the {what}: {error}") from None
    if not isinstance(value, dict):
        raise WireError(f"cannot read the {what}: a JSON object is wanted, not {type(value).__name__}")
    return value
