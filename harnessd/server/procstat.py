"""What a run's first process uses, seen from outside.

psutil reads three files of a process for this and takes 280 us; of a thousand idle jobs that was most of what the
daemon did. One line of /proc says it all, the identity of the process included (proc_pid_stat(5)).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from harnessd import tree
from harnessd.server.shapes import Process

FRESH_S = 1.0  # figures are at most so old

_MOST_THREADS = 256

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_NAMES = {"R": "running", "S": "sleeping", "D": "disk-sleep", "T": "stopped", "t": "tracing-stop", "Z": "zombie"}


@dataclass(frozen=True, slots=True)
class Figures:
    cpu_percent: float  # of one core, since the figures before; at first since its start
    cpu_s: float  # since its start
    rss_bytes: int
    threads: int
    fds: int
    status: str  # running, sleeping, stopped, zombie, ...; else the kernel's letter


class Sampler:
    """Looks at one process, at most once a second however often it is asked."""

    def __init__(self, pid: int, start_ticks: int, uptime_s: float) -> None:
        self._pid = pid
        self._start_ticks = start_ticks
        self._figures: Figures | None = None
        self._children: int | None = None
        self._at = -FRESH_S
        self._cpu_s = 0.0
        self._since = time.monotonic() - uptime_s

    def sample(self) -> Figures | None:
        """Return figures at most a second old; None when the process is gone."""
        now = time.monotonic()
        if now - self._at >= FRESH_S:
            self._at = now
            self._children = None
            try:
                self._figures = self._look(now)
            except (OSError, IndexError):  # it is gone, or going
                self._figures = None
        return self._figures

    def shown(self) -> Process | None:
        """Return the figures with the number of descendants, those that are orphans left out."""
        figures = self.sample()
        if figures is None:
            return None
        if self._children is None:
            self._children = _count_children(self._pid)
        return {
            "cpu_percent": figures.cpu_percent,
            "rss_bytes": figures.rss_bytes,
            "threads": figures.threads,
            "fds": figures.fds,
            "children": self._children,
            "status": figures.status,
        }

    def _look(self, now: float) -> Figures | None:
        fields = tree.stat(self._pid)
        state, (user, system), threads, started, rss = fields[0], fields[11:13], fields[17], fields[19], fields[21]
        if int(started) != self._start_ticks:
            return None  # another process has the pid by now
        cpu_s = (int(user) + int(system)) / tree.TICKS_A_SECOND
        percent = 100 * (cpu_s - self._cpu_s) / max(0.001, now - self._since)
        self._cpu_s, self._since = cpu_s, now
        return Figures(
            cpu_percent=round(max(0.0, percent), 1),
            cpu_s=cpu_s,
            rss_bytes=int(rss) * _PAGE_BYTES,
            threads=int(threads),
            fds=_count_fds(self._pid),
            status=_NAMES.get(state, state),
        )


def _count_fds(pid: int) -> int:
    """Return how many descriptors the process has: the size of the directory, since Linux 6.2."""
    folder = f"/proc/{pid}/fd"
    return os.stat(folder).st_size or len(os.listdir(folder))


def _count_children(pid: int) -> int:
    """Return how many descend from the process: the kernel's own list, as psutil's reads every process of the host.

    Each thread has a list of its own, and the loop stands still meanwhile: no more than `_MOST_THREADS` are looked at.
    """
    count, room = 0, _MOST_THREADS
    waiting = [pid]
    while waiting and room > 0:
        task = f"/proc/{waiting.pop(0)}/task"
        try:
            for thread in os.listdir(task)[:room]:
                room -= 1
                with open(f"{task}/{thread}/children") as file:
                    waiting += (children := [int(child) for child in file.read().split()])
                    count += len(children)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return count
