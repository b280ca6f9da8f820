"""The queries that a history of ten million rows must answer walk an index, and sort nothing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from harnessd.server.store import Store

PAGE = "SELECT * FROM status WHERE job_id = 1"
QUERIES = {
    "a page of a job": f"{PAGE} AND (at_us, id) < (9, 9) ORDER BY at_us DESC, id DESC LIMIT 9",
    "a page of a job, oldest first": f"{PAGE} AND at_us > 5 ORDER BY at_us, id LIMIT 9",
    "the status as of a moment": f"{PAGE} AND at_us <= 9 ORDER BY at_us DESC, id DESC LIMIT 1",
    "a page of a run": "SELECT * FROM status WHERE run_id = 1 AND seq > 5 ORDER BY seq LIMIT 9",
    "a page of all jobs": "SELECT * FROM status WHERE id < 9 ORDER BY id DESC LIMIT 9",
    "the runs of a job": "SELECT * FROM run WHERE job_id = 1 AND id < 9 ORDER BY id DESC LIMIT 9",
    "the runs to be read": "SELECT id FROM run WHERE NOT journal_done ORDER BY id",
    "the events of a job": "SELECT * FROM event WHERE job_id = 1 AND at_us < 9 ORDER BY at_us DESC, id DESC LIMIT 9",
    "the events since an id": "SELECT * FROM event WHERE id > 5 ORDER BY id LIMIT 9",
    "the events since a time": "SELECT * FROM event WHERE at_us > 5 ORDER BY at_us, id LIMIT 9",
    "the samples of a job": "SELECT * FROM sample WHERE job_id = 1 AND at_us < 9 ORDER BY at_us DESC LIMIT 9",
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_a_query_walks_an_index(tmp_path: Path, query: str) -> None:
    Store.open(tmp_path / "harnessd.db").close()
    with closing(sqlite3.connect(tmp_path / "harnessd.db")) as connection:
        plan = " / ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}"))
    assert "SCAN" not in plan or "INDEX ix_run_unread" in plan, plan
    assert "TEMP B-TREE" not in plan, plan
