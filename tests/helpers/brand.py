"""Finds every process that descends from one that a test has started, by other means than harnessd's own.

The brand is a number in the soft limit of RLIMIT_MSGQUEUE: fork and execve hand it on, and neither setsid nor `env -i`
nor the death of all parents takes it away.
"""

from __future__ import annotations

import os
import random
import resource
import signal
from contextlib import suppress


class Brand:
    """A number that no other test of this host wears."""

    def __init__(self) -> None:
        hard = resource.getrlimit(resource.RLIMIT_MSGQUEUE)[1]
        most = 1 << 40 if hard == resource.RLIM_INFINITY else hard
        self._number = random.SystemRandom().randrange(1, most)

    def wear(self) -> None:
        """Brand this process; for `preexec_fn`."""
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (self._number, resource.getrlimit(resource.RLIMIT_MSGQUEUE)[1]))

    def members(self) -> list[int]:
        """Return the pids of the live processes that wear it."""
        return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and self._is_worn_by(int(entry))]

    def kill(self) -> None:
        for pid in self.members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _is_worn_by(self, pid: int) -> bool:
        try:
            return resource.prlimit(pid, resource.RLIMIT_MSGQUEUE)[0] == self._number and is_alive(pid)
        except (ProcessLookupError, PermissionError):
            return False


def is_alive(pid: int) -> bool:
    """Return whether there is such a process, and it is no zombie: one has no thread but the first."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
            return fields[0] not in b"ZX" or int(fields[17]) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False
