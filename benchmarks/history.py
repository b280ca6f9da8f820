"""A page of 100 rows out of millions, and the status as of a moment: over HTTP and in the database alone.

    python benchmarks/history.py [--rows 1000,10000,100000,1000000] [--large] [--jobs 100] [--folder DIR]
                                 [--asked 200]

The database is made by the store's own tables with plain SQL, as storing ten millions through the store would take
minutes; a folder that has one already is used as it is. The server is the real one, in a process of its own, and each
request asks for another moment, so that no answer is a repetition.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import socket
import sqlite3
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from harnessd.server.definition import Definition
from harnessd.server.history import History
from harnessd.server.policy import Rules
from harnessd.server.records import JobRow, RunStarted
from harnessd.server.store import Store
from harnessd.server.supervisor import Folders, Supervisor
from harnessd.server.timespan import iso
from harnessd.web.app import make_app
from harnessd.web.call import Context
from harnessd.web.guard import GuardPolicy
from harnessd.web.listening import bind
from harnessd.web.serving import HttpServer

BEGAN_US = 1_750_000_000_000_000
STEP_US = 1_000_000  # between two statuses of a job
FIRST_RUN = BEGAN_US // 1000
SHOWN = ("p50", "p95", "worst")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000,10000,100000,1000000", help="sizes of databases, by commas")
    parser.add_argument("--large", action="store_true", help="ten million rows as well")
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--asked", type=int, default=200, help="requests of each kind")
    parser.add_argument("--folder", type=Path, help="where the databases are kept for another time")
    given = parser.parse_args()
    for rows in [int(each) for each in given.rows.split(",")] + [10_000_000] * given.large:
        with tempfile.TemporaryDirectory() as name:
            path = (given.folder or Path(name)) / f"history-{rows}-{given.jobs}.db"
            if not path.exists():
                began = time.perf_counter()
                fill(path, rows, given.jobs)
                print(f"{rows:,} rows of {given.jobs} jobs made in {time.perf_counter() - began:.0f} s")
            print(f"{rows:,} statuses of {given.jobs} jobs, {path.stat().st_size / 1e6:,.0f} MB\n")
            measure(path, rows // given.jobs, given.jobs, given.asked)
        print(flush=True)


def fill(path: Path, rows: int, jobs: int) -> None:
    """Make a database in which every job has said something each second, and got a command each hundred seconds."""
    store = Store.open(path)
    for number in range(jobs):
        store.put(JobRow(job(number), "{}", "", "up", "running", 0))
        store.put(RunStarted(FIRST_RUN + number, job(number), 1, 1, 1, "", BEGAN_US, ""))
    store.flush().result()
    store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        ids = dict(connection.execute("SELECT name, id FROM job"))
        connection.execute("PRAGMA synchronous = off")
        connection.execute("BEGIN")
        for second in range(rows // jobs):
            at_us = BEGAN_US + second * STEP_US
            text = f'{{"target_vol":4.2,"realised":{second % 97 / 97:.4f},"leverage":1.25,"n":{second}}}'
            connection.executemany(
                "INSERT INTO status (job_id, run_id, seq, at_us, status) VALUES (?, ?, ?, ?, ?)",
                ((ids[job(n)], FIRST_RUN + n, second + 1, at_us + n, text) for n in range(jobs)),
            )
            if second % 100 == 0:
                connection.executemany(
                    "INSERT INTO event VALUES (?, ?, ?, ?, ?, 'me', '{}')",
                    (
                        (second * jobs + n + 1, ids[job(n)], FIRST_RUN + n, at_us + n, ("command", "read")[n % 2])
                        for n in range(jobs)
                    ),
                )
        connection.execute("UPDATE run SET status_rows = ?", (rows // jobs,))
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def measure(path: Path, seconds: int, jobs: int, asked: int) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(path, jobs, theirs), daemon=True)
    server.start()
    with httpx.Client(base_url=ours.recv(), timeout=60, trust_env=False) as client:
        client.get("/hb")
        print(f"{'milliseconds over HTTP':<44}" + "".join(f"{each:>9}" for each in SHOWN))
        for title, request in requests(seconds, jobs).items():
            spent = []
            for _ in range(asked):
                where, query = request()
                began = time.perf_counter()
                answer = client.get(where, params=query)
                spent.append((time.perf_counter() - began) * 1000)
                assert answer.status_code == 200, answer.text
            print(f"{title:<44}" + "".join(f"{each:9.2f}" for each in figures(spent)))
        stream_rate(client, jobs)
    server.terminate()
    server.join()


def requests(seconds: int, jobs: int) -> dict[str, Any]:
    """Return what makes each kind of request, of a random job and moment."""
    chance = random.Random(1)

    def any_job() -> str:
        return f"/jobs/{job(chance.randrange(jobs))}"

    def any_time() -> str:
        return iso(BEGAN_US + chance.randrange(seconds) * STEP_US)

    return {
        "status, to compare": lambda: ("/jobs/job-0/status", {}),
        "newest 100 of a job": lambda: (f"{any_job()}/history", {}),
        "100 of a job, before any moment": lambda: (f"{any_job()}/history", {"until": any_time()}),
        "100 of a job, from any moment on": lambda: (f"{any_job()}/history", {"since": any_time(), "order": "asc"}),
        "the same, two fields": lambda: (
            f"{any_job()}/history",
            {"since": any_time(), "order": "asc", "fields": "realised,leverage"},
        ),
        "100 of a run": lambda: ("/jobs/job-3/history", {"run": FIRST_RUN + 3}),
        "100 of all jobs, before any moment": lambda: ("/history", {"until": any_time()}),
        "100 events of all jobs, before any moment": lambda: ("/events", {"until": any_time()}),
        "100 events of a kind, before any moment": lambda: ("/events", {"until": any_time(), "kind": "read"}),
        "60 buckets of a minute": lambda: (
            f"{any_job()}/history",
            {"until": any_time(), "every": "60s", "limit": 60, "fields": "realised"},
        ),
        "status?at= any moment": lambda: (f"{any_job()}/status", {"at": any_time()}),
    }


def stream_rate(client: httpx.Client, jobs: int) -> None:
    for title, where in (("of a job", f"/jobs/{job(jobs - 1)}/history"), ("of all jobs", "/history")):
        rows, began = 0, time.perf_counter()
        with client.stream("GET", where, params={"format": "ndjson"}) as answer:
            for piece in answer.iter_bytes():
                rows += piece.count(b"\n")
                if rows > 200_000:
                    break
        print(f"ndjson {title}, rows a second: {rows / (time.perf_counter() - began):12,.0f}")


def figures(spent: list[float]) -> tuple[float, ...]:
    cuts = statistics.quantiles(spent, n=20)
    return statistics.median(spent), cuts[18], max(spent)


class NoHost:
    on_exit: Any = None


def serve(path: Path, jobs: int, told: Any) -> None:
    asyncio.run(serving(path, jobs, told))


async def serving(path: Path, jobs: int, told: Any) -> None:
    store = Store.open(path)
    supervisor = Supervisor(NoHost(), Folders(Path("/nonexistent"), 1), lambda _: None)  # type: ignore[arg-type]
    for number in range(jobs):
        rules = Rules()
        supervisor.add(Definition(job(number), rules, 1, config={}, run_spec=lambda spec: spec, digest="", shown={}))
    listening: socket.socket = bind("127.0.0.1", 0)
    context = Context(supervisor, dict, 1000, history=History(store))
    await HttpServer(make_app(context, GuardPolicy()), [listening]).start()
    told.send(f"http://127.0.0.1:{listening.getsockname()[1]}")
    await asyncio.Event().wait()


def job(number: int) -> str:
    return f"job-{number}"


if __name__ == "__main__":
    main()
