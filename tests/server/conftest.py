"""A database for each test: an SQLite file, or a schema of its own in the one that HARNESSD_TEST_DATABASE names."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.rows import job_row, run_started
from sqlalchemy import create_engine, make_url, text

from harnessd.server.store import Store

URL = os.environ.get("HARNESSD_TEST_DATABASE")


@pytest.fixture
def where(tmp_path: Path) -> Iterator[str]:
    """Where the database is, for `Store.open`."""
    if not URL:
        yield str(tmp_path / "harnessd.db")
        return
    name = f"test_{os.getpid()}_{time.monotonic_ns()}"
    server = create_engine(make_url(URL).set(drivername="postgresql+psycopg"))
    with server.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    own = make_url(URL).update_query_dict({"options": f"-csearch_path={name}"})
    yield own.render_as_string(hide_password=False)
    with server.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
    server.dispose()


@pytest.fixture
def open_store(where: str) -> Iterator[Callable[..., Store]]:
    """Opens stores on the test's database, and closes them."""
    stores: list[Store] = []

    def opened(path: str | Path = where) -> Store:
        stores.append(Store.open(path))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., Store]) -> Store:
    """An empty store that knows the job `etl` and one run of it."""
    store = open_store()
    store.put(job_row())
    store.put(run_started())
    store.flush().result(10)
    return store


@pytest.fixture
def path(where: str) -> Path:
    """The file of an SQLite database; a test that damages files has no other."""
    if URL:
        pytest.skip("only SQLite is a file")
    return Path(where)
