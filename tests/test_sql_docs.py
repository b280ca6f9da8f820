"""Every query of docs/sql.md, by the `sqlite3` program and by Python's, on some hours of three jobs."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.past import at, some_hours

from harnessd.server.store import Store
from harnessd.server.timespan import iso

DOC = Path(__file__).parents[1] / "docs" / "sql.md"
NOW = "'2026-01-15T16:00:00Z'"  # when those hours are over
QUERIES = {
    int(number): (title, sql)
    for number, title, sql in re.findall(r"### (\d+)\. (.+?)\n.*?```sql\n(.*?)```", DOC.read_text(), re.DOTALL)
}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("db") / "harnessd.db"
    store = Store.open(path)
    some_hours(store)
    yield path
    store.close()


def by_python(path: Path, sql: str) -> Rows:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(sql)]


def by_program(path: Path, sql: str) -> Rows:
    program = shutil.which("sqlite3")
    if program is None:
        pytest.skip("there is no sqlite3 program: apt-get install sqlite3")
    done = subprocess.run(
        [program, "-readonly", "-bail", "-json", str(path)], input=sql, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads(done.stdout or "[]")
    assert isinstance(rows, list)
    return rows


def column(rows: Rows, name: str) -> list[Any]:
    return [row[name] for row in rows]


def last_statuses(rows: Rows) -> None:
    assert column(rows, "job") == ["etl", "feed"]
    assert rows[1]["at"] == "2026-01-15T15:59:00Z"
    assert json.loads(rows[1]["status"])["orders"] == 3590


def as_of_then(rows: Rows) -> None:
    assert column(rows, "seq") == [151]
    assert json.loads(rows[0]["status"])["orders"] == 1500


def field_over_time(rows: Rows) -> None:
    assert column(rows, "orders") == list(range(600, 700, 10))
    assert set(column(rows, "bid")) == {99.5}


def figures_an_hour(rows: Rows) -> None:
    assert column(rows, "hour") == [f"2026-01-15T{hour}" for hour in range(10, 16)]
    assert rows[1] == {"hour": "2026-01-15T11", "statuses": 60, "least": 600, "mean": 895.0, "greatest": 1190}
    assert rows[3]["statuses"] == 21


def growth(rows: Rows) -> None:
    assert column(rows, "grown") == [590, 600, 600, 600, 600, 600]


def gaps(rows: Rows) -> None:
    assert rows[0] == {"job": "feed", "before": iso(at(3)), "at": iso(at(3, 40)), "gap_s": 2400.0}
    assert rows[1]["job"] == "etl" and rows[1]["gap_s"] == 600.0
    assert len(rows) == 10


def amounts(rows: Rows) -> None:
    assert [(row["job"], row["day"], row["statuses"]) for row in rows] == [
        ("feed", "2026-01-15", 321),
        ("etl", "2026-01-15", 30),
    ]
    assert rows[0]["bytes"] > 10_000


def uptime(rows: Rows) -> None:
    week_h = 7 * 24
    etl_h = (3 * 59 + 119) / 60
    assert [(row["job"], row["up_percent"]) for row in rows] == [
        ("feed", pytest.approx(100 * 6 / week_h, abs=0.01)),
        ("etl", pytest.approx(100 * etl_h / week_h, abs=0.01)),
        ("idle", 0.0),
    ]


def crashes(rows: Rows) -> None:
    assert rows == [{"day": "2026-01-15", "job": "etl", "crashes": 3}]


def restarts(rows: Rows) -> None:
    assert rows[0] == {"job": "etl", "restarts": 3, "shortest_s": 3540.0, "longest_s": 7140.0}
    assert (rows[1]["job"], rows[1]["restarts"]) == ("feed", 0)


def bad_exits(rows: Rows) -> None:
    assert column(rows, "ended") == [iso(at(3)), iso(at(2)), iso(at(1))]
    assert {(row["reason"], row["exit_code"]) for row in rows} == {("crashed", 3)}


def last_words(rows: Rows) -> None:
    assert column(rows, "ended") == [iso(at(1)), iso(at(2)), iso(at(3))]
    assert {json.loads(row["status"])["done"] for row in rows} == {3000 / 3600}


def around_a_crash(rows: Rows) -> None:
    first = [row for row in rows if row["crashed"] == iso(at(1))]
    assert {(row["job"], row["kind"]) for row in first} >= {("etl", "error"), ("etl", "state"), ("feed", "command")}
    assert all(abs(int(row["at"][17:19]) - 0) <= 30 for row in first)


def states(rows: Rows) -> None:
    seconds = {(row["job"], row["state"]): row["seconds"] for row in rows}
    assert seconds["feed", "running"] == 6 * 3600 - 1
    assert seconds["etl", "backoff"] == 3 * 60
    assert seconds["etl", "stopped"] == 3600


def server_starts(rows: Rows) -> None:
    assert rows == [{"day": "2026-01-15", "starts": 2, "last": iso(at(4))}]


def waited(rows: Rows) -> None:
    assert rows == [{"at": iso(at(1)), "job": "feed", "verb": "config", "waited_s": 0.25}]


def never_read(rows: Rows) -> None:
    assert column(rows, "at") == [iso(at(2))]
    assert (rows[0]["verb"], json.loads(rows[0]["data"])) == ("config", {"limit": 2})


def steered(rows: Rows) -> None:
    assert rows == [{"who": "token:ops", "job": "feed", "verb": "config", "times": 2, "last": iso(at(2))}]


def sampled(rows: Rows) -> None:
    assert rows[0] == {"job": "etl", "cpu_percent": 90.0, "cpu_most": 90.0, "rss_mb": 900.0, "threads": 9, "fds": 40}
    assert rows[1]["cpu_percent"] == 17.5


def used(rows: Rows) -> None:
    assert rows == [{"job": "etl", "runs": 4, "cpu_s": 8880.0, "cpu_percent": 50.0, "peak_mb": 900}]


CHECKS: list[Callable[[Rows], None]] = [
    last_statuses,
    as_of_then,
    field_over_time,
    figures_an_hour,
    growth,
    gaps,
    amounts,
    uptime,
    crashes,
    restarts,
    bad_exits,
    last_words,
    around_a_crash,
    states,
    server_starts,
    waited,
    never_read,
    steered,
    sampled,
    used,
]


def test_there_are_twenty_queries_and_each_is_checked() -> None:
    assert list(QUERIES) == list(range(1, 21))
    assert len(CHECKS) == len(QUERIES)
    assert DOC.read_text().count("```sql") == len(QUERIES)


@pytest.mark.parametrize("run", [by_program, by_python], ids=["sqlite3", "python"])
@pytest.mark.parametrize(("number", "check"), list(enumerate(CHECKS, 1)), ids=[check.__name__ for check in CHECKS])
def test_a_query_finds_what_its_title_says(
    database: Path, number: int, check: Callable[[Rows], None], run: Callable[[Path, str], Rows]
) -> None:
    _, sql = QUERIES[number]
    check(run(database, sql.replace("'now'", NOW)))


@pytest.mark.parametrize("number", list(QUERIES))
def test_a_query_runs_as_it_stands_in_the_document(database: Path, number: int) -> None:
    by_python(database, QUERIES[number][1])


def test_the_document_names_the_columns_of_the_views(database: Path) -> None:
    for view in ("status_history", "run_summary", "job_events"):
        (line,) = re.findall(rf"^\| `{view}` \|.*$", DOC.read_text(), re.MULTILINE)
        told = re.findall(r"`(\w+)`", line)[1:]
        assert told == column(by_python(database, f"SELECT name FROM pragma_table_info('{view}')"), "name")
        assert told != []
