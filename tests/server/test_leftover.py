"""What a server stores of runs that ended when none was there."""

from __future__ import annotations

import asyncio
import errno
import math
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from helpers.rows import RUN, job_row
from sqlalchemy import text

from harnessd.server.adoption import Passed
from harnessd.server.leftover import store_left_over
from harnessd.server.places import journal_name
from harnessd.server.reading import Reader
from harnessd.server.records import JobRow, JournalDone, Loaded, Record, RunStarted
from harnessd.server.store import Store
from harnessd.server.tape import UNNUMBERED, Tape
from harnessd.states import ExitReason
from harnessd.wire import ExitRecord

ENDED = ExitRecord(RUN, "etl", 42, 7, None, False, 1_700_000_009.0, 8.0, 8.0, 0.1, 1 << 20, 0)


@pytest.mark.parametrize(
    ("jobs", "counting"),
    [((), {"etl"}), ((job_row(spec='{"command": ["feed"]}', removed_us=1),), ())],
    ids=["defined", "removed since"],
)
@pytest.mark.parametrize("said_since", ["", '{"status":5}\n{"error":"late"}\n'])
def test_lines_without_numbers_are_counted_and_not_stored_again_when_it_is_not_known_that_they_are(
    open_store: Callable[..., Store],
    tmp_path: Path,
    said_since: str,
    jobs: tuple[JobRow, ...],
    counting: Collection[str],
) -> None:
    path = tmp_path / journal_name(RUN, 3, "etl")
    path.write_text("".join(f'{{"status":{number}}}\n' for number in range(5)) + "torn\n")
    store = open_store()
    store.put(job_row())
    started = RunStarted(RUN, "etl", 42, 7, 3, "", 1_700_000_001_000_000, str(path))
    store.put(started)

    async def stored_twice() -> None:
        reader = Reader(store, lambda _: None)
        reader.follow(RUN, Tape(path, RUN, counts_lines=True), path, lambda _: None, math.inf)
        await asyncio.wrap_future(store.flush())
        reader.close()
        with path.open("a") as file:
            file.write(said_since)
        done = asyncio.Event()
        reader = Reader(store, lambda _: done.set())
        before_that = Loaded(jobs, runs=(started,))
        store_left_over(reader, before_that, [started], (), store.put, tmp_path, counting)
        async with asyncio.timeout(10):
            await done.wait()
        reader.close()

    asyncio.run(stored_twice())
    with store.readers.connect() as connection:
        said = connection.execute(text("SELECT status FROM status ORDER BY seq")).scalars().all()
        assert all(seq < UNNUMBERED for seq in connection.execute(text("SELECT seq FROM status")).scalars())
        counted = connection.execute(text("SELECT status_rows FROM run")).scalar_one()
        told = connection.execute(text("SELECT kind FROM event WHERE kind IN ('torn', 'error') ORDER BY id")).scalars()
        assert list(told) == (["torn", "error"] if said_since else ["torn"])
    assert said == [str(number) for number in range(counted)]
    assert counted == (6 if said_since else 5)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_journal_is_done_with_if_it_is_gone_but_not_if_it_cannot_be_opened(
    open_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    def no_more(*_: object, **__: object) -> Tape:
        raise OSError(errno.EMFILE, "Too many open files")

    path, records = tmp_path / journal_name(RUN, 3, "etl"), list[Record]()
    if is_there:
        path.write_text('{"seq":1,"t":1.5,"status":"said"}\n')
        monkeypatch.setattr("harnessd.server.leftover.Tape", no_more)

    async def left_over() -> None:
        reader = Reader(open_store(), lambda _: None)
        started = RunStarted(RUN, "etl", 42, 7, 3, "", 1_700_000_001_000_000, str(path))
        store_left_over(reader, Loaded(unread=(started,)), (), (), records.append, tmp_path)
        reader.close()

    asyncio.run(left_over())
    assert records == ([] if is_there else [JournalDone(RUN)])
    assert path.exists() == is_there


def test_an_exit_of_a_run_whose_start_was_never_stored_is_stored(
    open_store: Callable[..., Store], tmp_path: Path
) -> None:
    (tmp_path / journal_name(RUN, 3, "etl")).write_text('{"seq":1,"t":1.5,"status":"said"}\n')
    store = open_store()
    store.put(job_row())

    async def stored() -> None:
        done = asyncio.Event()
        reader = Reader(store, lambda _: done.set())
        store_left_over(reader, Loaded(), (), [Passed(ENDED, ExitReason.CRASHED)], store.put, tmp_path)
        async with asyncio.timeout(10):
            await done.wait()
        reader.close()

    asyncio.run(stored())
    with store.readers.connect() as connection:
        runs = connection.execute(text("SELECT id, started_us, exit_code, reason FROM run")).all()
        said = connection.execute(text("SELECT run_id, seq FROM status")).all()
    assert [tuple(run) for run in runs] == [(RUN, 1_700_000_001_000_000, 7, "crashed")]
    assert [tuple(each) for each in said] == [(RUN, 1)]
    assert list(tmp_path.glob("*.jsonl")) == []
