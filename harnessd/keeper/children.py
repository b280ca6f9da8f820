"""The table of runs: which live, which are being ended, and how those ended that nobody has acknowledged yet."""

from __future__ import annotations

import math
import os
import resource
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace

from harnessd import tree
from harnessd.keeper.cgroup import Cell
from harnessd.keeper.say import say
from harnessd.wire import ExitRecord, Frame, RunSpec

_POLITE = (signal.SIGTERM, signal.SIGCONT)  # SIGCONT, since a stopped process would never see the SIGTERM
_PROBE_S = 0.01  # how soon to look again for what is left of a run; doubling up to the next
_PROBE_MAX_S = 0.2
_REAP_S = 0.001  # until those are reaped that have ended
_LOOK_AGAIN_S = 1.0  # when it is not possible to look


@dataclass(slots=True)
class Child:
    """A run that has processes."""

    spec: RunSpec
    pid: int
    started_at: float  # wall clock
    started_mono: float
    began_ticks: int  # since boot
    start_ticks: int  # of its process, which may be older: it may have been forked ahead
    mailbox: int  # the server's end
    pulse: int
    cell: Cell | None = None
    limits: dict[str, str] = field(default_factory=dict)  # how each is enforced: "cgroup", "rlimit" or "none"
    exit: ExitRecord | None = None  # of its first process, while others of its tree live on
    kill_at: float = math.inf  # when SIGTERM has had its time
    probe_at: float = math.inf
    probe_s: float = _PROBE_S
    leftover: int = 0
    untouchable: bool = False  # it has become another user's, through a setuid program
    end_note: Frame = field(default_factory=dict)  # of the server that had it ended, for the next one

    def to_frame(self) -> Frame:
        return {
            "run": self.spec.run,
            "job": self.spec.job,
            "mark": self.spec.mark,
            "pid": self.pid,
            "start_ticks": self.start_ticks,
            "began_ticks": self.began_ticks,
            "started_at": self.started_at,
            "journal": self.spec.journal,
            "limits": self.limits,
            "end_note": self.end_note,
        }


class Children:
    """Runs by their id; exit records until they are acknowledged."""

    def __init__(self) -> None:
        self.live: dict[int, Child] = {}
        self.exits: dict[int, ExitRecord] = {}
        self._by_pid: dict[int, Child] = {}

    def add(self, child: Child) -> None:
        self.live[child.spec.run] = child
        self._by_pid[child.pid] = child

    def reaped(self, pid: int, status: int, usage: resource.struct_rusage) -> bool:
        """Note the end of a child of the keeper's. Return False for one that is no run's first process."""
        child = self._by_pid.pop(pid, None)
        if child is None:
            return False
        child.exit = _record(child, status, usage)
        child.probe_at = 0.0  # at once, as nothing may be left
        return True

    def note_end(self, run: int, note: Frame) -> None:
        """Keep what the server notes of the run's end, which it may not know of yet."""
        if run in self.live:
            self.live[run].end_note = note
        elif run in self.exits:
            self.exits[run] = replace(self.exits[run], end_note=note)

    def end(self, run: int, grace_s: float) -> None:
        """Send SIGTERM to the run's whole tree, and SIGKILL to what is left of it after the grace."""
        child = self.live[run]
        now = time.monotonic()
        first = child.kill_at == math.inf
        child.kill_at = min(child.kill_at, now + max(0.0, grace_s))
        child.probe_at, child.probe_s = min(child.probe_at, now + _PROBE_S), _PROBE_S
        if first and grace_s > 0:
            self.signal(run, _POLITE)
        elif child.kill_at <= now:
            self._kill(child)

    def _kill(self, child: Child) -> None:
        if child.cell:
            child.cell.kill()
        self.signal(child.spec.run, (signal.SIGKILL,))  # and what has left the cgroup

    def signal(self, run: int, signals: tuple[signal.Signals, ...], *, whole_tree: bool = True) -> None:
        """Send the signals to the run's processes, or to its first alone."""
        child = self.live[run]
        pids: set[int] = set()
        if whole_tree:
            nested = signals != _POLITE or child.exit is not None  # a harness ends its own runs while it lives
            with suppress(OSError):  # no descriptor is left to look with; what is left over is found later
                pids.update(tree.members({child.spec.mark}, nested=nested).get(child.spec.mark, ()))
        if child.exit is None:  # not reaped yet, so the pid is its own; just forked, it may not wear the mark yet
            pids.discard(child.pid)
            _signal_first(child, signals)
        for pid in pids:
            tree.send(child.spec.mark, pid, signals)

    def due(self) -> float:
        """Return the monotonic time at which `settle` has something to do; infinity when it has nothing."""
        return min((child.probe_at for child in self.live.values()), default=math.inf)

    def settle(self) -> list[Child]:
        """Do what is due: kill what outlived its grace. Return the runs of which nothing is left any more."""
        now = time.monotonic()
        due = [child for child in self.live.values() if child.probe_at <= now]
        if not due:
            return []
        try:
            alive = tree.members({child.spec.mark for child in due})
        except OSError as error:  # no descriptor is left to look with
            say("error", "cannot look for what is left of runs", error=error)
            for child in due:
                child.probe_at = now + _LOOK_AGAIN_S
            return []
        sure = not _is_one_to_reap()
        return [child for child in due if self._settle_one(child, _alive(child, alive), now, sure)]

    def _settle_one(self, child: Child, alive: list[int], now: float, sure: bool) -> bool:
        if child.exit and not alive:
            if not (sure or child.cell):
                child.probe_at = now + _REAP_S
                return False
            del self.live[child.spec.run]
            oom = bool(child.cell and child.cell.oom_kills())
            self.exits[child.spec.run] = replace(child.exit, oom=oom, end_note=child.end_note)
            return True
        if child.exit and not child.leftover:
            child.leftover = len(alive)
            child.exit = replace(child.exit, leftover=child.leftover)
        if child.exit and child.kill_at == math.inf:
            self.end(child.spec.run, child.spec.kill_grace)
        elif child.kill_at <= now:
            self._kill(child)
        child.probe_s = min(child.probe_s * 2, _PROBE_MAX_S)
        child.probe_at = now + child.probe_s
        if child.kill_at > now:
            child.probe_at = min(child.probe_at, child.kill_at)
        return False


def _signal_first(child: Child, signals: tuple[signal.Signals, ...]) -> None:
    try:
        for number in signals:
            os.kill(child.pid, number)
    except PermissionError:
        if not child.untouchable:
            child.untouchable = True
            say("error", "cannot signal the job: it runs as another user", job=child.spec.job, pid=child.pid)


def _alive(child: Child, marked: dict[int, list[int]]) -> list[int]:
    pids = marked.get(child.spec.mark, [])
    return sorted({*pids, *child.cell.pids()}) if child.cell else pids


def _is_one_to_reap() -> bool:
    """Return whether a child of this process waits to be reaped.

    A process that forks another and ends while all are looked at hides that one: it is not reaped yet, as only this
    thread reaps.
    """
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _record(child: Child, status: int, usage: resource.struct_rusage) -> ExitRecord:
    ended_mono = time.monotonic()
    ended_at = time.time()
    return ExitRecord(
        run=child.spec.run,
        job=child.spec.job,
        pid=child.pid,
        code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        core=os.WCOREDUMP(status),
        at=ended_at,
        wall_s=ended_at - child.started_at,
        mono_s=ended_mono - child.started_mono,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=usage.ru_maxrss * 1024,
        leftover=0,
    )
