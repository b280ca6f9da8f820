"""Some hours of three jobs, put into a store as a server does."""

from __future__ import annotations

import json
from collections.abc import Iterator

from helpers.rows import job_row, run_started

from harnessd.server.records import Event, JournalDone, Record, RunEnded, Sample
from harnessd.server.store import Store
from harnessd.server.tape import Line

BEGAN_US = 1_768_471_200_000_000  # 2026-01-15T10:00:00Z
SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US


def at(hours: float = 0, minutes: float = 0, seconds: float = 0) -> int:
    """Return the moment so long after the beginning."""
    return BEGAN_US + round(hours * HOUR_US + minutes * MINUTE_US + seconds * SECOND_US)


def run_id(began_us: int) -> int:
    return began_us // 1000


def some_hours(store: Store) -> None:
    """Fill the store with six hours.

    `feed` runs all the time, says each minute how many orders it has seen (a gap of 40 minutes from 3:00 on), and is
    sent a config at 1:00, which it reads 0.25 s later, and one at 2:00, which it never reads. `etl` crashes at the end
    of each of three runs of an hour and is started again a minute later, then killed at 5:00. `idle` never said
    anything.
    """
    for name in ("feed", "etl", "idle"):
        store.put(job_row(name, changed_us=at(), ever_up=True))
    for record in _feed():
        store.put(record)
    minutes = [minute for minute in range(360) if not 180 < minute < 220]
    feed = [
        Line(
            run_id(at()), seq, at(minutes=minute), "status", json.dumps({"orders": minute * 10, "book": {"bid": 99.5}})
        )
        for seq, minute in enumerate(minutes, 1)
    ]
    store.put_lines(run_id(at()), feed, 100, len(feed))
    for number, (began_us, ended_us) in enumerate(_etl_runs()):
        run = run_id(began_us)
        store.put(run_started(run, "etl", pid=50 + number, started_us=began_us))
        seconds = range(0, (ended_us - began_us) // SECOND_US, 600)
        lines = [
            Line(run, seq, began_us + second * SECOND_US, "status", json.dumps({"done": second / 3600, "ok": True}))
            for seq, second in enumerate(seconds, 1)
        ]
        store.put_lines(run, lines, 100, len(lines))
        for record in _etl_end(run, began_us, ended_us, number):
            store.put(record)
    store.put(Event("server-start", at(), data={"pid": 1}))
    store.put(Event("server-start", at(hours=4), data={"pid": 2}))
    store.flush().result(10)


def _feed() -> Iterator[Record]:
    run = run_id(at())
    yield run_started(run, "feed", pid=42, started_us=at())
    yield _state("feed", at(), "stopped", "starting")
    yield _state("feed", at(seconds=1), "starting", "running")
    for hours, number in ((1, 7), (2, 8)):
        data = {"id": number, "verb": "config", "data": {"limit": hours}, "queued": True}
        yield Event("command", at(hours), "feed", run, actor="token:ops@192.0.2.7:1", data=data)
    yield Event("read", at(1, seconds=0.25), "feed", run, data={"id": 7})
    for minute in range(0, 360, 10):
        yield Sample("feed", run, at(minutes=minute), 12.5 + minute % 20, 50_000_000 + minute, 3, 12)
        yield Sample("etl", run_id(at()), at(minutes=minute), 90.0, 900_000_000, 9, 40)


def _etl_runs() -> list[tuple[int, int]]:
    return [
        (at(minutes=1), at(1)),
        (at(1, 1), at(2)),
        (at(2, 1), at(3)),
        (at(3, 1), at(5)),
    ]


def _etl_end(run: int, began_us: int, ended_us: int, number: int) -> Iterator[Record]:
    yield _state("etl", began_us, "backoff", "running")
    killed = number == 3
    length_s = (ended_us - began_us) / SECOND_US
    yield RunEnded(
        run,
        ended_us,
        exit_code=None if killed else 3,
        signal=9 if killed else None,
        reason="killed" if killed else "crashed",
        cpu_s=length_s / 2,
        peak_rss_bytes=900_000_000 + number,
        wall_s=length_s,
        mono_s=length_s,
    )
    yield JournalDone(run)
    yield Event("error", ended_us, "etl", run, data={"text": "ValueError: no data"})
    yield _state("etl", ended_us, "running", "stopped" if killed else "backoff")


def _state(job: str, at_us: int, before: str, after: str) -> Event:
    return Event("state", at_us, job, data={"from": before, "to": after, "want": "up", "why": "so"})
