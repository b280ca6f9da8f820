"""Cgroups (version 2): what a run may use of the host as a whole, and an end to all of it at once.

The keeper makes a folder of its own in the cgroup that it was started in, and moves itself into a leaf of it, as a
cgroup that hands controllers on may hold no process (cgroups(7), "no internal processes"):

    <where it was started>/harnessd-PID-TICKS/keeper      the keeper and the server
                                             /run-ID      a run that has a limit which only a cgroup can enforce

Other runs have none: they are told by their marks (tree.py), and joining a cgroup is not cheap. Where a fork takes
1 ms, the write to cgroup.procs waits for a grace period of the kernel's, 5 ms on an idle host. Controllers that are not
there (another hierarchy has them, or they were not delegated) are left out, one by one; a limit without its controller
is enforced by setrlimit(2) if that can be, or not at all, and the run's `limits` tell which.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from harnessd import tree
from harnessd.wire import RunSpec

CONTROLLERS = {"memory": "memory", "cpu": "cpu", "pids": "pids"}  # a limit and the controller that enforces it
_FALLBACK = {"memory": "as"}  # RLIMIT_NPROC is no match for pids: it counts whatever the user runs on the whole host
_PERIOD_US = 100_000
_RETRY_S = 0.2  # how soon to try again to remove a cgroup; doubling up to the next
_RETRY_MAX_S = 60.0
_PREFIX = "harnessd-"


@dataclass(frozen=True, slots=True)
class Cell:
    """The cgroup of a run."""

    path: str

    def open(self) -> int:
        """Return the descriptor to which a process writes "0" to come in."""
        return os.open(f"{self.path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def pids(self) -> list[int]:
        """Return the processes in it."""
        with suppress(OSError):  # removed, or so nearly that it cannot be read
            return [int(line) for line in _read(self.path, "cgroup.procs").split()]
        return []

    def kill(self) -> bool:
        """Send SIGKILL to all that is in it, at once. Return False where the kernel cannot (before 5.14)."""
        try:
            _write(self.path, "cgroup.kill", "1")
        except OSError:
            return False
        return True

    def oom_kills(self) -> int:
        """Return how many of its processes the kernel has killed for want of memory."""
        with suppress(OSError, ValueError, KeyError):  # without the controller nothing is known
            return int(dict(line.split() for line in _read(self.path, "memory.events").splitlines())["oom_kill"])
        return 0


class Cgroups:
    """The keeper's own folder in the tree. Without one (`home` is "") nothing is enforced by cgroups."""

    def __init__(self) -> None:
        self.home = ""
        self.controllers: frozenset[str] = frozenset()
        self._base = ""
        self._emptied: list[str] = []  # to be removed once the kernel has let go of the last process
        self._retry_s = _RETRY_S
        self._retry_at = float("inf")

    def settle_in(self, server_pid: int) -> None:
        """Move this process and its server into a leaf, remove what a dead keeper has left, enable the controllers."""
        self._base = _own()
        if not self._base:
            return
        home = f"{self._base}/{_PREFIX}{os.getpid()}-{tree.start_ticks(os.getpid())}"
        try:
            self._emptied += _sweep(self._base)
            os.makedirs(f"{home}/keeper")
            _write(home, "keeper/cgroup.procs", "0")
            with suppress(ProcessLookupError):  # it has ended at once
                _write(home, "keeper/cgroup.procs", str(server_pid))
        except OSError:  # not ours to write: the usual case outside of a service that is delegated
            _remove(home)
            return
        self.home = home
        self.controllers = frozenset(name for name in CONTROLLERS.values() if _enable(name, self._base, home))
        self.tidy()

    def confine(self, spec: RunSpec) -> tuple[RunSpec, Cell | None, dict[str, str]]:
        """Make the run's cgroup if it wants one. Return the spec with what rlimits have to enforce in its place, the
        cgroup, and how each limit is enforced: "cgroup", "rlimit" or "none".
        """
        how = dict.fromkeys(spec.limits, "rlimit")
        if not spec.caps:
            return spec, None, how
        cell = self._make(spec.run) if self.home else None
        limits = dict(spec.limits)
        for name, value in spec.caps.items():
            if cell and CONTROLLERS.get(name) in self.controllers and _cap(cell, name, value):
                how[name] = "cgroup"
            elif name in _FALLBACK:
                limits[_FALLBACK[name]] = int(value)
                how[name] = "rlimit"
            else:
                how[name] = "none"
        return replace(spec, limits=limits), cell, how

    def _make(self, run: int) -> Cell | None:
        cell = Cell(f"{self.home}/run-{run}")
        try:
            os.mkdir(cell.path)
        except OSError:  # cgroup.max.descendants, say; the run's limits tell that it has none
            return None
        return cell

    def remove(self, cell: Cell) -> None:
        """Remove the cgroup of a run of which nothing is left."""
        self._emptied.append(cell.path)
        self._retry_s = _RETRY_S
        self.tidy()

    def due(self) -> float:
        """Return the monotonic time at which `tidy` has something to do."""
        return self._retry_at

    def tidy(self) -> None:
        """Remove what can be; a process that has just ended keeps its cgroup for a moment."""
        self._emptied = [path for path in self._emptied if not _remove(path)]
        self._retry_at = time.monotonic() + self._retry_s if self._emptied else float("inf")
        self._retry_s = min(self._retry_s * 2, _RETRY_MAX_S)

    def leave(self) -> None:
        """Remove all of it, if this process may go back to where it was started; else systemd does."""
        if not self.home:
            return
        self.tidy()
        for name in self.controllers:
            for folder in (self.home, self._base):
                with suppress(OSError):  # another keeper's cgroups have it
                    _write(folder, "cgroup.subtree_control", f"-{name}")
        with suppress(OSError):  # the place to go back to hands controllers on
            _write(self._base, "cgroup.procs", "0")
            _remove(self.home)


def _own() -> str:
    """Return the folder of this process's cgroup; "" where no version 2 is mounted, or not this part of it."""
    try:
        with open("/proc/self/cgroup", "rb") as file:
            path = next(os.fsdecode(line[3:].rstrip(b"\n")) for line in file if line.startswith(b"0::"))
        with open("/proc/self/mountinfo", "rb") as file:  # some other mount may have a name in any encoding
            mounts = [os.fsdecode(line).split() for line in file if b" - cgroup2 " in line]
    except (OSError, StopIteration):  # a kernel without
        return ""
    for _, _, _, root, point, *_ in mounts:
        root = root.rstrip("/")
        if path == root or path.startswith(f"{root}/"):
            return (point + path[len(root) :]).rstrip("/")
    return ""


def _sweep(base: str) -> list[str]:
    """End what is left in the cgroups of keepers that were killed. Return their folders."""
    found = []
    for name in os.listdir(base):
        pid, _, ticks = name.removeprefix(_PREFIX).partition("-")
        if name.startswith(_PREFIX) and pid.isdecimal() and ticks.isdecimal() and tree.is_over(int(pid), int(ticks)):
            home = f"{base}/{name}"
            with suppress(OSError):  # it goes away by itself, or belongs to another user
                for run in os.listdir(home):
                    if run.startswith("run-"):
                        Cell(f"{home}/{run}").kill()
            found.append(home)
    return found


def _remove(path: str) -> bool:
    """Remove a cgroup and all below it. Return False when something is in one of them."""
    try:
        with os.scandir(path) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for folder in below:
            _remove(folder)
        os.rmdir(path)
    except OSError as error:
        return error.errno != errno.EBUSY  # otherwise it is gone, or not ours to remove
    return True


def _enable(controller: str, base: str, home: str) -> bool:
    """Have the controller at work in the cgroups of the runs. Return False when it cannot be."""
    try:
        for folder in (base, home):
            if controller not in _read(folder, "cgroup.subtree_control").split():
                _write(folder, "cgroup.subtree_control", f"+{controller}")
    except OSError:  # not in this hierarchy, not delegated, or there are others in the same cgroup
        return False
    return True


def _cap(cell: Cell, name: str, value: float) -> bool:
    try:
        for file, text in _settings(name, value).items():
            _write(cell.path, file, text)
    except OSError:
        return False
    if name == "memory":  # as a whole or not at all; both are missing from some kernels
        for file, text in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
            with suppress(OSError):
                _write(cell.path, file, text)
    return True


def _settings(name: str, value: float) -> Mapping[str, str]:
    if name == "cpu":
        return {"cpu.max": f"{max(1000, round(value * _PERIOD_US))} {_PERIOD_US}"}  # below 1 ms the kernel refuses
    return {f"{name}.max": str(int(value))}


def _read(folder: str, name: str) -> str:
    with open(f"{folder}/{name}") as file:
        return file.read()


def _write(folder: str, name: str, text: str) -> None:
    fd = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
