"""Walks the tables along their indexes, a page at a time, from where the page before it ended.

No walk counts, skips or sorts rows that it does not return, save few. Rows of one job are walked by (job, time). A
run's statuses are walked by their numbers; with a window of time as well, by time within the run's life. Statuses of
all jobs have no index of their own, as every status that is stored would pay for it: `_floor` finds how far back a page
can reach at most, in the index of each job.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Join, Select, Table, literal_column, or_, select, union_all
from sqlalchemy import Row as RowOf

from harnessd import tree
from harnessd.server import schema
from harnessd.server.asked import Asked, Path, What
from harnessd.server.fields import named, pick
from harnessd.server.rows import Json, Row
from harnessd.server.timespan import iso
from harnessd.server.tokens import matches

CHUNK_ROWS = 250  # of all jobs, whose order is found in one go
LIFE_MARGIN_US = 60_000_000  # a run's rows may bear times that much outside of its life, as clocks are corrected


class Source(NamedTuple):
    """A table as it is asked for. `time` and `id` are its order; `id` alone need not be unique over all jobs."""

    table: Table
    time: ColumnElement[Any]
    id: ColumnElement[Any]
    run: ColumnElement[Any]
    columns: dict[str, ColumnElement[Any]]
    json: int | None = None  # the place of the column that holds JSON
    times: tuple[int, ...] = (0,)


_status, _run, _event, _sample = schema.status.c, schema.run.c, schema.event.c, schema.sample.c
_NAME, _id = schema.job.c.name, schema.job.c.id
SOURCES: dict[What, Source] = {
    "history": Source(
        schema.status,
        _status.at_us,
        _status.id,
        _status.run_id,
        {"at": _status.at_us, "job": _NAME, "run": _status.run_id, "seq": _status.seq, "status": _status.status},
        json=4,
    ),
    "runs": Source(
        schema.run,
        _run.started_us,
        _run.id,
        _run.id,
        {"run": _run.id, "job": _NAME, "pid": _run.pid, "started": _run.started_us, "ended": _run.ended_us}
        | {name: _run[name] for name in ("wall_s", "exit_code", "signal", "reason", "cpu_s", "peak_rss_bytes")},
        times=(3, 4),
    ),
    "events": Source(
        schema.event,
        _event.at_us,
        _event.id,
        _event.run_id,
        {"at": _event.at_us, "id": _event.id, "job": _NAME, "run": _event.run_id}
        | {name: _event[name] for name in ("kind", "actor", "data")},
        json=6,
    ),
    "metrics": Source(
        schema.sample,
        _sample.at_us,
        _sample.job_id,
        _sample.run_id,
        {"at": _sample.at_us, "job": _NAME, "run": _sample.run_id}
        | {name: _sample[name] for name in ("cpu_percent", "rss_bytes", "threads", "fds")},
    ),
}

Key = tuple[int, int]
Found = tuple[Key, Row, int]  # and what it weighs of what a page may be, in bytes
Window = tuple[int | None, int | None]  # from, and before
Wheres = list[ColumnElement[bool]]


def walk(connection: Connection, asked: Asked, limit: int) -> Generator[Found, None, None]:
    """Yield at most so many rows in their order."""
    if asked.among is not None:
        asked = replace(asked, job_ids=_matching(connection, asked.among))
    job_id = None if asked.job is None else job_id_of(connection, asked.job)
    if asked.job is None or job_id is not None:
        yield from walk_job(connection, asked, job_id, limit)


def walk_job(connection: Connection, asked: Asked, job_id: int | None, limit: int) -> Generator[Found, None, None]:
    """Do the same for the job of that number, or for all of them."""
    window = within_life(connection, asked, job_id)
    if window is None:
        return
    source, after = _source(asked), asked.after
    while limit > 0:
        wanted = min(limit, CHUNK_ROWS) if asked.over_all else limit
        floor = _floor(connection, asked, window, after, wanted) if asked.over_all else []
        query = _query(source, asked, [*wheres(source, asked, job_id, window, after), *floor], wanted)
        found = 0
        with connection.execute(query(connection.dialect.name).execution_options(yield_per=32)) as rows:
            for row in rows:
                found += 1
                after = (row[0], row[1])
                shown, weight = _shown(source, row[2:], asked.fields)
                yield after, shown, weight
        limit -= found
        if found < wanted:
            return


def _source(asked: Asked) -> Source:
    source = SOURCES[asked.what]
    return source._replace(time=_status.seq) if asked.key == "seq" else source


def _query(source: Source, asked: Asked, where: Wheres, limit: int) -> Callable[[str], Select[Any]]:
    """Return what makes the statement for a dialect."""

    def made(dialect: str) -> Select[Any]:
        shown = dict(source.columns)
        if asked.fields:
            shown["status"] = pick(_status.status, [path for _, path in asked.fields], dialect)
        named = [column.label(f"shown_{name}") for name, column in shown.items()]
        rows = select(source.time.label("key_1"), source.id.label("key_2"), *named).select_from(
            _with_job(source, asked.over_all)
        )
        rows = rows.where(*where)
        if len(asked.kinds) < 2 or asked.run is not None:
            return rows.order_by(*_order(asked, source.time, source.id)).limit(limit)
        # An IN would be sorted as a whole: each kind is a walk of its own.
        each = [
            rows.where(_event.kind == kind).order_by(*_order(asked, source.time, source.id)).limit(limit).subquery()
            for kind in asked.kinds
        ]
        merged = union_all(*map(select, each)).subquery()
        return select(merged).order_by(*_order(asked, merged.c.key_1, merged.c.key_2)).limit(limit)

    return made


def _order(asked: Asked, *keys: ColumnElement[Any]) -> list[ColumnElement[Any]]:
    return [key.desc() if asked.descending else key.asc() for key in keys]


def _with_job(source: Source, each_job: bool = False) -> Join:
    """Return the table with the job of each row; or with `each_job` every job with its rows. Events may have no job."""
    job_of, job_id = source.table.c.job_id, schema.job.c.id
    is_of = job_of == _unindexed(job_id) if each_job else job_id == _unindexed(job_of)
    return source.table.join(schema.job, is_of, isouter=source.table is schema.event)


def _unindexed(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return the column such that SQLite does not choose an index for it."""
    return literal_column(f"+{column}")


def wheres(source: Source, asked: Asked, job_id: int | None, window: Window, after: Key | None) -> Wheres:
    since, until = window
    time_of, job_of = SOURCES[asked.what].time, source.table.c.job_id
    walks_run = asked.run is not None and (asked.key == "seq" or asked.what in ("runs", "events"))
    where: Wheres = []
    if job_id is not None:
        where.append((_unindexed(job_of) if walks_run else job_of) == job_id)
    if asked.job_ids is not None:
        where.append(_unindexed(job_of).in_(asked.job_ids))
    if asked.run is not None:
        where.append((source.run if walks_run else _unindexed(source.run)) == asked.run)
    if since is not None:
        where.append(time_of >= since)
    if until is not None:
        where.append(time_of < until)
    if len(asked.kinds) == 1 and not walks_run:
        where.append(_event.kind == asked.kinds[0])
    elif asked.kinds and walks_run:
        where.append((_event.kind + "").in_(asked.kinds))
    return where + _behind(source.time, source.id, asked, after)


def _behind(time_of: ColumnElement[Any], id_of: ColumnElement[Any], asked: Asked, after: Key | None) -> Wheres:
    """Return the conditions for what is behind the key: where to begin in the index, and which rows of that moment."""
    if after is None:
        return []
    if asked.descending:
        return [time_of <= after[0], or_(time_of < after[0], id_of < after[1])]
    return [time_of >= after[0], or_(time_of > after[0], id_of > after[1])]


def within_life(connection: Connection, asked: Asked, job_id: int | None) -> Window | None:
    """Return the window, for the rows of one run no wider than its life; None when no row can be in it.

    Rows of a run during which the clock was set may bear any time.
    """
    since, until = asked.since_us, asked.until_us
    if asked.run is None:
        return since, until
    life = connection.execute(select(schema.run).where(_run.id == asked.run)).first()
    if life and job_id not in (None, life.job_id):
        return None
    if life is None or asked.key == "seq" or asked.what in ("runs", "events") or _clock_was_set(life):
        return since, until
    since = max(since or 0, life.started_us - LIFE_MARGIN_US)
    ends = [end for end in (until, life.ended_us and life.ended_us + LIFE_MARGIN_US) if end is not None]
    return since, min(ends, default=None)


def _clock_was_set(life: RowOf[Any]) -> bool:
    """Return whether the run's length by the wall clock is another than by the monotonic one, or nobody knows."""
    if life.ended_us is None:
        wall_us, mono_s = time.time_ns() // 1000 - life.started_us, tree.age_s(life.start_ticks)
    else:
        wall_us, mono_s = life.ended_us - life.started_us, life.mono_s
    return mono_s is None or bool(abs(wall_us - mono_s * 1e6) > LIFE_MARGIN_US)


def _floor(connection: Connection, asked: Asked, window: Window, after: Key | None, wanted: int) -> Wheres:
    """Return how far the next `wanted` rows of all jobs reach at most, so that no more than about these are sorted.

    They do not reach further than the last of `wanted` rows of any one job; nor further than `few` rows in each of so
    many jobs that these make `wanted`.
    """
    few = math.isqrt(wanted - 1) + 1
    many = -(-wanted // few)
    one = schema.status.alias()
    where = [one.c.job_id == schema.job.c.id, *_behind(one.c.at_us, one.c.id, asked, after)]
    where += [one.c.at_us >= window[0]] if window[0] is not None else []
    where += [one.c.at_us < window[1]] if window[1] is not None else []
    back = select(one.c.at_us).where(*where).order_by(*_order(asked, one.c.at_us, one.c.id)).limit(1)
    nth = (back.offset(number - 1).scalar_subquery() for number in (few, wanted))
    jobs = select(*nth).select_from(schema.job)
    reach = connection.execute(jobs if asked.job_ids is None else jobs.where(_id.in_(asked.job_ids))).all()
    fews = sorted((row[0] for row in reach if row[0] is not None), reverse=asked.descending)
    reaches = [row[1] for row in reach if row[1] is not None] + fews[many - 1 : many]
    if not reaches:
        return []
    return [_status.at_us >= max(reaches)] if asked.descending else [_status.at_us <= min(reaches)]


def _shown(source: Source, values: Sequence[Any], fields: Sequence[tuple[str, Path]] = ()) -> tuple[Row, int]:
    """Return the row, and how many bytes of JSON are in it."""
    row = list(values)
    for place in source.times:
        if row[place] is not None:
            row[place] = iso(row[place])
    if source.json is None:
        return tuple(row), 0
    text = row[source.json]
    row[source.json] = shown = Json(named([name for name, _ in fields], text) if fields else text)
    return tuple(row), len(shown)


def shown_event(values: Sequence[Any]) -> tuple[Row, int]:
    """Return the row of an event that `events_after` has found, and how many bytes of JSON are in it."""
    return _shown(SOURCES["events"], values)


def events_after(id: int, job_id: int | None, kinds: Sequence[str], limit: int) -> Select[Any]:
    """Return the query for events by their ids."""
    source = SOURCES["events"]
    query = select(*source.columns.values()).select_from(_with_job(source)).where(_event.id > id)
    if job_id is not None:
        query = query.where(_unindexed(_event.job_id) == job_id)
    if kinds:
        query = query.where((_event.kind + "").in_(kinds))
    return query.order_by(_event.id).limit(limit)


def _matching(connection: Connection, globs: Sequence[str]) -> tuple[int, ...]:
    return tuple(row.id for row in connection.execute(select(_id, _NAME)) if matches(row.name, globs))


def job_id_of(connection: Connection, name: str) -> int | None:
    return connection.scalar(select(schema.job.c.id).where(schema.job.c.name == name))
