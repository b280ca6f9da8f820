"""Statuses stored a second, from journals to committed rows, beside raw `sqlite3.executemany` of the same rows.

    python benchmarks/store.py [seconds] [directory]

Both write the same table with the same indexes, in the same directory, in turns, in this one run. "End to end" is all
that the server does for a status: read the journals of 100 jobs in small pieces, validate, store with the offset of
each journal in one transaction, and give the space in the journals back.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path

from harnessd.server.records import JobRow, RunStarted
from harnessd.server.store import Store
from harnessd.server.tape import Tape

JOBS = 100
LINES_A_JOURNAL = 10_000  # written at once, read, written again
PIECE_BYTES = 32 << 10
FIRST_RUN = 1_700_000_000_000
ROW = "INSERT INTO status (job_id, run_id, seq, at_us, status) VALUES (?, ?, ?, ?, ?)"


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder = Path(name)
        raw = raw_rate(folder / "raw.db", seconds)
        stored, latency_ms = end_to_end_rate(folder / "store.db", seconds)
    print(f"raw executemany, one thread         {raw:10,.0f} rows/s")
    print(f"journals to committed, end to end   {stored:10,.0f} rows/s   {stored / raw:.2f} of raw")
    print(f"put to committed, idle store        {latency_ms:10.2f} ms   median of 200")


def line(seq: int, now: float) -> tuple[str, str]:
    status = f'{{"target_vol":4.2,"realised":0.1734,"leverage":1.25,"n":{seq}}}'
    return status, f'{{"seq":{seq},"t":{now:.6f},"status":{status}}}\n'


def raw_rate(path: Path, seconds: float) -> float:
    """Return rows a second of what the tables allow: rows made beforehand, transactions of 20,000."""
    prepare(path).close()
    seqs, rows_done, spent = 0, 0, 0.0
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in ("synchronous = normal", "foreign_keys = on", "cache_size = -32768", "wal_autocheckpoint = 1000"):
            connection.execute(f"PRAGMA {pragma}")
        while spent < seconds:
            now = time.time()
            rows = [
                (job + 1, FIRST_RUN + job, seqs + number, int(now * 1e6), line(seqs + number, now)[0])
                for job in range(JOBS)
                for number in range(200)
            ]
            seqs += 200
            began = time.perf_counter()
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(ROW, rows)
            connection.execute("COMMIT")
            spent += time.perf_counter() - began
            rows_done += len(rows)
    return rows_done / spent


def end_to_end_rate(path: Path, seconds: float) -> tuple[float, float]:
    """Return rows a second and the median of milliseconds from a put to its commit."""
    store = prepare(path)
    journals = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    paths = [journals / str(FIRST_RUN + job) for job in range(JOBS)]
    for journal in paths:
        journal.touch()
    tapes = [Tape(journal, FIRST_RUN + job) for job, journal in enumerate(paths)]
    seqs, rows, spent = 0, 0, 0.0
    while spent < seconds:
        now = time.time()
        text = "".join(line(seqs + number, now)[1] for number in range(LINES_A_JOURNAL))
        seqs += LINES_A_JOURNAL
        for journal in paths:
            with journal.open("a") as file:
                file.write(text)
        began = time.perf_counter()
        rows += consume(store, tapes)
        spent += time.perf_counter() - began
    with store.readers.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM status").scalar() == rows == seqs * JOBS
    latency_ms = commit_latency_ms(store)
    store.close()
    for tape, journal in zip(tapes, paths, strict=True):
        tape.close()
        journal.unlink()
    journals.rmdir()
    return rows / spent, latency_ms


def consume(store: Store, tapes: list[Tape]) -> int:
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


def prepare(path: Path) -> Store:
    store = Store.open(path)
    for number in range(JOBS):
        store.put(job_row(number))
        store.put(RunStarted(FIRST_RUN + number, f"job-{number}", 1, 1, 1, "", 0, ""))
    store.flush().result()
    return store


if __name__ == "__main__":
    main()
