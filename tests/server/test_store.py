from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import RUN, job_row, run_started, status_lines
from sqlalchemy import text

from harnessd.errors import Misplaced, NewerSchema, StoreError
from harnessd.server import backlog, retention
from harnessd.server.database import Database
from harnessd.server.desired import load_fast
from harnessd.server.records import Event, JobRow, JournalDone, Keep, Loaded, RunEnded, Sample
from harnessd.server.store import Store
from harnessd.server.tape import Line
from harnessd.server.writer import Lines, Writer

OpenStore = Callable[..., Store]
DAY_US = 86_400_000_000


def rows(store: Store, query: str) -> list[tuple[Any, ...]]:
    store.flush().result(10)
    with store.readers.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def failure(future: Future[Any]) -> str:
    with pytest.raises(StoreError) as caught:
        future.result(10)
    return str(caught.value)


def test_a_new_database_knows_nothing(open_store: OpenStore) -> None:
    assert open_store().load() == Loaded()


def test_what_was_put_is_loaded_by_the_next_store(store: Store, open_store: OpenStore, where: str) -> None:
    job = job_row(overrides='{"a":1}', ever_up=True, restarts=3, failures=2)
    store.put(job)
    unread, done = run_started(RUN + 1), run_started(RUN + 2)
    for record in (unread, done, RunEnded(RUN + 1, 50), RunEnded(RUN + 2, 60), JournalDone(RUN + 2)):
        store.put(record)
    store.put(Event("server-start", 70))
    store.put_lines(RUN, status_lines(1, 3), offset=333, count=3).result(10)
    store.close()
    expected = Loaded(
        jobs=(job,),
        runs=(run_started(journal_offset=333, journal_lines=3),),
        unread=(unread,),
        ended=frozenset((RUN + 1, RUN + 2)),
        last_run=RUN + 2,
        last_event=1,
    )
    assert open_store().load() == expected
    if "://" not in where:
        assert load_fast(where) == expected


def test_a_job_put_again_is_changed_and_keeps_its_history(store: Store) -> None:
    store.put(job_row(want="down", removed_us=9))
    assert rows(store, "SELECT want, removed_us, (SELECT count(*) FROM run WHERE job_id = job.id) FROM job") == [
        ("down", 9, 1)
    ]


def test_a_run_put_again_keeps_what_is_known_of_it(store: Store) -> None:
    store.put_lines(RUN, status_lines(1, 3), offset=333, count=3)
    store.put(RunEnded(RUN, 50, exit_code=7, reason="crashed", cpu_s=0.5, peak_rss_bytes=9, wall_s=1.5, mono_s=1.4))
    store.put(run_started())
    query = "SELECT journal_offset, status_rows, ended_us, exit_code, signal, reason, cpu_s, wall_s, mono_s FROM run"
    assert rows(store, query) == [(333, 3, 50, 7, None, "crashed", 0.5, 1.5, 1.4)]


def test_the_same_lines_twice_are_stored_once(store: Store) -> None:
    store.put_lines(RUN, status_lines(1, 3), offset=30, count=3)
    store.put_lines(RUN, status_lines(2, 5), offset=50, count=5, dropped=4)
    assert rows(store, "SELECT seq FROM status ORDER BY id") == [(1,), (2,), (3,), (4,), (5,)]
    assert rows(store, "SELECT journal_offset, journal_lines, thinned FROM run") == [(50, 5, 4)]


def test_many_lines_of_many_runs_are_stored_in_whole(store: Store) -> None:
    for run in range(RUN + 1, RUN + 8):
        store.put(run_started(run))
        store.put_lines(run, status_lines(1, run % 100 * 1000, run), offset=1, count=1)
    assert rows(store, "SELECT run_id, count(*), max(seq) FROM status GROUP BY run_id ORDER BY run_id") == [
        (run, run % 100 * 1000, run % 100 * 1000) for run in range(RUN + 1, RUN + 8)
    ]


def test_what_is_no_status_becomes_an_event(store: Store) -> None:
    lines = [
        Line(RUN, 1, 10, "ack", "17"),
        Line(RUN, 2, 20, "error", '"boom"'),
        Line(RUN, 3, 30, "torn", '{"x\0'),
        Line(RUN, 4, 40, "gap", '{"count":9}'),
    ]
    store.put_lines(RUN, lines, offset=1, count=4)
    events = rows(store, "SELECT id, kind, run_id, at_us, data FROM event ORDER BY id")
    assert [(*row[:4], json.loads(row[4])) for row in events] == [
        (1, "read", RUN, 10, {"id": 17}),
        (2, "error", RUN, 20, {"text": "boom"}),
        (3, "torn", RUN, 30, {"text": '{"x\0'}),
        (4, "gap", RUN, 40, {"count": 9}),
    ]


def test_committed_events_are_told_in_order_with_the_ids_they_are_stored_under(store: Store) -> None:
    told: list[Event] = []
    store.on_committed = told.extend
    for number in range(500):
        store.put(Event("tick", number, "etl", data={"n": number}))
        store.put_lines(RUN, [Line(RUN, number, number, "ack", str(number))], offset=number, count=number)
    stored = rows(store, "SELECT id, kind, at_us FROM event ORDER BY id")
    assert len(stored) == 1000
    assert [(event.id, event.kind, event.at_us) for event in told] == stored
    assert {event.job for event in told} == {"etl"}


def test_a_listener_that_fails_stops_nothing(store: Store) -> None:
    store.on_committed = lambda _: 1 / 0  # type: ignore[assignment,return-value]
    store.put(Event("tick", 1))
    assert rows(store, "SELECT kind FROM event") == [("tick",)]


def test_event_ids_go_on_after_a_restart(store: Store, open_store: OpenStore) -> None:
    store.put(Event("tick", 1))
    store.close()
    again = open_store()
    again.put(Event("tock", 2))
    assert rows(again, "SELECT id, kind FROM event ORDER BY id") == [(1, "tick"), (2, "tock")]


def test_samples_are_stored_once_a_moment(store: Store) -> None:
    sample = Sample("etl", RUN, 5, 12.5, 1 << 40, 3, 9)
    store.put(sample)
    store.put(sample)
    assert rows(store, "SELECT run_id, at_us, cpu_percent, rss_bytes, threads, fds FROM sample") == [
        (RUN, 5, 12.5, 1 << 40, 3, 9)
    ]


def test_an_event_of_a_job_never_put_is_stored_under_its_name(store: Store) -> None:
    store.put(Event("refused", 5, "ghost"))
    assert rows(store, "SELECT job, kind FROM job_events") == [("ghost", "refused")]


def test_lines_of_an_unknown_run_are_refused_and_others_stored(store: Store) -> None:
    lost = store.put_lines(RUN + 9, status_lines(1, 2, RUN + 9), offset=1, count=2)
    store.put_lines(RUN, status_lines(1, 2), offset=1, count=2).result(10)
    assert "no such run" in failure(lost)
    assert store.health()["ok"]


def test_lines_are_refused_when_those_before_them_are_not_stored(store: Store) -> None:
    store.put_lines(RUN, status_lines(1, 2), offset=20, count=2, since=0).result(10)
    store.put_lines(RUN, status_lines(3, 4), offset=40, count=4, since=20).result(10)
    assert "is stored up to byte 40" in failure(store.put_lines(RUN, status_lines(7, 8), offset=80, count=8, since=60))
    store.put_lines(RUN, status_lines(5, 6), offset=60, count=6, since=40).result(10)
    assert rows(store, "SELECT max(seq), count(*) FROM status") == [(6, 6)]


def test_lines_that_are_stored_are_refused_with_where_to_read_on(store: Store) -> None:
    torn = Line(RUN, 2, 7, "torn", "x")
    store.put_lines(RUN, [*status_lines(1, 1), torn], offset=20, count=2, since=0).result(10)
    with pytest.raises(Misplaced) as refused:
        store.put_lines(RUN, [*status_lines(1, 1), torn, *status_lines(3, 3)], offset=30, count=3, since=0).result(10)
    assert (refused.value.offset, refused.value.lines) == (20, 2)
    assert rows(store, "SELECT status_rows, journal_offset FROM run") == [(1, 20)]
    assert rows(store, "SELECT count(*) FROM event WHERE kind = 'torn'") == [(1,)]


def test_a_record_that_cannot_be_stored_is_dropped_alone(store: Store) -> None:
    for number in range(5):
        store.put(Event("tick", number, actor="\udc80" if number == 2 else None))
    lines = store.put_lines(RUN, status_lines(1, 2), offset=1, count=2)
    assert rows(store, "SELECT at_us FROM event ORDER BY id") == [(0,), (1,), (3,), (4,)]
    lines.result(10)
    assert store.health()["dropped"] == 1


def test_of_a_batch_however_large_no_statement_is_too_large_for_sqlite_as_it_is_usually_built(path: Path) -> None:
    database = Database(path)
    with database.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        driver.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 32_766)
        jobs = [job_row(f"job{number}") for number in range(5000)]
        runs = [run_started(RUN + number, f"job{number}") for number in range(5000)]
        Writer(connection).write([*jobs, *runs], 0)
        for table in ("job", "run"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar() == 5000
    database.dispose()


def test_views_show_names_and_iso_times_in_utc(store: Store) -> None:
    store.put_lines(RUN, [Line(RUN, 1, 1_700_000_000_000_007, "status", "{}")], offset=1, count=1)
    store.put(Event("tick", 1_700_000_000_999_999, "etl", RUN, "uid 0", {"a": 1}))
    store.put(RunEnded(RUN, 20, exit_code=0, reason="completed"))
    assert rows(store, "SELECT at, job, run, seq, status FROM status_history") == [
        ("2023-11-14T22:13:20.000007Z", "etl", RUN, 1, "{}")
    ]
    assert rows(store, "SELECT at, id, job, run, kind, actor, data FROM job_events") == [
        ("2023-11-14T22:13:20.999999Z", 1, "etl", RUN, "tick", "uid 0", '{"a":1}')
    ]
    assert rows(store, "SELECT run, job, started, ended, exit_code, reason FROM run_summary") == [
        (RUN, "etl", "1970-01-01T00:00:00.000010Z", "1970-01-01T00:00:00.000020Z", 0, "completed")
    ]


def test_a_closed_store_refuses_lines_and_flushes(store: Store) -> None:
    store.close()
    assert "closed" in failure(store.put_lines(RUN, [], 0, 0))
    assert "closed" in failure(store.flush())


def test_closing_commits_what_waits(store: Store, open_store: OpenStore) -> None:
    for number in range(1000):
        store.put(Event("tick", number))
    store.close()
    assert rows(open_store(), "SELECT count(*) FROM event") == [(1000,)]


def test_a_newer_schema_is_refused(store: Store, open_store: OpenStore, path: Path) -> None:
    store.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(NewerSchema, match="9999"):
        open_store()


def test_the_database_is_its_owners_alone(store: Store, path: Path) -> None:
    assert [file.stat().st_mode & 0o777 for file in sorted(path.parent.glob("harnessd.db*"))] == [0o600] * 3


def test_waiting_records_are_bounded_and_samples_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "MOST_RECORDS", 100)
    waiting = backlog.Backlog()
    for number in range(60):
        waiting.add(Sample("etl", RUN, number, 0, 0, 0, 0))
        waiting.add(Event("tick", number))
    waiting.add(job_row())
    left = waiting.drain()
    assert len(left) <= 100
    assert sum(isinstance(item, Event) for item in left) == 60
    assert waiting.dropped == 121 - len(left)


def test_of_the_rows_of_a_job_that_wait_the_last_one_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "MOST_RECORDS", 100)
    waiting = backlog.Backlog()
    for number in range(60):
        waiting.add(RunEnded(RUN, number))
        waiting.add(job_row(failures=number))
    left = waiting.drain()
    assert len(left) <= 100 and waiting.dropped == 0
    assert [item.ended_us for item in left if isinstance(item, RunEnded)] == list(range(60))
    assert [item.failures for item in left if isinstance(item, JobRow)][-1] == 59


def test_the_end_of_a_run_and_what_becomes_of_its_job_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "LINES_A_BATCH", 2)
    waiting = backlog.Backlog()
    for item in (Event("unread", 1), RunEnded(RUN, 2), Event("state", 3), job_row(), Event("tick", 4)):
        waiting.add(item)
    assert [type(item) for item in waiting.take()] == [Event, RunEnded, Event, JobRow]
    assert [type(item) for item in waiting.take()] == [Event]


class TestRetention:
    NOW_US = 1000 * DAY_US

    def test_old_history_is_forgotten_and_the_newest_stays(self, store: Store) -> None:
        old = [replace(run_started(RUN + number), started_us=number) for number in range(1, 4)]
        for run in old:
            store.put(run)
            store.put(RunEnded(run.id, run.started_us + 1))
            store.put(JournalDone(run.id))
        store.put(Event("tick", 1, "etl"))
        store.put(Event("tick", 2))
        store.put(Sample("etl", RUN, 1, 0, 0, 0, 0))
        store.put(Sample("etl", RUN, self.NOW_US, 0, 0, 0, 0))
        fresh = [Line(RUN, 9, self.NOW_US - DAY_US, "status", "1")]
        store.put_lines(RUN, [*status_lines(1, 8), *fresh], offset=1, count=9).result(10)
        gone = store.trim(self.NOW_US, Keep(days=30)).result(10)
        assert rows(store, "SELECT seq FROM status") == [(9,)]
        assert rows(store, "SELECT id, status_rows FROM run ORDER BY id") == [(RUN, 1), (RUN + 3, 0)]
        assert rows(store, "SELECT id FROM event") == [(2,)]
        assert rows(store, "SELECT at_us FROM sample") == [(self.NOW_US,)]
        assert gone == 8 + 2 + 1 + 1

    def test_the_last_status_stays_however_old(self, store: Store) -> None:
        store.put_lines(RUN, status_lines(1, 8), offset=1, count=8).result(10)
        store.trim(self.NOW_US, Keep(days=30)).result(10)
        assert rows(store, "SELECT seq FROM status") == [(8,)]

    def test_only_so_many_rows_of_a_job_are_kept_and_each_job_may_have_its_own_number(self, store: Store) -> None:
        store.put(job_row("other"))
        store.put(run_started(RUN + 1, "other"))
        for run in (RUN, RUN + 1):
            store.put_lines(run, status_lines(1, 5000, run), offset=1, count=5000)
        store.flush().result(10)
        store.trim(10, Keep(rows=1000), {"other": Keep(rows=4000)}).result(10)
        assert rows(store, "SELECT run_id, count(*), min(seq) FROM status GROUP BY run_id ORDER BY run_id") == [
            (RUN, 1000, 4001),
            (RUN + 1, 4000, 1001),
        ]
        assert rows(store, "SELECT status_rows FROM run ORDER BY id") == [(1000,), (4000,)]

    def test_on_a_slow_machine_a_step_takes_several_rows_all_the_same(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[int] = []
        taking = retention.Trim._step

        def counted(trim: retention.Trim, take: Callable[[int], int]) -> int:
            steps.append(taking(trim, take))
            return steps[-1]

        monkeypatch.setattr(retention, "STEP_SECONDS", 0)
        monkeypatch.setattr(retention.Trim, "_step", counted)
        store.put_lines(RUN, status_lines(1, 1100), offset=1, count=1100).result(10)
        store.trim(10, Keep(rows=100)).result(30)
        assert sum(steps) == 1000 and len(steps) < 60

    def test_what_is_put_during_a_trim_does_not_wait_for_its_end(self, store: Store) -> None:
        store.put_lines(RUN, status_lines(1, 50_000), offset=1, count=1).result(30)
        trimmed = store.trim(10, Keep(rows=10))
        store.put(Event("tick", 1))
        store.flush().result(10)
        assert not trimmed.done()
        assert trimmed.result(60) == 49_990

    def test_vacuum_gives_space_back_to_the_filesystem(self, store: Store, path: Path) -> None:
        store.put_lines(RUN, status_lines(1, 50_000), offset=1, count=1).result(30)
        store.trim(10, Keep(rows=10)).result(60)
        store.close()
        database = Database(path)
        with database.connect() as connection:
            database.vacuum(connection)
        database.dispose()
        assert path.stat().st_size < 500_000

    def test_a_backup_made_in_use_is_a_whole_database(self, store: Store, path: Path, open_store: OpenStore) -> None:
        store.put_lines(RUN, status_lines(1, 1000), offset=1, count=1).result(10)
        Database(path).backup(path.with_name("copy.db"))
        store.put_lines(RUN, status_lines(1001, 1010), offset=2, count=2).result(10)
        copy = path.with_name("copy.db")
        assert copy.stat().st_mode & 0o777 == 0o600
        assert rows(open_store(copy), "SELECT count(*) FROM status") == [(1000,)]
        assert not copy.with_name("copy.db.partial").exists()

    @pytest.mark.usefixtures("store")
    def test_a_backup_that_fails_leaves_no_file(self, path: Path) -> None:
        (path.parent / "folder").mkdir()
        with pytest.raises(OSError, match="folder"):
            Database(path).backup(path.parent / "folder")
        assert [file.name for file in path.parent.glob("*.partial")] == []


def test_what_waits_is_bounded_in_bytes_as_well(store: Store) -> None:
    def long_line(number: int) -> Lines:
        return Lines(RUN, status_lines(number, number), number << 20, (number + 1) << 20, number, 0, Future())

    waiting = backlog.Backlog()
    for number in range(65):
        waiting.add(long_line(number))
    assert waiting.bytes == 65 << 20
    batches = []
    while batch := waiting.take():
        batches.append(len(batch))
    assert batches == [16, 16, 16, 16, 1] and waiting.bytes == 0
    with store.together():
        for number in range(65):
            store._backlog.add(long_line(number))
        assert store.full()
        store._backlog.take_lines()
        assert not store.full()
