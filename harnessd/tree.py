"""Which processes belong to a run, however they came to be, and how to signal them.

A run's processes wear a mark: a random number in the soft limit of RLIMIT_LOCKS, which the kernel has ignored since
2.4.25 and still hands on through fork and execve. A parent is lost when a process daemonises, a session with setsid, an
environment with `env -i`; the mark stays. It needs no cgroup, no privilege and nothing from the job.

A run may be a harness itself. What its runs wear they wear above the outer mark, which is then their hard limit: so the
inner numbers are the smaller ones.
"""

from __future__ import annotations

import os
import resource
import secrets
import signal
import time
from collections.abc import Callable, Container

_RLIMIT_LOCKS = 10  # asm-generic/resource.h; Python has no name for what Linux no longer uses
_MARK_BIT = 1 << 61
_STAT_BYTES = 4096  # more than there can be
_PF_EXITING = 4  # include/linux/sched.h
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


def new_mark() -> int:
    """Return a mark that no other run on this host wears."""
    outer = next(filter(is_mark, reversed(_worn_by(0))), 2 * _MARK_BIT)
    return _MARK_BIT + secrets.randbelow(outer - _MARK_BIT)


def is_mark(number: int) -> bool:
    """Return whether a run may wear it: what others wear, no limit for one, must never be taken for a mark."""
    return number > 0 and bool(number & _MARK_BIT)


def worn() -> int:
    """Return what this process wears."""
    return resource.getrlimit(_RLIMIT_LOCKS)[0]


def wear_beneath() -> None:
    """Have what this process will mark wear the mark that it wears itself, too: it is a harness in a run."""
    mark, beneath = resource.getrlimit(_RLIMIT_LOCKS)
    if is_mark(mark) and not is_mark(beneath):
        resource.setrlimit(_RLIMIT_LOCKS, (mark, mark))


def wear(mark: int) -> None:
    """Mark this process and all that will descend from it."""
    resource.setrlimit(_RLIMIT_LOCKS, (mark, resource.getrlimit(_RLIMIT_LOCKS)[1]))


def put_on(mark: int, pid: int) -> bool:
    """Mark another process, and what will descend from it. Return False if it has ended, or become somebody else."""
    try:
        resource.prlimit(pid, _RLIMIT_LOCKS, (mark, resource.prlimit(pid, _RLIMIT_LOCKS)[1]))
    except (ProcessLookupError, PermissionError):
        return False
    return True


def members(marks: Container[int], *, nested: bool = True) -> dict[int, list[int]]:
    """Return the live processes that wear one of the marks, beneath another too if they are `nested`: mark -> pids."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            pid = int(entry)
            for mark in set(_worn_by(pid)) if nested else _worn_by(pid)[:1]:
                if mark in marks and is_mark(mark) and not _is_zombie(pid):
                    found.setdefault(mark, []).append(pid)
    return found


def send(mark: int, pid: int, signals: tuple[signal.Signals, ...]) -> bool:
    """Send the signals if the process wears the mark. Return False when it is gone or may not be signalled."""
    return _send_if(lambda: mark in _worn_by(pid), pid, signals)


def end_all(marks: Container[int], deadline_s: float = 5.0) -> None:
    """Send SIGKILL to all that wear one of the marks until none is left, or the time is over."""
    deadline = time.monotonic() + deadline_s
    while (left := members(marks)) and time.monotonic() < deadline:
        for mark, pids in left.items():
            for pid in pids:
                send(mark, pid, (signal.SIGKILL,))
        time.sleep(0.005)


def end(pid: int, ticks: int) -> bool:
    """Send SIGKILL to the process that started then. Return False when it is gone or may not be signalled."""
    return _send_if(lambda: not is_over(pid, ticks), pid, (signal.SIGKILL,))


def start_ticks(pid: int) -> int:
    """Return when the process started, in clock ticks since boot: with the pid, its identity. 0 when it is gone."""
    fields = stat(pid)
    return int(fields[19]) if fields else 0


def ticks_now() -> int:
    """Return the time in clock ticks since boot."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_A_SECOND)


def age_s(ticks: int) -> float:
    """Return the age of what began then, by the kernel's clock, whatever was done to the wall clock."""
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / TICKS_A_SECOND)


def is_over(pid: int, ticks: int) -> bool:
    """Return whether the process that started then has ended, or is about to: its descriptors may be closed."""
    fields = stat(pid)
    return not fields or int(fields[19]) != ticks or fields[0] in "ZX" or bool(int(fields[6]) & _PF_EXITING)


def _send_if(is_it: Callable[[], bool], pid: int, signals: tuple[signal.Signals, ...]) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not is_it():  # the pid was given to another process meanwhile
            return False
        for number in signals:
            signal.pidfd_send_signal(pidfd, number)
        return True
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(pidfd)


def _worn_by(pid: int) -> tuple[int, ...]:
    """Return the mark that the process wears, or what else its limit is, and the one beneath it; 0 is this process."""
    try:
        return resource.prlimit(pid, _RLIMIT_LOCKS)
    except ProcessLookupError:
        return ()
    except PermissionError:  # of another user, and this root may not do all: containers lack CAP_SYS_RESOURCE
        return _shown_limits(pid)


def _shown_limits(pid: int) -> tuple[int, ...]:
    """Return the limits from what everybody may read, which takes the kernel ten times as long."""
    try:
        with open(f"/proc/{pid}/limits", "rb") as file:
            shown = next(line for line in file if line.startswith(b"Max file locks")).split()[3:5]
    except (OSError, StopIteration):
        return ()
    return tuple(int(limit) if limit.isdigit() else resource.RLIM_INFINITY for limit in shown)


def _is_zombie(pid: int) -> bool:
    """Return whether it has ended. A process whose first thread alone has ended looks so, and has others."""
    fields = stat(pid)
    return not fields or (fields[0] in "ZX" and int(fields[17]) <= 1)


def stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on, see proc_pid_stat(5); none when the process is gone."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, _STAT_BYTES).rpartition(b") ")[2].decode("ascii").split()  # a name may hold anything
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return []
