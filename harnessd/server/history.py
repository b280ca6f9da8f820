"""Reads what the store has kept: pages of statuses, runs, events and samples, and the status as of a moment.

Long answers are many short reads, so that a slow client never holds a snapshot that keeps the write-ahead log growing.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

from sqlalchemy import Connection, select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from harnessd.errors import BadData, Unavailable
from harnessd.server import buckets, schema
from harnessd.server.asked import Asked
from harnessd.server.store import Store
from harnessd.server.walk import SOURCES, Row, events_after, job_id_of, shown_row, walk

STREAM_ROWS = 1000  # a page of a long answer
PAGE_WEIGHT = 8 << 20  # bytes of JSON in rows, about; a page with more ends early
READERS = 4  # queries at a time
QUERY_SECONDS = 30.0
_PROGRESS_STEPS = 1_000_000  # of SQLite's machine, between two looks at the time: some 10 ms

Args = ParamSpec("Args")
Result = TypeVar("Result")


class Page(NamedTuple):
    rows: list[Row]
    next: str | None  # the cursor to the rows behind these


def columns(asked: Asked) -> tuple[str, ...]:
    """Return the names of what is in a row."""
    return (*SOURCES[asked.what].columns, *(buckets.COLUMNS if asked.every_us else ()))


class History:
    """Reads the database of a store. Its methods wait for the database: `ask` has a thread do that."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="harnessd-history")
        self._closing = False

    def close(self) -> None:
        """Answer nothing more, and stop the queries under way."""
        self._closing = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def ask(
        self, method: Callable[Concatenate[History, Args], Result], *args: Args.args, **kwargs: Args.kwargs
    ) -> Result:
        """Call the method in a thread. Raise Unavailable when the database fails, BadData when it takes too long."""
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, partial(method, self, *args, **kwargs))
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            if _was_stopped(error):
                raise BadData(
                    f"cannot answer within {QUERY_SECONDS:g} s: ask for less with since= and until="
                ) from None
            self._store.suspect(error)
            raise Unavailable(f"cannot read the history: {getattr(error, 'orig', None) or error}") from error

    def has_job(self, name: str) -> bool:
        """Return whether anything may be kept of a job of that name, be it one that was removed."""
        with self._reading() as connection:
            return job_id_of(connection, name) is not None

    def page(self, asked: Asked) -> Page:
        """Return the rows from the cursor on, as many as asked for or as fit, and the cursor to the next ones."""
        rows: list[Row] = []
        room = PAGE_WEIGHT
        limit = asked.limit or STREAM_ROWS
        with self._reading() as connection:
            found = buckets.buckets(connection, asked) if asked.every_us else walk(connection, asked, limit + 1)
            after = (0, 0)
            for key, row, weight in found:
                if len(rows) >= limit or room <= 0:
                    return Page(rows, asked.cursor(after))
                rows.append(row)
                after = key
                room -= weight
        return Page(rows, None)

    def status_at(self, job: str, at_us: int) -> Row | None:
        """Return the row of the job's last status that is not later than the moment."""
        with self._reading() as connection:
            asked = Asked("history", job, until_us=at_us + 1, limit=1)
            return next((row for _, row, _ in walk(connection, asked, 1)), None)

    def last_event(self) -> int:
        """Return the id of the newest event, 0 when there is none."""
        with self._reading() as connection:
            return connection.scalar(select(schema.event.c.id).order_by(schema.event.c.id.desc()).limit(1)) or 0

    def events_after(self, id: int, job: str | None, kinds: Sequence[str], limit: int) -> list[Row]:
        """Return the rows of the next events behind that id, in their order."""
        with self._reading() as connection:
            query = events_after(id, None if job is None else job_id_of(connection, job) or 0, kinds, limit)
            return [shown_row(SOURCES["events"], row) for row in connection.execute(query)]

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._store.readers.connect() as connection:
            driver = connection.connection.driver_connection
            if not isinstance(driver, sqlite3.Connection):
                connection.execute(text(f"SET LOCAL statement_timeout = {int(QUERY_SECONDS * 1000)}"))
                yield connection
                return
            deadline = time.monotonic() + QUERY_SECONDS
            driver.set_progress_handler(lambda: self._closing or time.monotonic() > deadline, _PROGRESS_STEPS)
            try:
                yield connection
            finally:
                driver.set_progress_handler(None, 0)


def _was_stopped(error: BaseException) -> bool:
    cause = error.orig if isinstance(error, DBAPIError) else error
    return (
        getattr(cause, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT or getattr(cause, "sqlstate", "") == "57014"
    )
