"""Forgets old history, a little at a time: one step, then whatever there is to write, then the next step.

A step is one transaction; how many rows it takes is learnt from how long the last one took. The newest status, event
and run of a job stay, however old they are.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Column, Connection, Select, and_, bindparam, delete, exists, func, select, update

from harnessd.server.records import Keep
from harnessd.server.schema import event, job, run, sample, status

STEP_SECONDS = 0.003  # aimed at, so that a step stays well under 20 ms
_FIRST_ROWS, _MOST_ROWS = 50, 1000
_FEWEST_ROWS = 20  # with fewer, a slow machine would do nothing but begin and end transactions
_SUMMED_AT_ONCE = 50  # jobs
_DAY_US = 86_400 * 1_000_000


class Trim:
    """One pass over all jobs. Each step of the iteration is a transaction; it yields how many rows that took away."""

    def __init__(self, connection: Connection, now_us: int, keep: Keep, by_job: Mapping[str, Keep]) -> None:
        self._connection = connection
        self._now_us = now_us
        self._keep = keep
        self._by_job = by_job
        self._rows = _FIRST_ROWS

    def __iter__(self) -> Iterator[int]:
        with self._connection.begin():
            jobs = self._connection.execute(_OLDEST).all()
        for first in range(0, len(jobs), _SUMMED_AT_ONCE):
            some = jobs[first : first + _SUMMED_AT_ONCE]
            rows = self._sums([job_id for job_id, *_ in some])
            yield 0  # nothing was taken away, and what waits to be written comes first
            for job_id, name, *oldest_us in some:
                keep = self._by_job.get(name, self._keep)
                cutoff_us = self._cutoff_us(keep)
                if any(at_us is not None and at_us < cutoff_us for at_us in oldest_us):
                    yield from self._old(job_id, cutoff_us)
                if rows.get(job_id, 0) > keep.rows:
                    yield from self._surplus(job_id, keep.rows)
        yield from self._repeat(lambda limit: self._events(None, self._cutoff_us(self._keep), limit))

    def _cutoff_us(self, keep: Keep) -> int:
        return self._now_us - int(keep.days * _DAY_US)

    def _old(self, id: int, cutoff_us: int) -> Iterator[int]:
        with self._connection.begin():
            newest = self._connection.scalar(_NEWEST, {"id": id})
        old = and_(status.c.job_id == id, status.c.at_us < cutoff_us, status.c.id != newest)
        yield from self._repeat(lambda limit: self._statuses(select(status.c.id, status.c.run_id).where(old), limit))
        yield from self._repeat(lambda limit: self._samples(id, cutoff_us, limit))
        yield from self._repeat(lambda limit: self._events(id, cutoff_us, limit))
        yield from self._repeat(lambda limit: self._runs(id, cutoff_us, limit))

    def _surplus(self, id: int, rows: int) -> Iterator[int]:
        surplus = self._sums([id]).get(id, 0) - rows  # counted anew, as what was old is gone by now
        oldest = select(status.c.id, status.c.run_id).where(status.c.job_id == id)
        while surplus > 0:
            most = surplus
            gone = self._step(lambda limit: self._statuses(oldest, min(limit, most)))  # noqa: B023  # called at once
            yield gone
            surplus = surplus - gone if gone else 0

    def _repeat(self, take: Callable[[int], int]) -> Iterator[int]:
        while gone := self._step(take):
            yield gone

    def _step(self, take: Callable[[int], int]) -> int:
        """Take away so many rows in one transaction, and learn how many the next should be."""
        began = time.monotonic()
        with self._connection.begin():
            gone = take(self._rows)
        fast = time.monotonic() - began < STEP_SECONDS
        self._rows = min(_MOST_ROWS, self._rows * 5 // 4 + 1) if fast else max(_FEWEST_ROWS, self._rows // 4)
        return gone

    def _statuses(self, which: Select[Any], limit: int) -> int:
        rows = self._connection.execute(which.order_by(status.c.at_us).limit(limit)).all()
        self._delete(status.c.id, [row.id for row in rows])
        counts = [{"id_": run_id, "gone": gone} for run_id, gone in Counter(row.run_id for row in rows).items()]
        if counts:
            self._connection.execute(_FEWER, counts)
        return len(rows)

    def _samples(self, id: int, cutoff_us: int, limit: int) -> int:
        old = select(sample.c.at_us).where(sample.c.job_id == id, sample.c.at_us < cutoff_us)
        times = self._connection.scalars(old.order_by(sample.c.at_us).limit(limit)).all()
        if times:
            gone = delete(sample).where(sample.c.job_id == id, sample.c.at_us <= times[-1])
            self._connection.execute(gone)
        return len(times)

    def _events(self, id: int | None, cutoff_us: int, limit: int) -> int:
        newest = select(func.max(event.c.id)).scalar_subquery()  # the next id is counted from it
        old = select(event.c.id).where(event.c.job_id == id, event.c.at_us < cutoff_us, event.c.id != newest)
        return self._delete(event.c.id, self._connection.scalars(old.order_by(event.c.at_us).limit(limit)).all())

    def _runs(self, id: int, cutoff_us: int, limit: int) -> int:
        newest = select(func.max(run.c.id)).where(run.c.job_id == id).scalar_subquery()
        old = select(run.c.id).where(run.c.job_id == id, run.c.id != newest, run.c.ended_us < cutoff_us)
        empty = old.where(run.c.journal_done, ~exists().where(status.c.run_id == run.c.id))
        return self._delete(run.c.id, self._connection.scalars(empty.order_by(run.c.id).limit(limit)).all())

    def _delete(self, key: Column[Any], ids: Sequence[Any]) -> int:
        if ids:
            self._connection.execute(delete(key.table).where(key.in_(ids)))
        return len(ids)

    def _sums(self, ids: list[int]) -> dict[int, int]:
        """Return how many statuses each of the jobs has."""
        with self._connection.begin():
            found = self._connection.execute(_ROWS, {"ids": ids})
            return {row.job_id: row.rows for row in found}


def _oldest(at_us: Column[Any], job_id: Column[Any]) -> Any:
    return select(func.min(at_us)).where(job_id == job.c.id).scalar_subquery()


# Most jobs have nothing old: one query that indexes answer tells that of all of them.
_OLDEST = select(
    job.c.id,
    job.c.name,
    _oldest(status.c.at_us, status.c.job_id),
    _oldest(sample.c.at_us, sample.c.job_id),
    _oldest(event.c.at_us, event.c.job_id),
    _oldest(run.c.started_us, run.c.job_id),
)
_ROWS = (
    select(run.c.job_id, func.sum(run.c.status_rows).label("rows"))
    .where(run.c.job_id.in_(bindparam("ids", expanding=True)))
    .group_by(run.c.job_id)
)
_NEWEST = (
    select(status.c.id)
    .where(status.c.job_id == bindparam("id"))
    .order_by(status.c.at_us.desc(), status.c.id.desc())
    .limit(1)
)
_FEWER = update(run).where(run.c.id == bindparam("id_")).values(status_rows=run.c.status_rows - bindparam("gone"))
