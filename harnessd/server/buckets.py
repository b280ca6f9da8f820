"""Sums statuses up, a row for each length of time: the last one, and what the numbers in all of them amount to."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, func, select, true

from harnessd.server import schema
from harnessd.server.asked import Asked
from harnessd.server.fields import dumps, numbers, numeric
from harnessd.server.rows import Json, Row
from harnessd.server.timespan import LATEST_US, iso
from harnessd.server.walk import SOURCES, Found, job_id_of, walk_job, wheres, within_life

_ROW_WEIGHT = 16  # so a page of buckets is made of about half a million rows


def buckets(connection: Connection, asked: Asked) -> Generator[Found, None, None]:
    """Yield a row for each bucket in which there are any: its last row, and figures of the numbers in its rows."""
    assert asked.every_us and asked.job
    width, job_id = asked.every_us, job_id_of(connection, asked.job)
    if job_id is None:
        return
    since, until = asked.since_us or 0, asked.until_us or LATEST_US
    while True:
        if asked.after and asked.descending:
            until = min(until, asked.after[0])
        elif asked.after:
            since = max(since, asked.after[0] + width)
        nearest = replace(asked, since_us=since, until_us=until, every_us=None, after=None, limit=1)
        found = list(walk_job(connection, nearest, job_id, 1))
        if not found:
            return
        ((key, last, weight),) = found
        start = key[0] // width * width
        bucket = replace(nearest, since_us=max(since, start), until_us=min(until, start + width), descending=True)
        if not asked.descending:
            ((_, last, weight),) = walk_job(connection, bucket, job_id, 1)
        count, figures = _figures(connection, bucket, job_id, last)
        yield (start, 0), (*last, iso(start), count, *figures), weight + count * _ROW_WEIGHT
        asked = replace(asked, after=(start, 0))


def _figures(connection: Connection, bucket: Asked, job_id: int, last: Row) -> tuple[int, list[Json]]:
    """Return how many rows there are, and the least, greatest and mean of each number."""
    source, status = SOURCES["history"], schema.status
    paths = bucket.fields or numeric(json.loads(last[-1]))
    window = within_life(connection, bucket, job_id) or (0, 0)
    where = wheres(source, bucket, job_id, window, None)
    count = connection.scalar(select(func.count()).select_from(status).where(*where)) or 0
    found: dict[int, Sequence[Any]] = {}
    if paths:
        each = numbers(status.c.status, [path for _, path in paths], connection.dialect.name)
        figures = (func.min(each.value), func.max(each.value), func.avg(each.value))
        query = select(each.place, *figures).select_from(status.join(each.rows, true()))
        query = query.where(*where, each.is_number).group_by(each.place)
        found = {row[0]: row[1:] for row in connection.execute(query)}
    nothing = (None, None, None)
    thirds = zip(*(found.get(place, nothing) for place in range(len(paths))), strict=True) if paths else [()] * 3
    names = [name for name, _ in paths]
    return count, [Json(dumps(dict(zip(names, third, strict=True)))) for third in thirds]
