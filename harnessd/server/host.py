"""Where runs live, as the supervisor sees it. The keeper on this machine is one such place."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, Self

from harnessd import tree
from harnessd.states import ExitReason, Want
from harnessd.wire import ExitRecord, Frame, RunSpec


@dataclass(frozen=True, slots=True)
class EndNote:
    """Why a run is ended, and whether its job is still wanted: the host tells it to a server that does not know."""

    reason: ExitReason
    want: Want

    def to_frame(self) -> Frame:
        return {"reason": self.reason, "want": self.want}

    @classmethod
    def of(cls, run: LiveRun | ExitRecord) -> Self | None:
        """Return what was noted of the run; None if no server has ended it."""
        note = run.end_note
        return cls(ExitReason(note["reason"]), Want(note["want"])) if note else None


@dataclass(frozen=True, slots=True)
class LiveRun:
    """A run that has processes. (pid, start_ticks) is its identity."""

    run: int
    job: str
    mark: int
    pid: int
    start_ticks: int  # of the process, which may have been forked ahead
    began_ticks: int
    started_at: float  # wall clock, epoch seconds
    journal: str
    mailbox: int  # descriptor, ours to close
    page: memoryview  # its pulse
    limits: dict[str, str] = field(default_factory=dict)  # how each is enforced: "cgroup", "rlimit" or "none"
    end_note: Frame = field(default_factory=dict)

    def uptime_s(self) -> float:
        """Return the age of the run by the kernel's clock, whatever was done to the wall clock."""
        return tree.age_s(self.began_ticks)


@dataclass(slots=True)
class Inventory:
    """What a host holds when a server comes to it."""

    live: list[LiveRun] = field(default_factory=list)
    exits: list[ExitRecord] = field(default_factory=list)
    stored: dict[str, list[int]] = field(default_factory=dict)


class Host(Protocol):
    """Spawns, signals and ends runs, and says how they ended."""

    on_exit: Callable[[ExitRecord], None]

    async def spawn(self, spec: RunSpec) -> LiveRun:
        """Return the run once it is a process; raise SpawnFailed."""

    def end(self, run: int, grace_s: float | None, note: EndNote) -> None:
        """Have the run's tree ended: SIGTERM, and SIGKILL after the grace. `on_exit` tells when nothing is left.

        Without a grace, only the note is new: the run is being ended already.

        One that was asked for and is no process yet is ended as soon as it is one."""

    def signal(self, run: int, number: signal.Signals) -> None:
        """Send a signal to the run's whole tree."""

    def acknowledge(self, run: int) -> None:
        """Let the host forget how the run ended."""
