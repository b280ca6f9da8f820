"""The worker that every tool runs: what a job commonly imports, one line in a file when it is ready, then nothing.

Run as a script for the tools that start programs; by `job.py` for harnessd, by `fork.py` as a limit. `WORKER_FOLDER`
holds the file `ready`; a file `NAME.exit` in it has the worker named `leaver` exit with the code that it contains; the
worker named `talker` keeps the number of lines that it has written in `NAME.said.PID`.
"""

import argparse  # noqa: F401
import asyncio  # noqa: F401
import json
import logging  # noqa: F401
import os
import subprocess  # noqa: F401
import sys
import time
from pathlib import Path

LINE_BYTES = 100
LINES_A_MB = 1_000_000 // LINE_BYTES
STEADY_S = 12
STEADY_MB_A_SECOND = 15


def announce(name):
    """Append the worker's name, pid and the monotonic time to the file of those that are ready."""
    line = f"{name} {os.getpid()} {time.monotonic()}\n".encode()
    fd = os.open(os.environ["WORKER_FOLDER"] + "/ready", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, line)
    os.close(fd)


def chatter(megabytes):
    """Write so many MB in numbered lines to stdout as fast as it goes, then some at a pace, as a tool may look at a log
    by the second. Say in a file how long the first took and how many lines there are."""
    began = time.monotonic()
    for first in range(0, megabytes * LINES_A_MB, 100):
        say(first)
    spent_s, due = time.monotonic() - began, time.monotonic()
    lines = megabytes * LINES_A_MB
    for first in range(lines, lines + STEADY_S * STEADY_MB_A_SECOND * LINES_A_MB, 100):
        say(first)
        due += 100 / LINES_A_MB / STEADY_MB_A_SECOND
        time.sleep(max(0.0, due - time.monotonic()))
    lines += STEADY_S * STEADY_MB_A_SECOND * LINES_A_MB
    part = Path(os.environ["WORKER_FOLDER"], "chattered.part")
    part.write_text(json.dumps({"seconds": spent_s, "lines": lines}))
    part.rename(part.with_suffix(""))


def say(first):
    """Write a hundred lines, numbered from the first on."""
    view = memoryview(b"".join(b"%0*d\n" % (LINE_BYTES - 1, number) for number in range(first, first + 100)))
    while view:
        view = view[os.write(1, view) :]


def work(name, wait):
    """Be ready, then wait; the worker named `talker` says a numbered line each time."""
    kind, _, amount = name.partition("-")
    if kind == "pandas":
        import pandas  # noqa: F401
    announce(name)
    if kind == "chatter":
        chatter(int(amount))
    told = Path(os.environ["WORKER_FOLDER"], f"{name}.exit")
    said = os.open(told.with_suffix(f".said.{os.getpid()}"), os.O_WRONLY | os.O_CREAT) if kind == "talker" else -1
    number = 0
    while True:
        wait(0.05 if kind in ("talker", "leaver") else 1.0)
        if kind == "talker":
            os.write(1, b"said %d by %d\n" % (number, os.getpid()))
            number += 1
            os.pwrite(said, b"%d" % number, 0)
        elif kind == "leaver" and told.exists() and (code := told.read_text()):
            told.unlink()
            return int(code)


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], time.sleep))
