"""From a job's set_status to a row in SQLite, through a real daemon: how many a second, how soon, and at what price to
the job while the disk is busy.

    python benchmarks/ingest.py [--seconds 60] [--jobs 100] [--rate 1000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from store import FIRST_RUN, RAW_ROWS, raw_s, raw_tables

JOBS = '''
import json, os, time
from harnessd import Cradle

class Steady(Cradle):
    """So many statuses a second, in twenty lots."""
    def run(self):
        lot = self.get_config()["rate"] // 20
        number = 0
        due = time.monotonic()
        while True:
            for _ in range(lot):
                number += 1
                self.set_status({"number": number, "pnl": 1234.5, "symbol": "SPX"})
            due += 0.05
            time.sleep(max(0.0, due - time.monotonic()))

class Slow(Cradle):
    """Ten statuses a second, each with its own time."""
    def run(self):
        while True:
            self.set_status({"monotonic": time.monotonic()})
            time.sleep(0.1)

class Timed(Cradle):
    """What its own calls take."""
    def run(self):
        took_us = []
        end = time.monotonic() + self.get_config()["seconds"]
        while time.monotonic() < end:
            since = time.perf_counter_ns()
            self.set_status({"number": 1, "pnl": 1234.5, "symbol": "SPX"})
            took_us.append((time.perf_counter_ns() - since) / 1000)
            time.sleep(0.0005)
        took_us.sort()
        with open(os.environ["RESULT"], "w") as file:
            json.dump(took_us, file)
'''


class Daemon:
    """A daemon on a directory of its own."""

    def __init__(self, folder: Path, jobs: dict[str, str], settings: str = "") -> None:
        self.folder = folder
        (folder / "jobs").mkdir(parents=True)
        (folder / "jobs.py").write_text(JOBS)
        (folder / "harnessd.toml").write_text(f'state_dir = "state"\n{settings}\n[http]\nport = 0\n')
        for name, text in jobs.items():
            (folder / "jobs" / f"{name}.toml").write_text(text)
        self.database = folder / "state" / "harnessd.db"

    def __enter__(self) -> Daemon:
        command = [sys.executable, "-c", "from harnessd.cli import main; main()", "serve", str(self.folder)]
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(command, stderr=log)
        until(lambda: "serving" in (self.folder / "log").read_text(), 30)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def query(self, sql: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return connection.execute(sql).fetchall()


def until(condition: Callable[[], object], deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("it did not come to pass in time")
        time.sleep(0.01)


def stored_a_second(folder: Path, jobs: int, rate: int, seconds: float) -> tuple[float, Path]:
    text = f'entrypoint = "../jobs.py:Steady"\n[config]\nrate = {rate}\n'
    with Daemon(folder, {f"j{n}": text for n in range(jobs)}, "[history]\nmax_rate = 1e9") as daemon:
        until(lambda: daemon.query("SELECT max(id) FROM status")[0][0], 30)
        since, before = time.monotonic(), daemon.query("SELECT count(*) FROM status")[0][0]
        time.sleep(seconds)
        rows = int(str(daemon.query("SELECT count(*) FROM status")[0][0])) - int(str(before))
        return rows / (time.monotonic() - since), daemon.database


def raw_a_second(folder: Path, like: Path, rows: int) -> float:
    """Return how many of the same rows a second store.py's raw executemany writes, in the order in which they came."""
    with closing(sqlite3.connect(like)) as source:
        taken = source.execute("SELECT run_id, seq, at_us, status FROM status LIMIT ?", (rows,)).fetchall()
    run_of = {run: number for number, run in enumerate(sorted({run for run, *_ in taken}))}
    made = [(run_of[run] + 1, FIRST_RUN + run_of[run], *rest) for run, *rest in taken]
    with raw_tables(folder / "raw.db", len(run_of)) as connection:
        return len(made) / sum(raw_s(connection, made[at : at + RAW_ROWS]) for at in range(0, len(made), RAW_ROWS))


def visible_after_ms(folder: Path, samples: int = 60) -> list[float]:
    found: dict[float, float] = {}
    with (
        Daemon(folder, {"slow": 'entrypoint = "../jobs.py:Slow"\n'}) as daemon,
        closing(sqlite3.connect(f"file:{daemon.database}?mode=ro", uri=True)) as connection,
    ):
        while len(found) < samples:
            row = connection.execute("SELECT status FROM status ORDER BY id DESC LIMIT 1").fetchone()
            if row:
                said = json.loads(row[0])["monotonic"]
                found.setdefault(said, (time.monotonic() - said) * 1000)
            time.sleep(0.0002)
    return sorted(list(found.values())[1:])


def set_status_us(folder: Path, journal: str, busy: bool, seconds: float = 6) -> list[float]:
    result = folder / "result"
    text = f'entrypoint = "../jobs.py:Timed"\nrestart = "never"\nenv = {{ RESULT = "{result}" }}\n'
    with Daemon(folder, {"timed": f"{text}[config]\nseconds = {seconds}\n"}, f'journal = "{journal}"'):
        disturber = subprocess.Popen([sys.executable, "-c", DISTURB, str(folder / "noise")]) if busy else None
        try:
            until(lambda: result.exists() and result.read_text().endswith("]"), 60)
        finally:
            if disturber:
                disturber.kill()
                disturber.wait()
    return list(json.loads(result.read_text()))


DISTURB = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
while True:
    os.pwrite(fd, os.urandom(8 << 20), 0)
    os.fsync(fd)
"""


def at(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--rate", type=int, default=1000, help="statuses a second of each job")
    given = parser.parse_args()
    print(f"{datetime.now(UTC):%Y-%m-%d}, Linux {platform.release()}, Python {platform.python_version()}, ", end="")
    print(f"{os.cpu_count()} cores, SQLite {sqlite3.sqlite_version}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored, database = stored_a_second(folder / "ingest", given.jobs, given.rate, given.seconds)
        raw = raw_a_second(folder, database, 500_000)
        offered = given.jobs * given.rate
        print("| what | value | beside |\n|---|---|---|")
        print(
            f"| statuses stored a second, {given.jobs} jobs, {given.seconds:g} s, {offered} offered | {stored:,.0f} "
            f"| raw executemany {raw:,.0f}: {stored / raw:.2f} of it |"
        )
        after = visible_after_ms(folder / "visible")
        print(f"| from set_status to a visible row, ms | p50 {at(after, 0.5):.1f}, p99 {at(after, 0.99):.1f} | |")
        for journal in ("memory", "disk"):
            idle = set_status_us(folder / f"{journal}-idle", journal, busy=False)
            busy = set_status_us(folder / f"{journal}-busy", journal, busy=True)
            print(
                f"| set_status, journal in {journal}, disk busy with fsync, µs | p50 {at(busy, 0.5):.1f}, "
                f"p99 {at(busy, 0.99):.0f}, max {busy[-1]:.0f} | idle: p50 {at(idle, 0.5):.1f}, "
                f"p99 {at(idle, 0.99):.0f}, max {idle[-1]:.0f} |"
            )


if __name__ == "__main__":
    main()
