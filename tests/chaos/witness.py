"""What a process of a job notes of itself, outside of all that harnessd keeps. Standard library only.

A fact is a line of JSON in `<folder>/<job>.facts`, appended with one write(2). Its time `t` is the boot clock's, which
every process of the host shares, and is taken before the write: no fact is later than what it tells of.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

FOLDER = "CHAOS_FACTS"  # the variable that names the folder
SEED = "CHAOS_SEED"


def now() -> float:
    """Return seconds of the boot clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def checksum(status: Any) -> int:
    return zlib.crc32(json.dumps(status, sort_keys=True).encode())


class Facts:
    """A file of facts. Usable from every thread and forked child."""

    def __init__(self, folder: str, name: str, **common: Any) -> None:
        self._fd = os.open(f"{folder}/{name}.facts", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._common = common

    def note(self, fact: str, **data: Any) -> None:
        line = json.dumps({"f": fact, "t": round(now(), 6), **self._common, **data}, separators=(",", ":"))
        os.write(self._fd, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self._fd)


class Witness:
    """One run of a job, as it sees itself. All processes of the run hold its lock as long as one of them lives."""

    def __init__(self, job: str) -> None:
        folder = os.environ[FOLDER]
        self.run = int(os.path.basename(os.environ["HARNESS_JOURNAL"]).partition(".")[0])
        self.chance = random.Random(f"{os.environ[SEED]}/{job}/{self.run}")
        self._facts = Facts(folder, job, run=self.run)
        lock = os.open(f"{folder}/{job}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        os.set_inheritable(lock, True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.note("twice")
        self.note("start")

    def note(self, fact: str, **data: Any) -> None:
        self._facts.note(fact, pid=os.getpid(), **data)

    def read(self, message: dict[str, Any]) -> None:
        self.note("read", id=message["id"], cmd=message["cmd"], data=message["data"], sent=message["time"])

    def leave(self, code: int) -> int:
        """Note the exit code that was chosen, and return it."""
        self.note("exit", code=code)
        return code

    def crash(self) -> NoReturn:
        """End in one of the ways in which programs end that are broken."""
        way = self.chance.randrange(4)
        if way == 0:
            sys.exit(self.leave(self.chance.randrange(3, 100)))
        if way == 1:
            os._exit(self.leave(self.chance.randrange(3, 100)))
        if way == 2:
            self.leave(1)
            raise RuntimeError("chaos")
        self.note("exit", signal=int(signal.SIGUSR1))
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("a signal did not end the process")


class Voice:
    """One sequence of statuses: those of a thread or of a process of the run. `send` returns whether it was written."""

    def __init__(self, witness: Witness, send: Callable[[dict[str, Any]], bool]) -> None:
        self._witness = witness
        self._send = send
        self._name = f"{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
        self._count = 0

    def say(self, **more: Any) -> None:
        self._count += 1
        status = {"w": self._name, "n": self._count, **more}
        written = self._send(status)
        self._witness.note("said" if written else "refused", w=self._name, n=self._count, sum=checksum(status))
