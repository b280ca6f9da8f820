"""What the supervisor holds of a job beside its policy: the live run, the unread commands, what it last said."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import termios
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harnessd import tree
from harnessd.errors import MailboxClosed, MailboxFull, TooLarge
from harnessd.job.pulse import POLLS, WAITING
from harnessd.server import policy
from harnessd.server.definition import Definition
from harnessd.server.host import LiveRun
from harnessd.server.procstat import Sampler
from harnessd.server.records import JobRow
from harnessd.server.shapes import Ending, Pulse
from harnessd.server.tape import Line
from harnessd.server.timespan import iso
from harnessd.server.watchdog import Checked, Watch
from harnessd.states import Command, ExitReason, State

_OUT_OF_MEMORY = "killed by the kernel: it used more memory than it may, or than there is"


@dataclass(frozen=True, slots=True)
class Exit:
    """How a run ended."""

    run: int
    code: int | None
    signal: int | None
    reason: ExitReason
    at: float  # epoch seconds
    error: str | None = None  # what the job said of it, as JSON if it is no text

    @property
    def in_words(self) -> str:
        if self.signal is not None:
            return f"{self.reason}: signal {_signal_name(self.signal)}"
        return f"{self.reason}: exit code {self.code}" if self.code is not None else str(self.reason)

    def shown(self) -> Ending:
        return {
            "run": self.run,
            "code": self.code,
            "signal": _signal_name(self.signal) if self.signal else None,
            "reason": self.reason,
            "at": iso(int(self.at * 1e6)),
            "error": self.error or (_OUT_OF_MEMORY if self.reason is ExitReason.OOM else None),
        }


@dataclass(frozen=True, slots=True)
class Unread:
    """A command that the run has not read yet; `read` becomes True when it has, False when it ended before."""

    id: int
    command: Command
    data: Any
    actor: str
    at_us: int
    read: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def tell(self, read: bool) -> None:
        if not self.read.done():
            self.read.set_result(read)


class Queued(NamedTuple):
    """A command that is stored, and not that it was read."""

    command: Command
    data: Any
    run: int | None  # None: it waited for a run that was not a process yet


@dataclass(slots=True)
class Recalled:
    """What the database knows that the keeper does not tell, by the names of the jobs."""

    statuses: dict[str, Line] = field(default_factory=dict)
    exits: dict[str, Exit] = field(default_factory=dict)
    unread: dict[str, dict[int, Queued]] = field(default_factory=dict)


class Live:
    """A run that has processes."""

    def __init__(self, info: LiveRun) -> None:
        self.info = info
        self.run = info.run
        self.unread: dict[int, Unread] = {}
        self.unfollowed: tuple[int, int] | None = None  # offset and lines, until its journal is read
        self.error: str | None = None
        self.ended = False  # its last words are still being read
        self.adopted = False  # it was begun by an earlier server
        self.owed = False  # and that may not have sent the commands that waited for it
        self.sampler = Sampler(info.pid, info.start_ticks, info.uptime_s())
        self.watch = Watch()
        self._polls = 0
        self._polled_at = time.monotonic()

    def send(self, job: str, packet: bytes, state: State) -> None:
        """Put a command into the mailbox, unless the run has ended. Raises MailboxFull, MailboxClosed, TooLarge."""
        if self.ended:
            return
        try:
            written = os.write(self.info.mailbox, packet)
        except BlockingIOError:
            raise MailboxFull(
                f"cannot send to {job!r}: its mailbox is full, {len(self.unread)} commands are unread",
                job=job,
                state=state,
            ) from None
        except (BrokenPipeError, ConnectionResetError):
            if tree.is_over(self.info.pid, self.info.start_ticks):
                return  # the host will say so, and that this was not read
            raise MailboxClosed(f"cannot send to {job!r}: it has closed its mailbox", job=job, state=state) from None
        except OSError as error:
            raise TooLarge(f"cannot send {len(packet)} bytes to {job!r}: {error.strerror}", job=job) from None
        assert written == len(packet)

    def holds_unread(self) -> bool:
        """Return whether commands wait in the mailbox."""
        return any(fcntl.ioctl(self.info.mailbox, termios.TIOCOUTQ, bytes(4)))

    def acknowledged(self) -> set[int]:
        """Return the commands that the run has read by its journal, of which nothing is stored yet."""
        with suppress(OSError):
            return {int(number) for number in re.findall(rb'"ack":\s*(\d+)', Path(self.info.journal).read_bytes())}
        return set()

    def beat(self) -> tuple[int, bool]:
        """Return how often the run has polled, and whether it waits in a poll now."""
        return self.info.page[POLLS], bool(self.info.page[WAITING])

    def is_stopped(self) -> bool:
        """Return whether a signal or a debugger has stopped the run's first process."""
        fields = tree.stat(self.info.pid)
        return bool(fields) and fields[0] in "Tt"

    def look_at_pulse(self) -> None:
        """Note whether the run has polled since the last look."""
        polls = self.info.page[POLLS]
        if polls != self._polls or self.info.page[WAITING]:
            self._polls, self._polled_at = polls, time.monotonic()

    def pulse(self) -> Pulse:
        """Return how often the run polled and how long ago; `age_s` is None for one that never did."""
        self.look_at_pulse()
        waiting = bool(self.info.page[WAITING])
        age_s = round(time.monotonic() - self._polled_at, 3) if self._polls else None
        return {"polls": self._polls, "age_s": age_s, "waiting": waiting}

    def close(self) -> None:
        if self.info.mailbox >= 0:
            os.close(self.info.mailbox)
        self.info.page.release()


class Entry:
    """A job. Only the supervisor changes one."""

    def __init__(self, definition: Definition, overrides: Mapping[str, Any]) -> None:
        self.definition = definition
        self.overrides = dict(overrides)
        self.job = policy.Job()
        self.live: Live | None = None
        self.spawning = 0  # the run that is being forked
        self.requested = False  # the host was told to
        self.outbox: list[tuple[Unread, bytes]] = []  # for the run that is being forked
        self.timer: asyncio.TimerHandle | None = None
        self.last_status: Line | None = None
        self.last_exit: Exit | None = None
        self.checked: Checked | None = None  # None: nothing checks it, or no run of it
        self.withdrawn = False  # its file is gone: it is forgotten once it has no run
        self.exits: Counter[ExitReason] = Counter()  # since this server knows it, as are
        self.commands: Counter[str] = Counter()  # queued, done, refused; those that were queued: read, unread
        self.problems: list[str] = []  # its file is broken; what runs is as it was before
        self._gone: asyncio.Future[None] | None = None
        self._spawned: asyncio.Future[None] | None = None

    @property
    def name(self) -> str:
        return self.definition.name

    def status_age_s(self) -> float | None:
        """Return how long ago the last status was said, None when there is none. Not less than 0: clocks are set."""
        return max(0.0, time.time() - self.last_status.at_us / 1e6) if self.last_status else None

    def gone(self) -> asyncio.Future[None]:
        """Return what is done when nothing is left of the run."""
        if self._gone is None or self._gone.done():
            self._gone = asyncio.get_running_loop().create_future()
        return self._gone

    def told_gone(self) -> None:
        if self._gone and not self._gone.done():
            self._gone.set_result(None)

    def spawned(self) -> asyncio.Future[None]:
        """Return what is done when the run is a process, or could not become one."""
        if self._spawned is None or self._spawned.done():
            self._spawned = asyncio.get_running_loop().create_future()
        return self._spawned

    def told_spawned(self) -> None:
        if self._spawned and not self._spawned.done():
            self._spawned.set_result(None)

    def row(self, now_us: int) -> JobRow:
        """Return what is kept of the job."""
        return JobRow(
            name=self.name,
            spec=json.dumps(self.definition.shown, default=str),
            digest=self.definition.digest,
            want=self.job.want,
            state=self.job.state,
            changed_us=now_us,
            overrides=json.dumps(self.overrides),
            restarts=self.job.restarts,
            ever_up=self.job.proven,
            failures=self.job.failures,
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name of its own
        return f"SIG{number}"
