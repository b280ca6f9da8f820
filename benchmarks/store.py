"""Statuses stored a second, from journals to committed rows, beside raw `sqlite3.executemany` of the same rows.

    python benchmarks/store.py [--seconds 10] [--stored 0,1000000] [--folder DIR]

Both begin with so many rows stored already and write the same table with the same indexes, in the same directory, in
turns of half a million rows each, until the seconds are spent on storing. "End to end" is all that the server does for
a status: read the journals of 100 jobs in small pieces, validate, store with the offset of each journal in one
transaction, and give the space in the journals back.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from history import fill

from harnessd.server.records import JobRow, RunStarted
from harnessd.server.store import Store
from harnessd.server.tape import Tape

JOBS = 100
LINES_A_JOURNAL = 5_000  # written at once, read, written again: a turn
RAW_ROWS = 20_000  # a transaction
PIECE_BYTES = 32 << 10
FIRST_RUN = 1_800_000_000_000  # after those of history.py
ROW = "INSERT INTO status (job_id, run_id, seq, at_us, status) VALUES (?, ?, ?, ?, ?)"


Row = tuple[int, int, int, int, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--stored", default="0,1000000", help="rows that there are before, by commas")
    parser.add_argument("--folder", type=Path, help="where the databases are made")
    given = parser.parse_args()
    for before in map(int, given.stored.split(",")):
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            raw, stored, latency_ms = rates(Path(name), given.seconds, before)
        print(f"beside {before:,} rows")
        print(f"raw executemany, one thread         {raw:10,.0f} rows/s")
        print(f"journals to committed, end to end   {stored:10,.0f} rows/s   {stored / raw:.2f} of raw")
        print(f"put to committed, idle store        {latency_ms:10.2f} ms   median of 200\n", flush=True)


def rates(folder: Path, seconds: float, before: int) -> tuple[float, float, float]:
    """Return rows a second raw and end to end, and the median of milliseconds from a put to its commit."""
    seqs, raw_spent, spent = 0, 0.0, 0.0
    for name in ("raw.db", "store.db"):
        fill(folder / name, before, JOBS)
    store = prepare(folder / "store.db")
    with raw_tables(folder / "raw.db") as connection, journals() as tapes:
        while spent < seconds:
            for seq in range(seqs, seqs + LINES_A_JOURNAL, RAW_ROWS // JOBS):
                raw_spent += raw_s(connection, made(seq))
            spent += stored_s(store, tapes, seqs)
            seqs += LINES_A_JOURNAL
    rows = seqs * JOBS
    with store.readers.connect() as reader:
        found = reader.exec_driver_sql(f"SELECT count(*) FROM status WHERE run_id >= {FIRST_RUN}").scalar()
        assert found == rows, f"{found} of {rows} are stored"
    latency_ms = commit_latency_ms(store)
    store.close()
    return rows / raw_spent, rows / spent, latency_ms


def line(seq: int, now: float) -> tuple[str, str]:
    status = f'{{"target_vol":4.2,"realised":0.1734,"leverage":1.25,"n":{seq}}}'
    return status, f'{{"seq":{seq},"t":{now:.6f},"status":{status}}}\n'


@contextmanager
def raw_tables(path: Path, jobs: int = JOBS) -> Iterator[sqlite3.Connection]:
    """Give a connection like the store's own to tables like the store's own, with a run for each job."""
    prepare(path, jobs).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in ("synchronous = normal", "foreign_keys = on", "cache_size = -32768", "wal_autocheckpoint = 1000"):
            connection.execute(f"PRAGMA {pragma}")
        yield connection


def raw_s(connection: sqlite3.Connection, rows: Sequence[Row]) -> float:
    """Return the seconds that the rows take at best: all in one transaction, made beforehand."""
    began = time.perf_counter()
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(ROW, rows)
    connection.execute("COMMIT")
    return time.perf_counter() - began


def made(seq: int) -> list[Row]:
    """Return the rows of a transaction: of each job so many from that number on."""
    now = time.time()
    return [
        (job + 1, FIRST_RUN + job, number, int(now * 1e6), line(number, now)[0])
        for job in range(JOBS)
        for number in range(seq, seq + RAW_ROWS // JOBS)
    ]


@contextmanager
def journals() -> Iterator[dict[Path, Tape]]:
    """Give the readers of an empty journal for each job."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        tapes = {}
        for run in range(FIRST_RUN, FIRST_RUN + JOBS):
            path = Path(name, str(run))
            path.touch()
            tapes[path] = Tape(path, run)
        yield tapes
        for tape in tapes.values():
            tape.close()


def stored_s(store: Store, tapes: dict[Path, Tape], seq: int) -> float:
    """Return the seconds from journals with lines from that number on until all are committed."""
    now = time.time()
    text = "".join(line(number, now)[1] for number in range(seq, seq + LINES_A_JOURNAL))
    for path in tapes:
        with path.open("a") as file:
            file.write(text)
    began = time.perf_counter()
    assert consume(store, tapes.values()) == LINES_A_JOURNAL * JOBS
    return time.perf_counter() - began


def consume(store: Store, tapes: Iterable[Tape]) -> int:
    """Read all journals to their ends; return the number of lines when every one is committed."""
    rows, unread, unstored = 0, deque(tapes), deque[Future[None]]()
    while unread:
        tape = unread.popleft()
        while store.full():
            unstored.popleft().result()
        since = tape.offset
        if lines := tape.read(PIECE_BYTES):
            rows += len(lines)
            stored = store.put_lines(tape.run, lines, tape.offset, tape.lines, since=since)
            stored.add_done_callback(partial(give_back, tape, tape.offset))
            unstored.append(stored)
            unread.append(tape)
    store.flush().result()
    return rows


def give_back(tape: Tape, offset: int, stored: Future[None]) -> None:
    stored.result()
    tape.give_back(offset)


def commit_latency_ms(store: Store) -> float:
    spent = []
    for number in range(200):
        time.sleep(0.06)
        began = time.perf_counter()
        store.put(job_row(number % JOBS))
        store.flush().result()
        spent.append(time.perf_counter() - began)
    return sorted(spent)[100] * 1000


def job_row(number: int) -> JobRow:
    return JobRow(f"job-{number}", "{}", "", "up", "running", 0)


def prepare(path: Path, jobs: int = JOBS) -> Store:
    store = Store.open(path)
    for number in range(jobs):
        store.put(job_row(number))
        store.put(RunStarted(FIRST_RUN + number, f"job-{number}", 1, 1, 1, "", 0, ""))
    store.flush().result()
    return store


if __name__ == "__main__":
    main()
