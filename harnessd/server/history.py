"""Reads what the store has kept: pages of statuses, runs, events and samples, and the status as of a moment.

Every page is a walk along an index from where the page before it ended; no query counts, skips or sorts rows that it
does not return. Rows of one job are walked by (job, time). A run's statuses are walked by their numbers; with a window
of time as well, by time within the run's life. Statuses of all jobs have no index of their own, as it would cost every
status that is stored: `_floor` finds how far back a page can reach at most, job by job, in the index of each.

Long answers are many short reads, so that a slow client never holds a snapshot that keeps the write-ahead log growing.
"""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, Table, and_, literal_column, or_, select, text, true, tuple_
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from harnessd.errors import BadData, Unavailable
from harnessd.server import schema
from harnessd.server.asked import Asked, What
from harnessd.server.fields import Dialect, pick
from harnessd.server.store import Store
from harnessd.server.timespan import iso

CHUNK_ROWS = 250  # read in one go
PAGE_BYTES = 8 << 20  # of JSON in rows, about; a page with more ends early
READERS = 4  # queries at a time
QUERY_SECONDS = 30.0
LIFE_MARGIN_US = 60_000_000  # a run's rows may bear times that much outside of its life, as clocks are corrected
_PROGRESS_STEPS = 1_000_000  # of SQLite's machine, between two looks at the time: some 10 ms

Args = ParamSpec("Args")
Result = TypeVar("Result")


class Json(str):
    """Text that is JSON already."""

    __slots__ = ()


Row = tuple[Any, ...]


class Page(NamedTuple):
    rows: list[Row]
    next: str | None  # the cursor to the rows behind these


class _Source(NamedTuple):
    """A table as it is asked for. `time` and `id` are its order; `id` alone need not be unique over all jobs."""

    table: Table
    time: ColumnElement[Any]
    id: ColumnElement[Any]
    run: ColumnElement[Any]
    columns: dict[str, ColumnElement[Any]]
    json: str | None = None  # the column that holds JSON
    times: tuple[str, ...] = ("at",)


_status, _run, _event, _sample = schema.status.c, schema.run.c, schema.event.c, schema.sample.c
_NAME = schema.job.c.name
SOURCES: dict[What, _Source] = {
    "history": _Source(
        schema.status,
        _status.at_us,
        _status.id,
        _status.run_id,
        {"at": _status.at_us, "job": _NAME, "run": _status.run_id, "seq": _status.seq, "status": _status.status},
        json="status",
    ),
    "runs": _Source(
        schema.run,
        _run.started_us,
        _run.id,
        _run.id,
        {"run": _run.id, "job": _NAME, "pid": _run.pid, "started": _run.started_us, "ended": _run.ended_us}
        | {name: _run[name] for name in ("wall_s", "exit_code", "signal", "reason", "cpu_s", "peak_rss_bytes")},
        times=("started", "ended"),
    ),
    "events": _Source(
        schema.event,
        _event.at_us,
        _event.id,
        _event.run_id,
        {"at": _event.at_us, "id": _event.id, "job": _NAME, "run": _event.run_id}
        | {name: _event[name] for name in ("kind", "actor", "data")},
        json="data",
    ),
    "metrics": _Source(
        schema.sample,
        _sample.at_us,
        _sample.job_id,
        _sample.run_id,
        {"at": _sample.at_us, "job": _NAME, "run": _sample.run_id}
        | {name: _sample[name] for name in ("cpu_percent", "rss_bytes", "threads", "fds")},
    ),
}
_BUCKET_COLUMNS = ("bucket", "rows", "min", "max", "mean")


def columns(asked: Asked) -> tuple[str, ...]:
    """Return the names of what is in a row."""
    return (*SOURCES[asked.what].columns, *(_BUCKET_COLUMNS if asked.every_us else ()))


class History:
    """Reads the database of a store. Its methods wait for the database: `ask` has a thread do that."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._slots = asyncio.Semaphore(READERS)

    async def ask(
        self, method: Callable[Concatenate[History, Args], Result], *args: Args.args, **kwargs: Args.kwargs
    ) -> Result:
        """Call the method in a thread. Raise Unavailable when the database fails, BadData when it takes too long."""
        async with self._slots:
            try:
                return await asyncio.to_thread(method, self, *args, **kwargs)
            except (SQLAlchemyError, sqlite3.Error, OSError) as error:
                if _was_stopped(error):
                    raise BadData(
                        f"cannot answer within {QUERY_SECONDS:g} s: ask for less, with since=, until=, or a shorter every="
                    ) from None
                self._store.suspect(error)
                raise Unavailable(f"cannot read the history: {getattr(error, 'orig', None) or error}") from error

    def has_job(self, name: str) -> bool:
        """Return whether anything may be kept of a job of that name, be it one that was removed."""
        with self._reading() as connection:
            return _job_id(connection, name) is not None

    def page(self, asked: Asked) -> Page:
        """Return the rows from the cursor on, as many as asked for or as fit, and the cursor to the next ones."""
        rows: list[Row] = []
        bytes_left = PAGE_BYTES
        limit = asked.limit or CHUNK_ROWS
        with self._reading() as connection:
            walk = _buckets(connection, asked) if asked.every_us else _walk(connection, asked, limit + 1)
            after = (0, 0)
            for key, row in walk:
                if len(rows) >= limit or bytes_left <= 0:
                    return Page(rows, asked.cursor(after))
                rows.append(row)
                after = key
                bytes_left -= sum(len(value) for value in row if type(value) is Json)
        return Page(rows, None)

    def status_at(self, job: str, at_us: int) -> Row | None:
        """Return the row of the job's last status that is not later than the moment."""
        with self._reading() as connection:
            asked = Asked("history", job, until_us=at_us + 1, limit=1)
            return next((row for _, row in _walk(connection, asked, 1)), None)

    def last_event(self) -> int:
        """Return the id of the newest event, 0 when there is none."""
        with self._reading() as connection:
            return connection.scalar(select(_event.id).order_by(_event.id.desc()).limit(1)) or 0

    def events_after(self, id: int, job: str | None, kinds: Sequence[str], limit: int) -> list[Row]:
        """Return the rows of the next events behind that id, in their order."""
        with self._reading() as connection:
            query = events_after(id, None if job is None else _job_id(connection, job) or 0, kinds, limit)
            return [_row(SOURCES["events"], row) for row in connection.execute(query)]

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._store.readers.connect() as connection:
            driver = connection.connection.driver_connection
            if not isinstance(driver, sqlite3.Connection):
                connection.execute(text(f"SET LOCAL statement_timeout = {int(QUERY_SECONDS * 1000)}"))
                yield connection
                return
            deadline = time.monotonic() + QUERY_SECONDS
            driver.set_progress_handler(lambda: time.monotonic() > deadline, _PROGRESS_STEPS)
            try:
                yield connection
            finally:
                driver.set_progress_handler(None, 0)


# the walk


def _walk(connection: Connection, asked: Asked, limit: int) -> Iterator[tuple[tuple[int, int], Row]]:
    """Yield at most so many rows in their order, each with its key."""
    source = _source(asked)
    job_id = None if asked.job is None else _job_id(connection, asked.job)
    if asked.job is not None and job_id is None:
        return
    dialect: Dialect = connection.dialect.name
    window = _within_life(connection, asked)
    after = asked.after
    while limit > 0 and window is not None:
        wanted = min(limit, CHUNK_ROWS)
        where = [*_conditions(source, asked, job_id, window), *_behind(source, asked, after)]
        if asked.what == "history" and job_id is None and asked.run is None:
            where += _floor(connection, asked, window, after, wanted)
        query = _query(source, asked, where, dialect).limit(wanted).execution_options(yield_per=32)
        found = 0
        for row in connection.execute(query):
            found += 1
            after = (row[0], row[1])
            yield after, _row(source, row[2:], asked.fields)
        limit -= found
        if found < wanted:
            return


Window = tuple[int | None, int | None]  # from, and before


def _source(asked: Asked) -> _Source:
    source = SOURCES[asked.what]
    return source._replace(time=_status.seq) if asked.key == "seq" else source


def _query(source: _Source, asked: Asked, where: Sequence[ColumnElement[bool]], dialect: Dialect) -> Select[Any]:
    shown = dict(source.columns)
    if asked.fields:
        shown["status"] = pick(_status.status, [path for _, path in asked.fields], dialect).label("status")
    inner = asked.what != "events"
    keys = (source.time.label("key_1"), source.id.label("key_2"))
    query = select(*keys, *shown.values()).select_from(source.table.join(schema.job, isouter=not inner, onclause=_OF[asked.what]))
    order = [key.desc() if asked.descending else key.asc() for key in (source.time, source.id)]
    return query.where(*where).order_by(*order)


_OF: dict[What, ColumnElement[bool]] = {
    # The plus keeps SQLite from beginning with the table of jobs: rows are walked, and the job of each is looked up.
    what: schema.job.c.id == literal_column(f"+{source.table.name}.job_id")
    for what, source in SOURCES.items()
}


def _conditions(
    source: _Source, asked: Asked, job_id: int | None, window: Window
) -> Iterator[ColumnElement[bool]]:
    since, until = window
    time_of = SOURCES[asked.what].time
    by_run = asked.run is not None and (asked.key == "seq" or asked.what in ("runs", "events"))
    if job_id is not None:
        table = source.table
        yield literal_column(f"+{table.name}.job_id") == job_id if by_run else table.c.job_id == job_id
    if asked.run is not None:
        yield source.run == asked.run if by_run else literal_column(f"+{source.run}") == asked.run
    if since is not None:
        yield time_of >= since
    if until is not None:
        yield time_of < until
    if asked.kinds:
        yield _event.kind.in_(asked.kinds)


def _behind(source: _Source, asked: Asked, after: tuple[int, int] | None) -> Iterator[ColumnElement[bool]]:
    if after is None:
        return
    # The first condition is what an index walk can begin at, the second tells rows of one moment apart.
    if asked.descending:
        yield source.time <= after[0]
        yield or_(source.time < after[0], source.id < after[1])
    else:
        yield source.time >= after[0]
        yield or_(source.time > after[0], source.id > after[1])


def _within_life(connection: Connection, asked: Asked) -> Window | None:
    """Return the window, for the rows of one run no wider than its life; None when no row can be in it."""
    since, until = asked.since_us, asked.until_us
    if asked.run is None or asked.key == "seq" or asked.what in ("runs", "events"):
        return since, until
    life = connection.execute(select(_run.started_us, _run.ended_us).where(_run.id == asked.run)).first()
    if life is None:
        return None
    since = max(since or 0, life.started_us - LIFE_MARGIN_US)
    if life.ended_us is not None:
        until = min(math.inf if until is None else until, life.ended_us + LIFE_MARGIN_US)  # type: ignore[assignment]
    return since, until
