"""What a new server is told of the jobs' last words by the database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import RUN, job_row, run_started

from harnessd.server.entry import Queued, Recalled
from harnessd.server.recall import recall
from harnessd.server.records import Event, RunEnded
from harnessd.server.store import Store
from harnessd.server.tape import Line
from harnessd.states import Command


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "harnessd.db")
    yield opened
    opened.close()


def recalled(store: Store) -> Recalled:
    store.flush().result(10)
    with store.readers.connect() as connection:
        return recall(connection, 0)


def test_the_last_status_and_exit_with_its_error_are_recalled(store: Store) -> None:
    job, run = job_row(), run_started()
    store.put(job)
    store.put(run)
    lines = [
        Line(RUN, 1, 10, "status", '{"n":1}'),
        Line(RUN, 2, 20, "status", '{"n":2}'),
        Line(RUN, 3, 30, "error", '"ValueError: no"'),
    ]
    store.put_lines(RUN, lines, offset=99, count=3).result(10)
    store.put(RunEnded(RUN, 40_000_000, exit_code=1, reason="crashed"))
    found = recalled(store)
    assert found.statuses[job.name].text == '{"n":2}'
    ended = found.exits[job.name]
    assert (ended.run, ended.code, ended.reason, ended.at, ended.error) == (RUN, 1, "crashed", 40.0, "ValueError: no")


def test_commands_without_an_acknowledgement_are_unread(store: Store) -> None:
    job = job_row()
    store.put(job)
    store.put(run_started())
    for number, verb in ((1, "start"), (2, "pause"), (3, "config")):
        store.put(Event("command", number, job.name, RUN, data=command(number, verb)))
    store.put(Event("command", 4, job.name, RUN, data=command(4, "kill") | {"queued": False}))
    store.put(Event("command", 5, job.name, None, data=command(5, "config") | {"data": {"n": 1}}))
    store.put_lines(RUN, [Line(RUN, 1, 10, "ack", "1")], offset=9, count=1).result(10)
    store.put(Event("unread", 11, job.name, RUN, data={"id": 3, "command": "CONFIG"}))
    assert recalled(store).unread[job.name] == {
        2: Queued(Command.PAUSE, None, RUN),
        5: Queued(Command.CONFIG, {"n": 1}, None),
    }


def test_of_very_many_commands_the_newest_are_recalled(store: Store) -> None:
    job = job_row()
    for number in range(1, 5001):
        store.put(Event("command", number, job.name, RUN, data=command(number, "pause")))
        store.put(Event("read", number, job.name, RUN, data={"id": number})) if number < 5000 else None
    assert list(recalled(store).unread[job.name]) == [5000]


def command(number: int, verb: str) -> dict[str, Any]:
    return {"id": number, "verb": verb, "data": None, "queued": True}


def test_of_an_empty_database_nothing_is_recalled(store: Store) -> None:
    assert recalled(store) == Recalled()
