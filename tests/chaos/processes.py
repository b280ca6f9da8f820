"""The process table, read by other means than harnessd's own, as far as its marks allow."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chaos.witness import Facts
from helpers.brand import Brand

_RLIMIT_LOCKS, _MARK_BIT = 10, 1 << 61  # what a run's processes wear
SCAN_S = 0.3
_SIZE_EVERY = 7  # scans


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    ticks: int  # when it started
    mark: int  # of its run; 0 for none

    def is_alive(self) -> bool:
        """Return whether it lives; an orphan has another parent than before, and is the same process."""
        found = read(self.pid)
        return found is not None and found.ticks == self.ticks


def read(pid: int) -> Process | None:
    """Return the process; None when it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
        mark = resource.prlimit(pid, _RLIMIT_LOCKS)[0]
    except (OSError, PermissionError):
        return None
    if not fields or fields[0] in b"ZX":
        return None
    return Process(pid, int(fields[1]), int(fields[19]), mark if mark > 0 and mark & _MARK_BIT else 0)


class Table:
    """All live processes that have come from the daemon."""

    def __init__(self, brand: Brand, runtime: Path, keeper: Callable[[], int | None]) -> None:
        self._brand = brand
        self._runtime = runtime
        self._keeper = keeper
        self._runs: dict[int, tuple[str, int]] = {}  # mark -> job and run, by the names of the journals

    def scan(self) -> list[Process]:
        return [process for pid in self._brand.members() if (process := read(pid))]

    def job_of(self, mark: int) -> tuple[str, int] | None:
        if mark not in self._runs:
            for path in self._runtime.glob("*/*.jsonl"):
                run, worn, job = path.name.removesuffix(".jsonl").split(".", 2)
                self._runs[int(worn, 16)] = (job, int(run))
        return self._runs.get(mark)

    def by_job(self) -> dict[str, list[Process]]:
        """Return the processes of each job, the oldest first."""
        found: dict[str, list[Process]] = {}
        for process in sorted(self.scan(), key=lambda process: (process.ticks, process.pid)):
            # The keeper wears a run's mark for the moment in which it forks it.
            if process.mark and process.pid != self._keeper() and (job := self.job_of(process.mark)):
                found.setdefault(job[0], []).append(process)
        return found

    def server(self) -> Process | None:
        return self._beside_keeper("server")

    def zygote(self) -> Process | None:
        return self._beside_keeper("zygote")

    def spare(self) -> Process | None:
        return self._beside_keeper("spare")

    def _beside_keeper(self, role: str) -> Process | None:
        keeper = self._keeper()
        beside = (process for process in self.scan() if keeper and process.parent == keeper and not process.mark)
        return next((process for process in beside if _role(process.pid) == role), None)


def _role(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        shown = file.read()
        return "server" if b"harnessd.daemon" in shown else "spare" if b"harnessd: spare" in shown else "zygote"
    return ""


class Watch:
    """Looks at the table all the time: for a job that has two runs at once, and for what keeper and server take."""

    def __init__(self, table: Table, keeper: Callable[[], int | None], facts: Facts) -> None:
        self._table = table
        self._keeper = keeper
        self._facts = facts
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch")
        self.scans = 0

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while not self._over.wait(SCAN_S):
            self.scans += 1
            self._look_for_two()
            if self.scans % _SIZE_EVERY == 0:
                self._measure()

    def _look_for_two(self) -> None:
        for job, processes in self._table.by_job().items():
            first = next(process for process in processes)
            others = [process for process in processes if process.mark != first.mark]
            # Seen one after the other; both lived at once if the first one still does.
            if others and any(read(process.pid) == process for process in processes if process.mark == first.mark):
                self._facts.note("two-runs", job=job, pids=[process.pid for process in processes])

    def _measure(self) -> None:
        keeper = self._keeper()
        for role, process in (("keeper", read(keeper) if keeper else None), ("server", self._table.server())):
            with suppress(OSError, ValueError, StopIteration):  # it ends just now, and has no such line any more
                if process:
                    fds, anon_kb = len(os.listdir(f"/proc/{process.pid}/fd")), _anonymous_kb(process.pid)
                    life = f"{process.pid} since {process.ticks}"
                    self._facts.note("size", role=role, life=life, fds=fds, anon_kb=anon_kb)


def _anonymous_kb(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:"))
