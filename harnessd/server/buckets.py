"""Sums statuses up, a row for each length of time: the last one, and what the numbers in all of them amount to."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace

from sqlalchemy import Connection, func, select

from harnessd.server import schema
from harnessd.server.asked import Asked
from harnessd.server.fields import dumps, number, numeric
from harnessd.server.rows import Json, Row
from harnessd.server.timespan import LATEST_US, iso
from harnessd.server.walk import SOURCES, Found, job_id_of, walk, wheres, within_life

_ROW_WEIGHT = 16  # so a page of buckets is made of about half a million rows


def buckets(connection: Connection, asked: Asked) -> Generator[Found, None, None]:
    """Yield a row for each bucket in which there are any: its last row, and figures of the numbers in its rows."""
    assert asked.every_us
    width = asked.every_us
    since, until = asked.since_us or 0, asked.until_us or LATEST_US
    while True:
        if asked.after and asked.descending:
            until = min(until, asked.after[0])
        elif asked.after:
            since = max(since, asked.after[0] + width)
        nearest = replace(asked, since_us=since, until_us=until, every_us=None, after=None, limit=1)
        found = list(walk(connection, nearest, 1))
        if not found:
            return
        ((key, last, weight),) = found
        start = key[0] // width * width
        bucket = replace(nearest, since_us=max(since, start), until_us=min(until, start + width), descending=True)
        if not asked.descending:
            ((_, last, weight),) = walk(connection, bucket, 1)
        count, figures = _figures(connection, bucket, last)
        yield (start, 0), (*last, iso(start), count, *figures), weight + count * _ROW_WEIGHT
        asked = replace(asked, after=(start, 0))


def _figures(connection: Connection, bucket: Asked, last: Row) -> tuple[int, list[Json]]:
    """Return how many rows there are, and the least, greatest and mean of each number."""
    source = SOURCES["history"]
    paths = bucket.fields or numeric(json.loads(last[-1]))
    of = [number(schema.status.c.status, path, connection.dialect.name) for _, path in paths]
    job_id = job_id_of(connection, bucket.job or "")
    window = within_life(connection, bucket, job_id) or (0, 0)
    query = select(func.count(), *(function(each) for function in (func.min, func.max, func.avg) for each in of))
    count, *found = connection.execute(query.where(*wheres(source, bucket, job_id, window, None))).one()
    names = [name for name, _ in paths]
    thirds = [found[index * len(of) : (index + 1) * len(of)] for index in range(3)]
    return count, [Json(dumps(dict(zip(names, third, strict=True)))) for third in thirds]
