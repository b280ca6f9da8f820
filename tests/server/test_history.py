from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.past import BEGAN_US, MINUTE_US, at, run_id, some_hours
from helpers.rows import job_row, run_started
from sqlalchemy import Engine, event

from harnessd import tree
from harnessd.errors import BadData, BadRequest, Unavailable
from harnessd.server import history as module
from harnessd.server import walk as walking
from harnessd.server.asked import Asked, What, parse
from harnessd.server.history import History
from harnessd.server.records import Event, RunEnded, Sample
from harnessd.server.rows import Json, Page, columns
from harnessd.server.store import Store
from harnessd.server.tape import Line
from harnessd.server.timespan import iso

NOW_US = at(6)
FEED_RUN = run_id(at())


class Reader:
    """Asks a history as the routes do."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.history = History(store)

    def page(self, what: What, job: str | None = None, **given: Any) -> Page:
        return asyncio.run(self.history.page(self.asked(what, job, **given)))

    def asked(self, what: What, job: str | None = None, **given: Any) -> Asked:
        return parse(what, job, [(name, str(value)) for name, value in given.items()], NOW_US, all_rows=False)

    def rows(self, what: What, job: str | None = None, **given: Any) -> list[dict[str, Any]]:
        names = columns(self.asked(what, job, **given))
        return [
            {name: json.loads(v) if type(v) is Json else v for name, v in zip(names, row, strict=True)}
            for row in self.page(what, job, **given).rows
        ]

    def all_pages(self, what: What, job: str | None = None, **given: Any) -> list[tuple[Any, ...]]:
        """Return the rows of all pages, one after another."""
        rows, page = [], self.page(what, job, **given)
        rows += page.rows
        while page.next:
            page = self.page(what, job, **given, cursor=page.next)
            rows += page.rows
        return rows


@pytest.fixture
def reader(open_store: Callable[..., Store]) -> Iterator[Reader]:
    store = open_store()
    some_hours(store)
    reader = Reader(store)
    yield reader
    reader.history.close()


def said(reader: Reader, job: str = "feed", **given: Any) -> list[int]:
    return [row["status"]["orders"] for row in reader.rows("history", job, **given)]


# rows


def test_a_status_row_has_time_job_run_number_and_status_newest_first(reader: Reader) -> None:
    newest, before = reader.rows("history", "feed", limit=2)
    assert newest == {
        "at": iso(at(minutes=359)),
        "job": "feed",
        "run": FEED_RUN,
        "seq": 321,
        "status": {"orders": 3590, "book": {"bid": 99.5}},
    }
    assert before["seq"] == 320


def test_a_page_has_a_hundred_rows_unless_told_otherwise(reader: Reader) -> None:
    assert len(reader.rows("history", "feed")) == 100
    assert len(reader.rows("history", "feed", limit=321)) == 321
    assert reader.page("history", "feed", limit=321).next is None
    assert reader.page("history", "feed", limit=320).next is not None


def test_the_window_holds_since_and_not_until(reader: Reader) -> None:
    assert said(reader, since=iso(at(minutes=10)), until=iso(at(minutes=13)), order="asc") == [100, 110, 120]
    assert said(reader, since="-3m") == [3590, 3580, 3570]


def test_the_oldest_come_first_when_asked_for(reader: Reader) -> None:
    assert said(reader, order="asc", limit=3) == [0, 10, 20]


def test_a_run_is_a_row_of_run_summary(reader: Reader) -> None:
    rows = reader.rows("runs", "etl")
    assert [row["reason"] for row in rows] == ["killed", "crashed", "crashed", "crashed"]
    began, ended = at(3, 1), at(5)
    assert rows[0] == {
        "run": run_id(began),
        "job": "etl",
        "pid": 53,
        "started": iso(began),
        "ended": iso(ended),
        "wall_s": 7140.0,
        "exit_code": None,
        "signal": 9,
        "reason": "killed",
        "cpu_s": 3570.0,
        "peak_rss_bytes": 900_000_003,
    }
    assert reader.rows("runs", "feed")[0]["ended"] is None
    assert len(reader.rows("runs", "etl", since=iso(at(2)))) == 2


def test_an_event_row_says_who_did_what(reader: Reader) -> None:
    (first, second) = reader.rows("events", "feed", kind="command", order="asc")
    assert {name: first[name] for name in ("at", "job", "run", "kind", "actor", "data")} == {
        "at": iso(at(1)),
        "job": "feed",
        "run": FEED_RUN,
        "kind": "command",
        "actor": "token:ops@192.0.2.7:1",
        "data": {"id": 7, "verb": "config", "data": {"limit": 1}, "queued": True},
    }
    assert second["id"] > first["id"]


def test_a_sample_row_has_what_a_run_used(reader: Reader) -> None:
    row = reader.rows("metrics", "feed", limit=1)[0]
    assert row.pop("at") == iso(at(minutes=350))
    assert row == {
        "job": "feed",
        "run": FEED_RUN,
        "cpu_percent": 22.5,
        "rss_bytes": 50_000_350,
        "threads": 3,
        "fds": 12,
    }


def test_the_views_have_the_same_rows_under_the_same_names(reader: Reader) -> None:
    views: dict[What, str] = {"history": "status_history", "runs": "run_summary", "events": "job_events"}
    for what, view in views.items():
        with reader.store.readers.connect() as connection:
            found = connection.exec_driver_sql(f"SELECT * FROM {view}")
            assert tuple(found.keys()) == columns(Asked(what))
            stored = sorted(map(repr, (tuple(row) for row in found)))
        jobs = [None] if what in ("history", "events") else ["feed", "etl", "idle"]
        assert sorted(repr(row) for job in jobs for row in reader.all_pages(what, job)) == stored


def test_events_of_all_jobs_and_of_none_stand_together(reader: Reader) -> None:
    rows = reader.all_pages("events", None, limit=7)
    assert len(rows) == len({row[1] for row in rows})
    assert {row[2] for row in rows} == {"feed", "etl", None}
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)


def test_kinds_can_be_several(reader: Reader) -> None:
    both = reader.all_pages("events", None, kind="read,command", limit=2, order="asc")
    assert [row[4] for row in both] == ["command", "read", "command"]
    assert [row[4] for row in reader.all_pages("events", "feed", kind="read,state")] == ["read", "state", "state"]


@pytest.mark.parametrize("what", ["history", "metrics", "events"])
def test_a_run_alone_can_be_asked_for(reader: Reader, what: What) -> None:
    run = run_id(at(1, 1)) if what != "metrics" else FEED_RUN
    job = "etl" if what != "metrics" else "feed"
    rows = reader.rows(what, job, run=run)
    assert rows and {row["run"] for row in rows} == {run}
    within = reader.rows(what, job, run=run, since=iso(BEGAN_US), until=iso(at(6)))
    assert within == rows
    assert reader.rows(what, job, run=12345) == []
    assert reader.rows(what, "idle", run=run) == []


def test_a_run_and_a_window_together_leave_what_is_in_both(reader: Reader) -> None:
    run = run_id(at(1, 1))
    rows = reader.rows("history", "etl", run=run, since=iso(at(1, 15)), until=iso(at(1, 35)))
    assert [row["seq"] for row in rows] == [4, 3]
    assert reader.rows("history", "etl", run=run, since=iso(at(3))) == []


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_during_which_the_clock_was_set_back_has_all_its_rows(store: Store, ended: bool) -> None:
    run = run_id(at())
    times = [at(minutes=minute) for minute in (*range(30), *range(-30, 0))]
    store.put(run_started(run, started_us=at()))
    for at_us in times:
        store.put(Sample("etl", run, at_us, 1.0, 2, 3, 4))
    store.put_lines(run, [Line(run, seq, at_us, "status", "1") for seq, at_us in enumerate(times, 1)], 9, 60)
    if ended:
        store.put(RunEnded(run, at(), wall_s=0.0, mono_s=3600.0))
    store.flush().result(10)
    reader = Reader(store)
    assert len(reader.rows("metrics", "etl", run=run)) == 60
    assert len(reader.rows("history", "etl", run=run, since=iso(at(-1)))) == 60
    assert sum(row["rows"] for row in reader.rows("history", "etl", run=run, every="7m")) == 60
    reader.history.close()


def test_rows_of_a_run_are_looked_for_in_its_life_when_the_clock_was_not_set(reader: Reader) -> None:
    ticks = tree.start_ticks(os.getpid())
    began_us = time.time_ns() // 1000 - round(tree.age_s(ticks) * 1e6)
    reader.store.put(run_started(run_id(began_us), started_us=began_us, start_ticks=ticks))
    reader.store.flush().result(10)
    margin_us = walking.LIFE_MARGIN_US
    with reader.store.readers.connect() as connection:
        for since, until in ((at(1, 1), at(2)), (began_us, None)):
            asked = Asked("metrics", "etl", run=run_id(since))
            found = walking.within_life(connection, asked, None)
            assert found == (since - margin_us, until and until + margin_us)


def test_nothing_is_found_of_a_job_that_said_nothing_or_is_unknown(reader: Reader) -> None:
    for job in ("idle", "nobody"):
        for what in ("history", "runs", "events", "metrics"):
            assert reader.page(what, job) == Page([], None)  # type: ignore[arg-type]
    assert asyncio.run(reader.history.has_job("idle"))
    assert not asyncio.run(reader.history.has_job("nobody"))


# pages


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 7, 100])
@pytest.mark.parametrize(
    ("what", "job", "given"),
    [
        ("history", "feed", {}),
        ("history", "etl", {"run": run_id(at(1, 1))}),
        ("history", "feed", {"run": FEED_RUN, "since": "-2h"}),
        ("history", None, {}),
        ("history", None, {"since": "-4h", "until": "-3h"}),
        ("history", "feed", {"every": "7m"}),
        ("runs", "etl", {}),
        ("events", "etl", {}),
        ("events", None, {"kind": "state,error"}),
        ("metrics", "feed", {}),
    ],
)
def test_pages_of_any_size_are_the_whole_in_order(
    reader: Reader, what: What, job: str | None, given: dict[str, Any], limit: int, order: str
) -> None:
    whole = reader.page(what, job, **given, order=order, limit=10_000).rows
    assert reader.all_pages(what, job, **given, order=order, limit=limit) == whole
    other = "asc" if order == "desc" else "desc"
    assert reader.page(what, job, **given, order=other, limit=10_000).rows == whole[::-1]


def test_pages_neither_double_nor_miss_a_row_while_rows_come_in(reader: Reader) -> None:
    whole = reader.page("history", "feed", limit=10_000).rows
    page = reader.page("history", "feed", limit=50)
    rows = list(page.rows)
    seq = 1000
    while page.next:
        lines = [Line(FEED_RUN, seq + n, NOW_US + seq + n, "status", '{"orders":0}') for n in range(20)]
        seq += 20
        reader.store.put_lines(FEED_RUN, lines, 1, seq).result(10)
        page = reader.page("history", "feed", limit=50, cursor=page.next)
        rows += page.rows
    assert rows == whole


def test_rows_of_one_moment_are_parted_by_pages_without_loss(store: Store) -> None:
    run = 1_700_000_000_000
    for job in ("a", "b", "c"):
        store.put(job_row(job))
        store.put(run_started(run + ord(job), job))
        lines = [Line(run + ord(job), seq, 5_000_000, "status", f'"{job}{seq}"') for seq in range(1, 40)]
        store.put_lines(run + ord(job), lines, 9, 39).result(10)
    reader = Reader(store)
    for job, count in ((None, 117), ("b", 39)):
        for order in ("asc", "desc"):
            rows = reader.all_pages("history", job, limit=4, order=order)
            assert len(rows) == len(set(rows)) == count
    reader.history.close()


def test_over_all_jobs_a_busy_one_does_not_hide_the_others(store: Store) -> None:
    run = 1_700_000_000_000
    lines = [Line(run, seq, seq * 1000, "status", "1") for seq in range(1, 3001)]
    store.put_lines(run, lines, 9, 3000).result(10)
    for number in range(30):
        store.put(job_row(f"slow-{number}"))
        store.put(run_started(run + 1 + number, f"slow-{number}"))
        slow = [Line(run + 1 + number, seq, seq * 1_000_000 + number, "status", "2") for seq in range(1, 4)]
        store.put_lines(run + 1 + number, slow, 9, 3).result(10)
    reader = Reader(store)
    rows = reader.all_pages("history", None, limit=100)
    assert len(rows) == len(set(rows)) == 3090
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)
    reader.history.close()


def test_a_page_of_large_statuses_ends_before_it_takes_too_much_memory(store: Store) -> None:
    run = 1_700_000_000_000
    lines = [Line(run, seq, seq, "status", json.dumps("x" * 200_000)) for seq in range(1, 61)]
    store.put_lines(run, lines, 9, 60).result(10)
    reader = Reader(store)
    page = reader.page("history", "etl", limit=10_000)
    assert 1 < len(page.rows) < 60
    assert len(reader.all_pages("history", "etl", limit=10_000)) == 60
    reader.history.close()


def test_a_page_of_many_buckets_ends_before_it_holds_up_all_others(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE_SECONDS", float("inf"))
    whole = reader.page("history", "feed", every="10m", limit=10_000)
    assert len(whole.rows) == 33 and whole.next is None
    monkeypatch.setattr(module, "PAGE_SECONDS", -1.0)
    assert len(reader.page("history", "feed", every="10m", limit=10_000).rows) == 1
    assert reader.all_pages("history", "feed", every="10m", limit=10_000) == whole.rows


def test_a_cursor_is_good_for_its_own_query_alone(reader: Reader) -> None:
    cursor = reader.page("history", "feed", limit=1).next
    for what, given in [("history", {"order": "asc"}), ("events", {}), ("history", {"every": "1m"})]:
        with pytest.raises(BadRequest, match="another order or other parameters"):
            reader.page(what, "feed", **given, cursor=cursor)  # type: ignore[arg-type]
    for forged in ("x", "", "====", "aGlzdG9yeQ==", "é"):
        with pytest.raises(BadRequest, match="cannot use cursor="):
            reader.page("history", "feed", cursor=forged)


# fields


def test_fields_take_out_what_is_asked_for(reader: Reader) -> None:
    (row,) = reader.rows("history", "feed", fields="orders,book.bid,book,nothing", limit=1)
    assert row["status"] == {"orders": 3590, "book.bid": 99.5, "book": {"bid": 99.5}, "nothing": None}
    assert reader.rows("history", "feed", fields="orders", limit=1)[0]["status"] == {"orders": 3590}
    assert reader.rows("history", "etl", fields="ok", limit=1)[0]["status"] == {"ok": True}


@pytest.mark.parametrize(
    ("status", "field", "found"),
    [
        ('{"a":[1,{"b":"x"}]}', "a[1].b", "x"),
        ("[[7]]", "[0][0]", 7),
        ('{"a b":1}', "a b", 1),
        ('{"\\u00e9":1}', "é", 1),
        ('{"$":1}', "$", 1),
        ('{"a\' OR 1=1 --":2}', "a' OR 1=1 --", 2),
        ('{"a":1e999}', "a", None),
        ('{"a":"\\ud800"}', "a", "\ud800"),
        ('"text"', "a", None),
        ('{"a":false}', "a", False),
        ('{"a":12345678901234567890123}', "a", 12345678901234567890123),
    ],
)
def test_a_field_is_found_by_its_path_and_by_nothing_else(store: Store, status: str, field: str, found: Any) -> None:
    if ("1e999" in status or "ud800" in status) and store.readers.dialect.name != "sqlite":
        pytest.skip("jsonb holds neither")
    store.put_lines(1_700_000_000_000, [Line(1_700_000_000_000, 1, 5, "status", status)], 9, 1).result(10)
    reader = Reader(store)
    assert reader.rows("history", "etl", fields=field)[0]["status"] == {field: found}
    reader.history.close()


@pytest.mark.parametrize("fields", ["", "a..b", ".a", "a.", "a[", "a[x]", "a[-1]", "a,", 'a"', "a\\", "a[0]b", "[0]b"])
def test_what_is_no_path_is_refused(reader: Reader, fields: str) -> None:
    with pytest.raises(BadRequest, match="cannot use the field"):
        reader.page("history", "feed", fields=fields)


# buckets


def test_a_bucket_is_its_last_row_and_figures_of_its_numbers(reader: Reader) -> None:
    newest = reader.rows("history", "feed", every="10m", limit=1)[0]
    assert newest == {
        "at": iso(at(minutes=359)),
        "job": "feed",
        "run": FEED_RUN,
        "seq": 321,
        "status": {"orders": 3590, "book": {"bid": 99.5}},
        "bucket": iso(at(minutes=350)),
        "rows": 10,
        "min": {"orders": 3500, "book.bid": 99.5},
        "max": {"orders": 3590, "book.bid": 99.5},
        "mean": {"orders": 3545.0, "book.bid": 99.5},
    }


def test_empty_buckets_have_no_row_and_the_others_hold_every_row_once(reader: Reader) -> None:
    rows = reader.rows("history", "feed", every="10m", order="asc")
    assert len(rows) == 33
    assert sum(row["rows"] for row in rows) == 321
    assert [row["bucket"] for row in rows] == sorted(row["bucket"] for row in rows)
    assert iso(at(3, 20)) not in {row["bucket"] for row in rows}


def test_figures_of_chosen_fields_leave_out_what_is_no_number(reader: Reader) -> None:
    row = reader.rows("history", "etl", every="1d", fields="done,ok")[0]
    assert row["status"] == {"done": row["max"]["done"], "ok": True} or row["status"]["ok"] is True
    assert row["min"] == {"done": 0.0, "ok": None}
    assert row["rows"] == 6 * 3 + 12


def test_a_window_cuts_the_first_and_the_last_bucket(reader: Reader) -> None:
    given = {"since": iso(at(minutes=5)), "until": iso(at(minutes=25)), "every": "10m", "order": "asc"}
    assert [row["rows"] for row in reader.rows("history", "feed", **given)] == [5, 10, 5]


def test_buckets_over_all_jobs_are_refused(reader: Reader) -> None:
    with pytest.raises(BadRequest, match="name one"):
        reader.page("history", None, every="60s")


# as of then


@pytest.mark.parametrize(
    ("minutes", "orders"), [(0, 0), (10, 100), (10.5, 100), (200, 1800), (219.9, 1800), (220, 2200), (9999, 3590)]
)
def test_the_status_as_of_a_moment_is_the_last_one_until_then(reader: Reader, minutes: float, orders: int) -> None:
    row = asyncio.run(reader.history.status_at("feed", at(minutes=minutes)))
    assert row and json.loads(row[4])["orders"] == orders


def test_there_is_no_status_as_of_before_the_first(reader: Reader) -> None:
    assert asyncio.run(reader.history.status_at("feed", at() - 1)) is None
    assert asyncio.run(reader.history.status_at("nobody", at())) is None


# events by id


def test_events_behind_an_id_come_in_their_order(reader: Reader) -> None:
    async def read() -> None:
        last = await reader.history.last_event()
        every, _ = await reader.history.events_after(0, None, (), 1000)
        assert [row[1] for row in every] == list(range(1, last + 1))
        assert await reader.history.events_after(last - 2, None, (), 1000) == Page(every[-2:], None)
        errors = [row for row in every if (row[2], row[4]) == ("etl", "error")][:2]
        assert await reader.history.events_after(0, "etl", ("error",), 2) == Page(errors, str(errors[-1][1]))
        assert await reader.history.events_after(0, "nobody", (), 10) == Page([], None)

    asyncio.run(read())


def test_large_events_come_a_few_at_a_time(reader: Reader) -> None:
    async def read() -> None:
        last = await reader.history.last_event()
        for _ in range(30):
            reader.store.put(Event("command", NOW_US, "feed", data={"data": "x" * 500_000}))
        await asyncio.wrap_future(reader.store.flush())
        page = await reader.history.events_after(last, None, (), 500)
        assert 1 < len(page.rows) < 30
        assert page.next == str(page.rows[-1][1])

    asyncio.run(read())


# refusals


@pytest.mark.parametrize(
    ("what", "given", "message"),
    [
        ("history", {"limt": 5}, "did you mean 'limit'"),
        ("runs", {"fields": "a"}, "no such parameter"),
        ("metrics", {"kind": "state"}, "no such parameter"),
        ("history", {"limit": 0}, "1 to 10000"),
        ("history", {"limit": 10_001}, "1 to 10000"),
        ("history", {"limit": "²"}, "1 to 10000"),
        ("history", {"order": "up"}, "desc or asc"),
        ("history", {"run": "one"}, "takes a number"),
        ("history", {"run": 1 << 63}, "takes a number"),
        ("history", {"every": "0s"}, "length of time"),
        ("history", {"since": "yesterday"}, "ISO time"),
        ("events", {"kind": "a,,b"}, "no such events as 'a'; there are: adopted, "),
        ("events", {"kind": "command,stat"}, "did you mean 'state'"),
        ("history", {"fields": ",".join(f"f{n}" for n in range(51))}, "at most 50"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(what: What, given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parse(what, "feed", [(name, str(value)) for name, value in given.items()], NOW_US, all_rows=False)


def test_a_parameter_that_is_given_twice_is_refused() -> None:
    with pytest.raises(BadRequest, match="given twice"):
        parse("history", "feed", [("limit", "1"), ("limit", "2")], NOW_US, all_rows=False)


def test_a_query_that_takes_too_long_is_stopped(reader: Reader, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(module, "QUERY_SECONDS", -1.0)
    monkeypatch.setattr(module, "_PROGRESS_STEPS", 10)
    with pytest.raises(BadData, match="cannot answer within"):
        reader.page("history", "feed")


def test_a_damaged_database_is_unavailable_and_suspected(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    suspected: list[Exception] = []
    monkeypatch.setattr(reader.store, "suspect", suspected.append)
    with reader.store.readers.connect() as connection:
        driver = connection.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            driver.execute("PRAGMA query_only = off")
        connection.exec_driver_sql("ALTER TABLE sample RENAME TO lost")
        connection.commit()
    with pytest.raises(Unavailable, match="cannot read the history"):
        reader.page("metrics", "feed")
    assert len(suspected) == 1


# how it is found


def plans(reader: Reader, asked: Asked) -> list[str]:
    """Return how SQLite walks for each statement of the query."""
    told: list[tuple[str, Any]] = []
    engine: Engine = reader.store.readers

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, _ctx: Any, _many: Any) -> None:
        told.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    asyncio.run(reader.history.page(asked))
    event.remove(engine, "before_cursor_execute", note)
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver
        return [
            row[3]
            for statement, parameters in told
            for row in driver.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]


SHAPES: list[tuple[What, str | None, dict[str, Any], str]] = [
    ("history", "feed", {}, "status USING INDEX ix_status_job_id_at_us (job_id=?)"),
    ("history", "feed", {"since": "-1h"}, "status USING INDEX ix_status_job_id_at_us (job_id=? AND at_us>?)"),
    ("history", "feed", {"since": "-2h", "until": "-1h"}, "(job_id=? AND at_us>? AND at_us<?)"),
    ("history", "feed", {"fields": "orders"}, "status USING INDEX ix_status_job_id_at_us (job_id=?)"),
    ("history", "feed", {"run": FEED_RUN}, "status USING INDEX ix_status_run_id_seq (run_id=?)"),
    ("history", "feed", {"run": FEED_RUN, "since": "-1h"}, "ix_status_job_id_at_us (job_id=? AND at_us>?)"),
    ("runs", "etl", {}, "run USING INDEX ix_run_job_id_started_us (job_id=?)"),
    ("runs", "etl", {"since": "-1h"}, "run USING INDEX ix_run_job_id_started_us (job_id=? AND started_us>?)"),
    ("runs", "etl", {"run": 5}, "run USING INTEGER PRIMARY KEY (rowid=?)"),
    ("events", "etl", {}, "event USING INDEX ix_event_job_id_at_us (job_id=?)"),
    ("events", "etl", {"kind": "error"}, "event USING INDEX ix_event_job_id_kind_at_us (job_id=? AND kind=?)"),
    ("events", "etl", {"kind": "error,read"}, "event USING INDEX ix_event_job_id_kind_at_us (job_id=? AND kind=?)"),
    ("events", "etl", {"run": 5}, "event USING INDEX ix_event_run_id_at_us (run_id=?)"),
    ("events", "etl", {"run": 5, "kind": "error"}, "event USING INDEX ix_event_run_id_at_us (run_id=?)"),
    ("events", None, {}, "SCAN event USING INDEX ix_event_at_us"),
    ("events", None, {"since": "-1h"}, "event USING INDEX ix_event_at_us (at_us>?)"),
    ("events", None, {"kind": "error"}, "event USING INDEX ix_event_kind_at_us (kind=?)"),
    ("metrics", "feed", {}, "sample USING PRIMARY KEY (job_id=?)"),
    ("metrics", "feed", {"since": "-1h"}, "sample USING PRIMARY KEY (job_id=? AND at_us>?)"),
]


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("what", "job", "given", "walk"), SHAPES)
def test_every_query_walks_an_index_and_sorts_nothing(
    reader: Reader, path: Path, what: What, job: str | None, given: dict[str, Any], walk: str, paged: bool, order: str
) -> None:
    asked = reader.asked(what, job, **given, order=order, limit=1)
    if paged:
        asked = asked.behind(asked.cursor((at(2), 5)))
    found = plans(reader, asked)
    walks = [step for step in found if re.search(r"\b(status|run|event|sample)\b USING", step)]
    if paged:
        key = walk.partition(" (")[0]
        assert any(key.removeprefix("SCAN ") in step for step in walks), found
    else:
        assert any(walk in step for step in walks), found
    merged = "," in given.get("kind", "") or (what, "run" in given) == ("runs", True)
    assert merged or not any("TEMP B-TREE" in step for step in found), found
    full = [step for step in found if step.startswith("SCAN") and "event USING INDEX ix_event_at_us" not in step]
    assert merged or not full, found


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_history_over_all_jobs_walks_the_index_of_each(reader: Reader, path: Path, order: str) -> None:
    asked = reader.asked("history", None, order=order, limit=5)
    for each in (asked, asked.behind(asked.cursor((at(2), 5)))):
        found = plans(reader, each)
        assert not any(step.startswith("SCAN status") for step in found), found
        assert any("ix_status_job_id_at_us (job_id=? AND at_us>" in step for step in found) or order == "asc", found


def test_the_reach_over_all_jobs_bounds_what_is_sorted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = 1_700_000_000_000
    for number in range(40):
        store.put(job_row(f"j{number}"))
        store.put(run_started(run + 1 + number, f"j{number}"))
        lines = [Line(run + 1 + number, seq, seq * MINUTE_US + number, "status", "1") for seq in range(1, 201)]
        store.put_lines(run + 1 + number, lines, 9, 200).result(10)
    with store.readers.connect() as connection:
        for order in (True, False):
            asked = Asked("history", None, descending=order)
            (reach,) = walking._floor(connection, asked, (None, None), None, 100)
            counted = connection.exec_driver_sql(f"SELECT count(*) FROM status WHERE {_literal(reach)}").scalar()
            assert 100 <= counted <= 1000


def _literal(clause: Any) -> str:
    return str(clause.compile(compile_kwargs={"literal_binds": True}))


def test_samples_and_events_of_a_removed_job_can_still_be_read(store: Store) -> None:
    store.put(job_row(removed_us=9))
    store.put(Sample("etl", 1_700_000_000_000, 7, 1.0, 2, 3, 4))
    store.put(Event("state", 8, "etl", data={"to": "stopped"}))
    store.flush().result(10)
    reader = Reader(store)
    assert len(reader.rows("metrics", "etl")) == len(reader.rows("events", "etl")) == 1
    reader.history.close()
