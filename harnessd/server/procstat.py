"""What a run's first process uses, as psutil sees it from outside."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil

FRESH_S = 1.0  # figures are at most so old


@dataclass(frozen=True, slots=True)
class Figures:
    cpu_percent: float  # of one core, since the figures before; at first since its start
    rss_bytes: int
    threads: int
    fds: int
    children: int  # and grandchildren, as long as they are not orphans
    status: str  # running, sleeping, stopped, zombie, ... as psutil names it

    def shown(self) -> dict[str, Any]:
        return asdict(self)


class Sampler:
    """Looks at one process, at most once a second however often it is asked."""

    def __init__(self, pid: int, uptime_s: float) -> None:
        self._process: psutil.Process | None = None
        self._figures: Figures | None = None
        self._at = -FRESH_S
        self._cpu_s = 0.0
        self._since = time.monotonic() - uptime_s
        with suppress(psutil.NoSuchProcess):
            self._process = psutil.Process(pid)

    def sample(self) -> Figures | None:
        """Return figures at most a second old; None when the process is gone."""
        now = time.monotonic()
        if self._process and now - self._at >= FRESH_S:
            self._at = now
            try:
                self._figures = self._look(self._process, now)
            except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                self._figures = None
        return self._figures

    def _look(self, process: psutil.Process, now: float) -> Figures:
        with process.oneshot():
            times = process.cpu_times()
            cpu_s = times.user + times.system
            percent = 100 * (cpu_s - self._cpu_s) / max(0.001, now - self._since)
            self._cpu_s, self._since = cpu_s, now
            return Figures(
                cpu_percent=round(max(0.0, percent), 1),
                rss_bytes=process.memory_info().rss,
                threads=process.num_threads(),
                fds=process.num_fds(),
                children=_count_children(process.pid),
                status=process.status(),
            )


def _count_children(pid: int) -> int:
    """Return how many descend from the process: the kernel's own list, as psutil's reads every process of the host."""
    count = 0
    waiting = [pid]
    while waiting:
        task = f"/proc/{waiting.pop()}/task"
        try:
            for thread in os.listdir(task):
                with open(f"{task}/{thread}/children") as file:
                    waiting += (children := [int(child) for child in file.read().split()])
                    count += len(children)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return count
