"""Reads what the store has kept: pages of statuses, runs, events and samples, and the status as of a moment.

Queries run in threads of their own, few at a time, and each has a limit of time. Long answers are many short reads, so
that a slow client never holds a snapshot that keeps the write-ahead log growing.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TypeVar

from sqlalchemy import Connection, select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from harnessd.errors import BadData, Unavailable
from harnessd.server import schema
from harnessd.server.asked import Asked
from harnessd.server.buckets import buckets
from harnessd.server.rows import Page, Row
from harnessd.server.store import Store
from harnessd.server.walk import events_after, job_id_of, shown_event, walk

STREAM_ROWS = 1000  # a page of a long answer
PAGE_WEIGHT = 8 << 20  # bytes of JSON in rows, about; a page with more ends early
PAGE_SECONDS = 5.0  # a page that takes longer ends early, too: many short statements, of which none is stopped
THREADS = 4
QUERY_SECONDS = 30.0
_PROGRESS_STEPS = 1_000_000  # of SQLite's machine, between two looks at the time: some 10 ms

Result = TypeVar("Result")


class History:
    """Reads the database of a store. Methods raise Unavailable when it fails, BadData when it takes too long."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="harnessd-history")
        self._closing = False

    def close(self) -> None:
        """Answer nothing more, and stop the queries under way."""
        self._closing = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def page(self, asked: Asked) -> Page:
        """Return the rows from the cursor on, as many as asked for or as fit, and the cursor to the next ones."""
        return await self._ask(lambda connection: self._page(connection, asked))

    async def status_at(self, job: str, at_us: int) -> Row | None:
        """Return the row of the job's last status that is not later than the moment."""
        asked = Asked("history", job, until_us=at_us + 1, limit=1)
        page = await self.page(asked)
        return page.rows[0] if page.rows else None

    async def has_job(self, name: str) -> bool:
        """Return whether anything may be kept of a job of that name, be it one that was removed."""
        return await self._ask(lambda connection: job_id_of(connection, name) is not None)

    async def last_event(self) -> int:
        """Return the id of the newest event, 0 when there is none."""
        newest = select(schema.event.c.id).order_by(schema.event.c.id.desc()).limit(1)
        return await self._ask(lambda connection: connection.scalar(newest) or 0)

    async def events_after(self, id: int, job: str | None, kinds: Sequence[str], limit: int) -> Page:
        """Return the rows of the next events behind that id, in their order, as many as asked for or as fit."""

        def read(connection: Connection) -> Page:
            job_id = None if job is None else job_id_of(connection, job) or 0
            query = events_after(id, job_id, kinds, limit).execution_options(yield_per=32)
            rows: list[Row] = []
            room = PAGE_WEIGHT
            with connection.execute(query) as found:
                for values in found:
                    row, weight = shown_event(values)
                    rows.append(row)
                    room -= weight
                    if len(rows) == limit or room <= 0:
                        return Page(rows, str(row[1]))
            return Page(rows, None)

        return await self._ask(read)

    def _page(self, connection: Connection, asked: Asked) -> Page:
        limit = asked.limit or STREAM_ROWS
        rows: list[Row] = []
        room, last, until = PAGE_WEIGHT, (0, 0), time.monotonic() + PAGE_SECONDS
        with closing(buckets(connection, asked) if asked.every_us else walk(connection, asked, limit + 1)) as found:
            for key, row, weight in found:
                is_late = bool(rows) and (self._closing or time.monotonic() > until)
                if len(rows) >= limit or room <= 0 or is_late:
                    return Page(rows, asked.cursor(last))
                rows.append(row)
                last = key
                room -= weight
        return Page(rows, None)

    async def _ask(self, read: Callable[[Connection], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, read)
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            if _was_stopped(error):
                raise BadData(
                    f"cannot answer within {QUERY_SECONDS:g} s: ask for less with since= and until="
                ) from None
            self._store.suspect(error)
            raise Unavailable(f"cannot read the history: {getattr(error, 'orig', None) or error}") from error

    def _read(self, read: Callable[[Connection], Result]) -> Result:
        with self._store.readers.connect() as connection, self._limited(connection):
            return read(connection)

    @contextmanager
    def _limited(self, connection: Connection) -> Iterator[None]:
        """Have the database stop what takes too long."""
        driver = connection.connection.driver_connection
        if not isinstance(driver, sqlite3.Connection):
            connection.execute(text(f"SET LOCAL statement_timeout = {int(QUERY_SECONDS * 1000)}"))
            yield
            return
        deadline = time.monotonic() + QUERY_SECONDS
        driver.set_progress_handler(lambda: self._closing or time.monotonic() > deadline, _PROGRESS_STEPS)
        try:
            yield
        finally:
            driver.set_progress_handler(None, 0)


def _was_stopped(error: BaseException) -> bool:
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", None) or getattr(cause, "sqlstate", None)
    return code in (sqlite3.SQLITE_INTERRUPT, "57014")
