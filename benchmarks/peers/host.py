"""What /proc says of the processes that a tool has started: they are known by a variable of their environment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

VARIABLE = "BENCHMARK_OF"
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


def processes(token: str) -> dict[int, str]:
    """Return the command lines of the processes that have the token in their environment, by pid."""
    wanted = f"{VARIABLE}={token}".encode()
    found = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if wanted in Path("/proc", pid, "environ").read_bytes().split(b"\0"):
                found[int(pid)] = (
                    Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
    found.pop(os.getpid(), None)
    return found


def pss_bytes(pids: Iterable[int]) -> int:
    """Return the memory of the processes, what they share divided by those that share it."""
    total = 0
    for pid in pids:
        with suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:")) * 1024
    return total


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU time that the processes have used."""
    ticks = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_A_SECOND


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float, what: str, step_s: float = 0.002) -> None:
    """Poll until it holds. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(step_s)


def end_all(token: str) -> None:
    """Kill whatever has the token until nothing has it."""
    deadline = time.monotonic() + 30
    while (left := processes(token)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
