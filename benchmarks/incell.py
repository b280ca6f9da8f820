"""What get_msg() and set_status() cost a job, beside the bare system calls below them and a multiprocessing queue.

    python benchmarks/incell.py

All of it is measured inside one real run: a keeper has forked it and a server reads its journal meanwhile. The
candidates take turns, so that what else the machine does falls on all of them alike. A put into a queue returns early
and leaves its work to a thread of the process, so the CPU time of the whole process is told beside that of a call.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import select
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from timeit import Timer
from typing import Any

from harnessd import Cradle, launch

ROUNDS = 25
CALLS = {"get_msg": 20_000, "poll": 20_000, "set_status": 2_000, "write": 2_000, "put": 1_000}
TO_HOLD_US = {"get_msg": 0.8, "set_status": 8.0}
STATUS = {"target_vol": 4.2, "realised": 0.1734, "positions": 12}
LINE = b'{"seq":123456,"t":1700000000.123456,"status":{"target_vol":4.2,"realised":0.1734,"positions":12}}\n'


def machine() -> str:
    """Return what the figures were measured on, and when."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    when = time.strftime("%Y-%m-%d %H:%M")
    return f"{cpu}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, {when}"


class InCell(Cradle):
    """A job that times its own calls and prints the table."""

    def run(self, *args: str) -> int:
        poll = select.poll()
        poll.register(os.pipe()[0], select.POLLIN)
        queue: Any = multiprocessing.Queue()
        ours, theirs = multiprocessing.Pipe()
        multiprocessing.Process(target=_consume, args=(queue, theirs), daemon=True).start()
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            names = {"job": self, "poll": poll, "write": os.write, "fd": file.fileno(), "queue": queue}
            names |= {"status": STATUS, "line": LINE}
            timers = {
                "get_msg": Timer("job.get_msg()", globals=names),
                "poll": Timer("poll.poll(0)", globals=names),
                "set_status": Timer("job.set_status(status)", globals=names),
                "write": Timer("write(fd, line)", globals=names),
                "put": Timer("queue.put(status)", globals=names),
            }
            rounds = [_round(timers, queue, ours) for _ in range(ROUNDS + 1)][1:]  # the first is a warm-up
        queue.put(None)
        if not self.set_status(STATUS):
            sys.exit("the journal was full: set_status was not measured")
        _report(rounds)
        return 0


def _consume(queue: Any, done: Connection) -> None:
    for item in iter(queue.get, None):
        if item == "end of round":
            done.send(item)


def _round(timers: dict[str, Timer], queue: Any, drained: Connection) -> dict[str, tuple[float, float]]:
    """Return the microseconds of a call, and those of CPU that the process spent until all of its work was done."""
    spent_us = {}
    for name, timer in timers.items():
        before_s = time.process_time()
        call_s = timer.timeit(CALLS[name])
        if name == "put":
            queue.put("end of round")
            drained.recv()
        cpu_s = time.process_time() - before_s
        spent_us[name] = (call_s / CALLS[name] * 1e6, cpu_s / CALLS[name] * 1e6)
    return spent_us


def _report(rounds: list[dict[str, tuple[float, float]]]) -> None:
    median = {name: statistics.median(one[name][0] for one in rounds) for name in CALLS}
    best = {name: min(one[name][0] for one in rounds) for name in CALLS}
    cpu = {name: statistics.median(one[name][1] for one in rounds) for name in CALLS}
    rows = [
        ("`get_msg()`, nothing waiting", "get_msg", "poll"),
        ("bare `poll(2)`", "poll", "poll"),
        ("`set_status()`, three fields", "set_status", "write"),
        ("bare `os.write` of the same line to tmpfs", "write", "write"),
        ("`multiprocessing.Queue.put` of the same", "put", "write"),
    ]
    print(f"\n{machine()}; {ROUNDS} rounds\n")
    print("| in the job | median µs | best µs | CPU µs | to the bare call | to hold |")
    print("|---|---:|---:|---:|---:|---:|")
    for label, name, bare in rows:
        to_hold = f"{TO_HOLD_US[name]:g}" if name in TO_HOLD_US else ""
        figures = f"{median[name]:.2f} | {best[name]:.2f} | {cpu[name]:.2f} | {median[name] / median[bare]:.2f}"
        print(f"| {label} | {figures} | {to_hold} |")
    print(f"\nA status takes {cpu['set_status'] / cpu['put']:.2f} of the job's CPU that a put into a queue takes.")


if __name__ == "__main__":
    launch(InCell(), config={"http": {"port": 0}}, exit=True)
