"""Whom the guard refuses is recorded, and cannot fill the history."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from harnessd.errors import Forbidden
from harnessd.server.records import Event
from harnessd.web import refusals
from harnessd.web.guard import Guard, GuardPolicy
from harnessd.web.refusals import A_SECOND, Refusals


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(refusals.time, "time_ns", lambda: 10**18)
    return []


def test_a_refused_login_is_recorded_with_its_peer(recorded: list[Any]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody gets here")

    async def nothing(*_: Any) -> Any:
        return {"type": "http.request", "body": b""}

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/kill",
        "raw_path": b"/kill",
        "query_string": b"",
        "scheme": "http",
        "headers": [(b"host", b"10.0.0.1")],
        "client": ("10.0.0.9", 5),
        "server": ("10.0.0.1", 80),
    }
    asyncio.run(Guard(app, GuardPolicy(), Refusals(recorded.append))(scope, nothing, nothing))
    (event,) = recorded
    assert (event.kind, event.actor) == ("refused", "10.0.0.9")
    assert (event.data["path"], event.data["kind"]) == ("/kill", "forbidden")


def test_more_than_a_few_in_one_second_are_only_counted(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    told = Refusals(recorded.append)
    for _ in range(A_SECOND + 7):
        told("10.0.0.9", "/kill", Forbidden("no"))
    assert len(recorded) == A_SECOND
    monkeypatch.setattr(refusals.time, "time_ns", lambda: 2 * 10**18)
    told("10.0.0.9", "/kill", Forbidden("no"))
    last = recorded[-1]
    assert isinstance(last, Event)
    assert last.data["left_out"] == 7
