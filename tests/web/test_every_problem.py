"""Every kind of problem that the contract names is provoked, and told as the contract has it."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest
from helpers.contract import checked_problem
from helpers.daemon import Daemon
from helpers.waiting import DEADLINE_S

from harnessd.web.app import make_app
from harnessd.web.call import Context
from harnessd.web.guard import GuardPolicy, Token
from harnessd.web.problem import MEDIA_TYPE, kinds
from harnessd.web.refusals import FREE_FAILURES, MOST_WAITING

TOKEN = "0123456789abcdef0123456789abcdef"
Answer = tuple[int, str, bytes]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that wants a token. Two of its jobs read nothing, one cannot be told anything, one has no run."""
    made = Daemon(tmp_path_factory.mktemp("daemon"))
    made.settings(http=f'token = "{TOKEN}"\ntrust_loopback = false\nmax_body_bytes = 100000\nbody_seconds = 2')
    made.job("deaf", ["sleep", "1000"], control="messages")
    made.job("full", ["sleep", "1000"], control="messages")
    made.job("shut", ["sh", "-c", 'eval "exec $HARNESS_MAILBOX<&-"; echo shut; exec sleep 1000'], control="messages")
    made.job("stopped", "Idle", autostart=False)
    made._http.headers["authorization"] = f"Bearer {TOKEN}"
    made.start()
    made.wait_for(lambda: made.output("shut") == "shut\n", "its mailbox is closed")
    yield made
    made.close()


def asked(method: str, path: str, **more: Any) -> Callable[[Daemon], Answer]:
    def ask(daemon: Daemon) -> Answer:
        headers = {"authorization": f"Bearer {TOKEN}", **more.pop("headers", {})}
        with httpx.Client(base_url=daemon.url, timeout=DEADLINE_S, trust_env=False) as client:
            return told(client.request(method, path, headers=headers, **more))

    return ask


def told(answer: httpx.Response) -> Answer:
    return answer.status_code, answer.headers["content-type"], answer.content


def full(daemon: Daemon) -> Answer:
    """Send commands until the mailbox takes no more."""
    return daemon.wait_for(lambda: told(taken) if (taken := send(daemon)).status_code != 202 else None, "it is full")


def send(daemon: Daemon) -> httpx.Response:
    return daemon.post("/jobs/full/config", {"pad": "x" * 50_000})


def slow(daemon: Daemon) -> Answer:
    """Send the headers of a command, and never its data."""
    headers = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n\r\n"
    with socket.create_connection(("127.0.0.1", daemon.port), DEADLINE_S) as client:
        client.sendall(f"POST /jobs/deaf/start HTTP/1.1\r\n{headers}".encode())
        answer = HTTPResponse(client)
        answer.begin()
        return answer.status, answer.headers["content-type"], answer.read()


def without_config(daemon: Daemon) -> Answer:
    away = daemon.folder / "away"
    daemon.config.rename(away)
    try:
        return asked("POST", "/reload")(daemon)
    finally:
        shutil.move(away, daemon.config)


def gone(daemon: Daemon) -> Answer:
    """Ask the application for a command, and leave before its data has come."""
    return inside(lambda _: None)


def broken(daemon: Daemon) -> Answer:
    def breaks(guard: Any) -> None:
        guard._app._router = None

    return inside(breaks)


def impatient(daemon: Daemon) -> Answer:
    """Show one more wrong token while as many as may are held back."""

    def waits(guard: Any) -> None:
        for _ in range(FREE_FAILURES):
            guard._slowdown.failed("192.0.2.7")
        guard._slowdown._waiting = MOST_WAITING

    return inside(waits, "192.0.2.7")


def inside(change: Callable[[Any], None], client: str = "127.0.0.1") -> Answer:
    class NoJobs:
        """A supervisor whose only job is never looked at."""

        record = staticmethod(lambda _: None)
        find = ask = staticmethod(lambda _: None)

    policy = GuardPolicy(tokens=(Token("somebody", TOKEN),))
    guard: Any = make_app(Context(NoJobs(), dict, 1000), policy)  # type: ignore[arg-type]
    change(guard)
    sent: list[Any] = []
    scope = {"type": "http", "method": "POST", "scheme": "http", "path": "/start", "raw_path": b"/start"}
    scope |= {"query_string": b"", "root_path": "", "headers": [(b"host", b"localhost")]}
    scope |= {"client": (client, 4000), "server": ("127.0.0.1", 2222)}

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def keep(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, keep))
    headers = dict(sent[0]["headers"])
    return sent[0]["status"], headers[b"content-type"].decode(), sent[1]["body"]


PROVOKED: dict[str, Callable[[Daemon], Answer]] = {
    "bad-request": asked("POST", "/jobs/deaf/start?wait=soon"),
    "client-gone": gone,
    "unauthorized": asked("GET", "/jobs", headers={"authorization": "Bearer of-bad-news"}),
    "forbidden": asked("GET", "/jobs", headers={"host": "evil.example"}),
    "no-such-job": asked("GET", "/jobs/dead/hb"),
    "no-such-run": asked("GET", "/jobs/deaf/logs?run=1"),
    "no-such-route": asked("GET", "/jobs/deaf/hbb"),
    "method-not-allowed": asked("PUT", "/jobs/deaf/hb"),
    "request-timeout": slow,
    "ambiguous-job": asked("GET", "/hb"),
    "mailbox-closed": asked("POST", "/jobs/shut/config", json={}),
    "not-python": asked("GET", "/jobs/deaf/stack"),
    "wrong-state": asked("POST", "/jobs/stopped/pause"),
    "too-large": asked("POST", "/jobs/deaf/start", content=b" " * 100_001),
    "uri-too-long": asked("GET", "/jobs/deaf/hb?" + "x" * 9000),
    "bad-data": asked("POST", "/jobs/deaf/config", json=4.2),
    "not-read": asked("POST", "/jobs/deaf/pause?wait=10ms"),
    "mailbox-full": full,
    "too-many-requests": impatient,
    "request-header-fields-too-large": asked("GET", "/jobs", headers={f"x-{number}": "" for number in range(100)}),
    "internal-error": broken,
    "unavailable": without_config,
}


@pytest.mark.parametrize(("status", "kind"), [(status, kind) for status, each in kinds().items() for kind in each])
def test_every_kind_of_problem_is_told_as_the_contract_has_it(status: int, kind: str, daemon: Daemon) -> None:
    found, media, body = PROVOKED[kind](daemon)
    assert (found, media) == (status, MEDIA_TYPE)
    problem = checked_problem(found, media, body)
    assert (problem["kind"], problem["status"]) == (kind, status)
    assert problem["detail"].split()[0] in ("cannot", "the")


def test_nothing_is_provoked_that_is_no_problem() -> None:
    assert set(PROVOKED) == {kind for each in kinds().values() for kind in each}
