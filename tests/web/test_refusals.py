"""Whom the guard refuses is recorded, and cannot fill the history."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from harnessd.errors import Forbidden
from harnessd.server.records import Event
from harnessd.server.tokens import TokenReader, Tokens
from harnessd.web import refusals
from harnessd.web.guard import Guard, GuardPolicy, Token
from harnessd.web.refusals import (
    A_SECOND,
    FIRST_S,
    FORGOTTEN_S,
    FREE_FAILURES,
    LONGEST_S,
    MOST_ADDRESSES,
    MOST_WAITING_OF_ONE,
    Refusals,
    Slowdown,
)


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


# who shows wrong tokens


class Sleeps:
    """In place of waiting: notes how long, and holds those back who are to be held."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.held = asyncio.Event()
        self.held.set()

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        await self.held.wait()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Sleeps:
    made = Sleeps()
    monkeypatch.setattr(refusals.asyncio, "sleep", made)
    return made


def fail(slowdown: Slowdown, address: str, times: int) -> None:
    for _ in range(times):
        slowdown.failed(address)


def test_an_address_waits_longer_with_each_failure_up_to_a_limit() -> None:
    slowdown = Slowdown()
    delays = []
    for _ in range(40):
        delays.append(slowdown.delay_s("192.0.2.7"))
        slowdown.failed("192.0.2.7")
    assert delays[: FREE_FAILURES + 3] == [0.0] * FREE_FAILURES + [FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert delays == sorted(delays) and delays[-1] == LONGEST_S
    assert slowdown.delay_s("192.0.2.8") == 0.0


def test_failures_are_forgotten_after_a_while() -> None:
    now = [0.0]
    slowdown = Slowdown(lambda: now[0])
    fail(slowdown, "192.0.2.7", 20)
    now[0] = FORGOTTEN_S + 1
    assert slowdown.delay_s("192.0.2.7") == 0.0
    slowdown.failed("192.0.2.7")
    assert slowdown.delay_s("192.0.2.7") == 0.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.7", "192.0.2.7", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("192.0.2.7", "192.0.2.8", False),
    ],
)
def test_all_addresses_that_one_host_may_have_are_one(one: str, other: str, same: bool) -> None:
    slowdown = Slowdown()
    fail(slowdown, one, 20)
    assert (slowdown.delay_s(other) > 0) is same


def test_what_is_remembered_of_addresses_is_bounded() -> None:
    slowdown = Slowdown()
    for number in range(MOST_ADDRESSES + 10):
        fail(slowdown, f"10.0.{number // 256}.{number % 256}", FREE_FAILURES)
    assert len(slowdown._addresses) == MOST_ADDRESSES
    assert slowdown.delay_s("10.0.0.0") == 0.0
    assert slowdown.delay_s("10.0.4.0") > 0


def test_few_of_one_address_and_of_all_wait_at_a_time(sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "MOST_WAITING", MOST_WAITING_OF_ONE + 1)

    async def crowd() -> None:
        slowdown = Slowdown()
        for address in ("192.0.2.7", "192.0.2.8"):
            fail(slowdown, address, 20)
        sleeps.held.clear()
        one = [asyncio.ensure_future(slowdown.wait("192.0.2.7")) for _ in range(MOST_WAITING_OF_ONE + 2)]
        other = [asyncio.ensure_future(slowdown.wait("192.0.2.8")) for _ in range(2)]
        await asyncio.wait(one, return_when=asyncio.FIRST_EXCEPTION)
        await asyncio.wait(other, return_when=asyncio.FIRST_EXCEPTION)
        await slowdown.wait("192.0.2.9")
        sleeps.held.set()
        results = [await asyncio.gather(*each, return_exceptions=True) for each in (one, other)]
        turned_away = [[isinstance(result, HTTPException) for result in each] for each in results]
        assert turned_away == [[False] * MOST_WAITING_OF_ONE + [True, True], [False, True]]
        await slowdown.wait("192.0.2.7")

    asyncio.run(crowd())


def ask(guard: Guard, secret: str, address: str = "192.0.2.7") -> Any:
    async def answered() -> int:
        statuses: list[int] = []

        async def send(message: Any) -> None:
            statuses.append(message.get("status", 0))

        scope = {"type": "http", "method": "GET", "path": "/hb", "raw_path": b"/hb", "query_string": b""}
        scope |= {"scheme": "http", "client": (address, 5), "server": ("192.0.2.1", 80)}
        headers = [(b"host", b"192.0.2.1"), (b"authorization", b"Bearer " + secret.encode())]
        await guard(scope | {"headers": headers}, send, send)
        return statuses[0]

    return asyncio.run(answered())


def test_only_wrong_tokens_and_those_that_people_choose_wait(sleeps: Sleeps, tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    made = Tokens(tmp_path).new("ci", "read")
    policy = GuardPolicy(tokens=(Token("settings", "chosen"),))
    guard = Guard(app, policy, stored=TokenReader(tmp_path))
    assert [ask(guard, "wrong") for _ in range(FREE_FAILURES)] == [401] * FREE_FAILURES
    assert sleeps.asked == []
    assert ask(guard, "wrong") == 401
    assert sleeps.asked == [FIRST_S]
    assert ask(guard, made) == 200
    assert ask(guard, "chosen", "192.0.2.8") == 200
    assert sleeps.asked == [FIRST_S]
    assert ask(guard, "chosen") == 200
    assert sleeps.asked == [FIRST_S, 2 * FIRST_S]
