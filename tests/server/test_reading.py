"""When a journal is done with."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import RUN, run_started
from sqlalchemy import text

from harnessd.errors import StoreError
from harnessd.server.reading import Reader
from harnessd.server.records import Event
from harnessd.server.store import Store
from harnessd.server.tape import Line, Tape
from harnessd.server.writer import Lines, Writer, Written


class SlowStore:
    """Commits nothing before the test says so."""

    def __init__(self) -> None:
        self.flushed: Future[Any] = Future()

    def put_lines(self, *_: object, **__: object) -> Future[Any]:
        raise AssertionError("the run has said nothing")

    def full(self) -> bool:
        return False

    def is_failing(self) -> bool:
        return False

    def flush(self) -> Future[Any]:
        return self.flushed


@pytest.mark.parametrize("fails", [False, True])
def test_a_journal_stays_until_the_row_of_its_run_is_stored(tmp_path: Path, fails: bool) -> None:
    path, store = tmp_path / "1.jsonl", SlowStore()
    path.touch()
    ended: list[str] = []

    async def reads() -> None:
        reader = Reader(store, lambda run: ended.append(f"{run} is done"))
        reader.follow(RUN, Tape(path, RUN), path, lambda _: None, 1.0)
        reader.finish(RUN, lambda: ended.append("ended"))
        await asyncio.sleep(0)
        assert path.exists() and ended == ["ended"]
        if fails:
            store.flushed.set_exception(StoreError("the store is closed"))
        else:
            store.flushed.set_result(None)
        await asyncio.sleep(0)
        reader.close()

    asyncio.run(reads())
    assert path.exists() == fails
    assert ended == (["ended"] if fails else ["ended", f"{RUN} is done"])


def test_a_journal_that_cannot_be_watched_is_read_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("harnessd.server.reading.INotify.add_watch", full)
    monkeypatch.setattr("harnessd.server.reading._RETRY_S", 0.01)
    path, told = tmp_path / "1.jsonl", list[int]()
    path.touch()

    async def reads() -> None:
        reader = Reader(None, lambda _: None)
        reader.follow(RUN, Tape(path, RUN), path, lambda lines: told.extend(line.seq for line in lines), 1.0)
        for seq in (1, 2):
            with path.open("a") as file:
                file.write(f'{{"seq":{seq},"t":1.5,"status":1}}\n')
            async with asyncio.timeout(30):
                while told[-1:] != [seq]:  # noqa: ASYNC110 - there is no event: that is the point
                    await asyncio.sleep(0.01)
        reader.close()

    asyncio.run(reads())


def test_of_a_journal_begun_anew_while_nothing_could_be_stored_no_line_is_missing(
    store: Store, path: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "1.jsonl"
    journal.touch()

    def write(mode: str, seq: int) -> None:
        with journal.open(mode) as file:
            file.write(json.dumps({"seq": seq, "t": 1.5, "status": "x" * (100 if mode == "a" else 1)}) + "\n")

    async def reads() -> None:
        reader = Reader(store, lambda _: None)
        reader.follow(RUN, Tape(journal, RUN), journal, lambda lines: told.extend(line.seq for line in lines), 100)
        write("a", 1)
        await until(lambda: seqs(store) == [1])
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            write("w", 2)
            await until(lambda: told == [1, 2] and not store.health()["ok"])
            other.execute("ROLLBACK")
        await until(lambda: seqs(store) == [1, 2])
        write("a", 3)
        await until(lambda: seqs(store) == told == [1, 2, 3])
        reader.close()

    told: list[int] = []
    asyncio.run(reads())


def ours(first: int, last: int) -> str:
    return "".join(json.dumps({"seq": seq, "t": 1.5, "status": "x" * 100}) + "\n" for seq in range(first, last + 1))


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("counts_lines", [False, True])
def test_where_it_was_not_known_up_to_where_a_journal_is_stored_the_rest_of_it_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts_lines: bool
) -> None:
    """The first bytes were given back, so there are fewer lines to count than there were."""
    monkeypatch.setattr("harnessd.server.reading._RETRY_S", 0.05)
    journal = tmp_path / "1.jsonl"
    journal.write_text(ours(1, 2000))
    done: list[int] = []

    async def reads() -> None:
        reader = Reader(store, done.append)
        tape = Tape(journal, RUN, counts_lines=counts_lines)
        reader.follow(RUN, tape, journal, lambda _: None, float("inf"))
        await until(lambda: seqs(store)[-1:] == [2000])
        await asyncio.wrap_future(store.flush())
        reader.close()
        with journal.open("a") as file:
            file.write(ours(2001, 2200))
        reader = Reader(store, done.append)
        tape = Tape(journal, RUN, counts_lines=counts_lines)
        reader.follow(RUN, tape, journal, lambda _: None, float("inf"))
        await until(lambda: seqs(store)[-1:] == [2200])
        with journal.open("a") as file:
            file.write(ours(2201, 2205))
        reader.finish(RUN, lambda: None)
        await until(lambda: done)
        reader.close()

    asyncio.run(reads())
    assert seqs(store) == list(range(1, 2206)) and not journal.exists()


def seqs(store: Store) -> list[int]:
    with store.readers.connect() as connection:
        return list(connection.execute(text("SELECT seq FROM status ORDER BY seq")).scalars())


@pytest.mark.parametrize("last_is_cut", [False, True])
def test_after_an_answer_was_lost_a_journal_that_is_cut_is_stored_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_is_cut: bool
) -> None:
    monkeypatch.setattr("harnessd.server.reading._RETRY_S", 0.3)
    journal, done, told, lost = tmp_path / "1.jsonl", list[int](), list[int](), list[bool]()
    journal.write_text(ours(1, 5))
    write = Writer.write

    def answer_lost(self: Writer, items: Sequence[Any], last_event: int) -> Written:
        written = write(self, items, last_event)
        if lost and any(isinstance(item, Lines) for item in items):
            lost.clear()
            raise OSError("the connection is gone")
        return written

    monkeypatch.setattr(Writer, "write", answer_lost)

    async def reads() -> None:
        reader = Reader(store, done.append)
        if not last_is_cut:
            lost.append(True)
        reader.follow(
            RUN, Tape(journal, RUN), journal, lambda lines: told.extend(line.seq for line in lines), float("inf")
        )
        await until(lambda: seqs(store) == [1, 2, 3, 4, 5])
        if last_is_cut:
            await asyncio.wrap_future(store.flush())
            lost.append(True)
        journal.write_text(ours(6, 6))
        await until(lambda: told[-1] == 6)
        with journal.open("a") as file:
            file.write(ours(7, 20))
        reader.finish(RUN, lambda: None)
        await until(lambda: done)
        reader.close()

    asyncio.run(reads())
    assert seqs(store) == told == list(range(1, 21)) and not lost


@pytest.mark.parametrize("fails", [False, True])
def test_all_that_was_left_out_is_told_of_once(
    store: Store, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr("harnessd.server.reading._RETRY_S", 0.05)
    journal, done = tmp_path / "1.jsonl", list[int]()
    journal.touch()

    async def reads() -> None:
        reader, told = Reader(store, done.append), list[int]()
        reader.follow(
            RUN, Tape(journal, RUN), journal, lambda lines: told.extend(line.seq for line in lines), max_rate=10
        )
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            if fails:
                other.execute("BEGIN IMMEDIATE")
            journal.write_text(ours(1, 1000))
            await until(lambda: told[-1:] == [1000] and store.health()["ok"] is not fails)
        reader.finish(RUN, lambda: None)
        await until(lambda: done)
        reader.close()

    asyncio.run(reads())
    store.flush().result(10)
    with closing(sqlite3.connect(path)) as connection:
        ((thinned,),) = connection.execute("SELECT thinned FROM run").fetchall()
        ((told,),) = connection.execute("SELECT sum(data ->> 'count') FROM event WHERE kind = 'gap'").fetchall()
    assert thinned == told == 1000 - len(seqs(store))


class Counting(SlowStore):
    """Knows how many batches are on their way to the store at the most."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self._waiting = self.most = self.puts = 0

    def put_lines(self, *args: Any, **named: Any) -> Future[Any]:
        self.puts += 1
        self._waiting += 1
        self.most = max(self.most, self._waiting)
        future = self._store.put_lines(*args, **named)
        future.add_done_callback(self._answered)
        return future

    def _answered(self, _: Future[Any]) -> None:
        self._waiting -= 1


def test_what_could_not_be_stored_is_caught_up_with_by_many_batches_at_once(
    store: Store, path: Path, tmp_path: Path
) -> None:
    journal, counting = tmp_path / "1.jsonl", Counting(store)
    journal.touch()
    last = 16 * (64 << 10) // len(ours(1, 1))

    async def reads() -> None:
        reader, told = Reader(counting, lambda _: None), list[int]()
        reader.follow(RUN, Tape(journal, RUN), journal, lambda lines: told.extend(line.seq for line in lines), 1e6)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            journal.write_text(ours(1, last))
            await until(lambda: told[-1:] == [last] and not store.health()["ok"])
            counting.most, puts = 0, counting.puts
            await until(lambda: counting.puts > puts + 1)
            assert counting.most == 1  # of what may be refused, the loop reads no more than one chunk each time
            other.execute("ROLLBACK")
        await until(lambda: not reader.backlog_bytes(RUN))
        reader.close()

    asyncio.run(reads())
    assert seqs(store) == list(range(1, last + 1))
    assert counting.most > 1


def test_ended_runs_hold_no_descriptors_while_nothing_can_be_stored(store: Store, path: Path, tmp_path: Path) -> None:
    journals = [tmp_path / f"{number}.jsonl" for number in range(50)]

    async def reads() -> None:
        reader, ended = Reader(store, lambda _: None), list[int]()
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            store.put(Event("tick", 1))
            await until(lambda: not store.health()["ok"])
            before = len(os.listdir("/proc/self/fd"))
            for number, journal in enumerate(journals, RUN):
                journal.write_text(ours(1, 3))
                reader.follow(number, Tape(journal, number), journal, lambda _: None, 100)
                reader.finish(number, lambda number=number: ended.append(number))
            await until(lambda: len(ended) == len(journals))
            await until(lambda: len(os.listdir("/proc/self/fd")) - before < len(journals) / 2)
            for number in range(RUN + 1, RUN + len(journals)):
                store.put(run_started(number))
            other.execute("ROLLBACK")
        await until(lambda: not any(journal.exists() for journal in journals))
        reader.close()

    asyncio.run(reads())
    assert seqs(store) == [1] * 50 + [2] * 50 + [3] * 50


def test_what_was_refused_is_not_read_again_before_it_may_be_taken(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Counting):
        """Refuses lines until the test says otherwise."""

        looks = 0
        fails = True

        def put_lines(self, *args: Any, **named: Any) -> Future[Any]:
            if not self.fails:
                return super().put_lines(*args, **named)
            self.puts += 1
            refused: Future[Any] = Future()
            refused.set_exception(StoreError("the disk is full"))
            return refused

        def is_failing(self) -> bool:
            self.looks += 1
            return self.fails

        def flush(self) -> Future[Any]:
            return self._store.flush()

    monkeypatch.setattr("harnessd.server.reading._RETRY_S", 0.01)
    journal, failing = tmp_path / "1.jsonl", Failing(store)
    journal.write_text(ours(1, 3))

    async def reads() -> None:
        reader = Reader(failing, lambda _: None)
        reader.follow(RUN, Tape(journal, RUN), journal, lambda _: None, 100)
        reader.finish(RUN, lambda: None)
        await until(lambda: failing.looks > 5)
        assert failing.puts == 1
        failing.fails = False
        await until(lambda: not journal.exists())
        reader.close()

    asyncio.run(reads())
    assert seqs(store) == [1, 2, 3]


def test_a_journal_whose_end_cannot_be_read_is_left_to_the_next_server(store: Store, tmp_path: Path) -> None:
    class Broken(Tape):
        def read(self, limit_bytes: int = 0, final: bool = False) -> list[Line]:
            raise OSError(errno.EIO, "Input/output error")

    journal, told = tmp_path / "1.jsonl", list[str]()
    journal.write_text(ours(1, 1))

    async def reads() -> None:
        reader = Reader(store, lambda _: told.append("stored"))
        reader.follow(RUN, Broken(journal, RUN), journal, lambda _: None, 1.0)
        reader.finish(RUN, lambda: told.append("ended"))
        await asyncio.wrap_future(store.flush())
        await asyncio.sleep(0)
        reader.close()

    asyncio.run(reads())
    assert told == ["ended"] and journal.exists()
