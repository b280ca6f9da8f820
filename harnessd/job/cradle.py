"""What a job extends, and its only view of the harness.

All of it is passive: it starts no thread, installs no signal handler and registers nothing. A job that is not harnessed
(in its own unit test, say) gets no messages, and its statuses go nowhere.
"""

from __future__ import annotations

import copy
import math
import os
import select
import time
from collections.abc import Awaitable, Callable, MutableSequence
from typing import Any

from harnessd.errors import WireError
from harnessd.job.journal import Journal
from harnessd.job.pulse import POLLS, WAITING
from harnessd.states import Command
from harnessd.wire import MAX_PACKET_BYTES, merged, unpack_command


class Cradle:
    """Extend it and implement `run`; `get_msg`, `set_status` and `get_config` are there to be called."""

    _harness: Mailbox  # of the process; bound by the harness before the job is made

    def run(self, *args: str) -> int | Awaitable[int | None] | None:
        """The job itself, plain or `async def`. Returning None or 0 is success, another int is the exit code."""
        raise TypeError(f"cannot run {type(self).__name__}: it has no run() method")

    def get_msg(self, timeout: float | None = 0) -> dict[str, Any] | None:
        """Return the next command, or None when none came within `timeout` seconds (0: do not wait; None: for ever).

        A command is `{"cmd": Command, "data": ..., "id": int, "time": epoch seconds}`. Reading it acknowledges it.
        """
        harness = self._harness
        harness.page[POLLS] += 1
        try:
            if timeout == 0 and not harness.poll(0):
                return None
        except RuntimeError:
            pass  # another thread is in poll(2) with the same object; receive() brings its own
        return harness.receive(timeout)

    def set_status(self, status: Any = None) -> bool:
        """Report a status: anything that JSON can hold, and datetimes, Decimals, numpy scalars and dataclasses.

        Return whether it was written. It never raises and never waits; a status over 256 KiB is refused.
        """
        return self._harness.set_status(status)

    def get_config(self) -> dict[str, Any]:
        """Return a copy of the job's config: its file's, what was set since, and every CONFIG that was read."""
        return copy.deepcopy(self._harness.config)


class Mailbox:
    """The reading end of a run's commands, and what belongs to it. Without a descriptor it is that of no harness."""

    def __init__(
        self,
        fd: int = -1,
        page: MutableSequence[int] | memoryview | None = None,
        journal: Journal | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._fd = fd
        self.page = page if page is not None else [0, 0]
        self._journal = journal
        self.config = config or {}
        self._identity = _identity(fd)
        self._pid = os.getpid()
        self._calls: set[tuple[int, object]] = set()  # that wait, with their processes: a fork copies those of others
        self.poll = _poller(fd)

    def set_status(self, status: Any) -> bool:
        return self._journal.status(status) if self._journal else False

    def receive(self, timeout: float | None) -> dict[str, Any] | None:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        # When the job has closed the mailbox, its number may stand for a file of the job's own: nothing to read there.
        poll = _poller(self._fd if _identity(self._fd) == self._identity else -1)
        call = os.getpid(), object()
        try:  # a signal handler of the job's may raise at any place
            self._calls.add(call)
            if call[0] == self._pid or not self.page[WAITING]:
                self.page[WAITING] = call[0]
            while True:
                ready = poll(_milliseconds(deadline))
                if ready and (message := self._take()):
                    return message
                if ready and ready[0][1] & ~select.POLLIN:  # the harness is gone: nothing will come
                    time.sleep(_seconds(deadline))
                if not time.monotonic() < deadline:  # also for a timeout that is no number
                    return None
        finally:
            self._calls.discard(call)
            if call[0] == self._pid or self.page[WAITING] == call[0]:  # a child may have been killed while it waited
                self.page[WAITING] = 0
                while self._waits(call[0]) and not self.page[WAITING]:  # another thread, which may leave meanwhile
                    self.page[WAITING] = call[0]
                    if not self._waits(call[0]):
                        self.page[WAITING] = 0

    def _waits(self, pid: int) -> bool:
        return any(of == pid for of, _ in list(self._calls))

    def _take(self) -> dict[str, Any] | None:
        try:
            packet = os.read(self._fd, MAX_PACKET_BYTES)
            message = unpack_command(packet) if packet else None
        except (OSError, WireError):
            return None  # another thread or child was quicker, or the packet is none of the harness's
        if message is None:
            return None
        if message["cmd"] is Command.CONFIG and isinstance(message["data"], dict):
            self.config = merged(self.config, message["data"])
        if self._journal:
            self._journal.ack(message["id"])
        return message


def _poller(fd: int) -> Callable[[float], list[tuple[int, int]]]:
    poll = select.poll()
    if fd >= 0:
        poll.register(fd, select.POLLIN)
    return poll.poll


def _identity(fd: int) -> tuple[int, int]:
    try:
        stat = os.fstat(fd)
    except OSError:
        return -1, -1
    return stat.st_ino, stat.st_dev


def _seconds(deadline: float) -> float:
    """Return what is left until then, a day at the most, since no call sleeps longer at once."""
    return min(max(0.0, deadline - time.monotonic()), 86400.0)


def _milliseconds(deadline: float) -> int:
    return math.ceil(_seconds(deadline) * 1000)


Cradle._harness = Mailbox()
