from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.daemon import Daemon
from helpers.rows import job_row
from helpers.waiting import DEADLINE_S

from harnessd.server import history
from harnessd.server.definition import Definition
from harnessd.server.history import History
from harnessd.server.policy import Rules
from harnessd.server.records import Event, Record
from harnessd.server.store import Store
from harnessd.server.supervisor import Folders, Supervisor
from harnessd.web import endless, follow
from harnessd.web.app import make_app
from harnessd.web.call import Context
from harnessd.web.follow import Followers
from harnessd.web.guard import GuardPolicy

Told = dict[str, str]


class NoHost:
    on_exit: Any = None


class Site:
    """The application over a store whose events it hears of, for the jobs `a` and `b`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.history = History(store)
        self.recorded: list[Record] = []
        self.followers = Followers(self.history, self.recorded.append)  # type: ignore[arg-type]
        store.on_committed = self.followers.committed
        supervisor = Supervisor(NoHost(), Folders(Path("/nonexistent"), 1), lambda _: None)  # type: ignore[arg-type]
        for name in ("a", "b"):
            supervisor.add(Definition(name, Rules(), 0.1, config={}, run_spec=lambda spec: spec, digest="", shown={}))
        self.context = Context(supervisor, dict, 1000, history=self.history, followers=self.followers)
        self.app = make_app(self.context, GuardPolicy())
        self.clients: list[Client] = []

    def client(self, path: str = "/events", query: str = "follow=1", **headers: str) -> Client:
        client = Client(self.app, path, query, headers)
        self.clients.append(client)
        return client

    async def put(self, *events: tuple[str, str | None]) -> None:
        """Store events by kind and job; return when they are committed."""
        for kind, job in events:
            self.store.put(Event(kind, 1_700_000_000_000_000, job, actor="me", data={"text": "é", "n": 1}))
        await asyncio.wrap_future(self.store.flush())

    async def close(self) -> None:
        for client in self.clients:
            await client.leave()
        self.history.close()


class Client:
    """Takes a stream of events, at its own pace."""

    def __init__(self, app: Any, path: str, query: str, headers: dict[str, str]) -> None:
        self.text = ""
        self.status = 0
        self.reads = asyncio.Event()
        self.reads.set()
        self._gone = asyncio.Event()
        self._told = asyncio.Event()
        pairs = {"host": "127.0.0.1"} | {name.replace("_", "-"): value for name, value in headers.items()}
        scope: dict[str, Any] = {"type": "http", "method": "GET", "scheme": "http", "path": path, "root_path": ""}
        scope |= {"raw_path": path.encode(), "query_string": query.encode()}
        scope |= {"headers": [(name.encode(), value.encode()) for name, value in pairs.items()]}
        scope |= {"client": ("127.0.0.1", 4), "server": ("127.0.0.1", 2222)}
        self.done = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.text += message.get("body", b"").decode()
        self._told.set()

    async def leave(self) -> None:
        self.reads.set()
        self._gone.set()
        await self.done

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._told.clear()
                await self._told.wait()

    @property
    def joined(self) -> bool:
        """Whether it hears of live events from now on: it was told where it stands."""
        return any(set(each) == {"id"} for each in blocks(self.text))

    @property
    def events(self) -> list[Told]:
        return [each for each in blocks(self.text) if "data" in each]

    @property
    def ids(self) -> list[int]:
        return [int(each["id"]) for each in self.events if "id" in each]


def blocks(text: str) -> list[Told]:
    """Return the fields of each block of the stream, comments left out."""
    whole = text.split("\n\n")[:-1]
    return [
        dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))  # type: ignore[misc]
        for block in whole
    ]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[Callable[[Site], Coroutine[Any, Any, None]]], None]]:
    """Run a test in an event loop, over a store that knows the jobs `a` and `b`."""
    store = Store.open(tmp_path / "harnessd.db")
    for name in ("a", "b"):
        store.put(job_row(name))
    store.flush().result(10)

    def running(test: Callable[[Site], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            site = Site(store)
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await test(site)
            finally:
                await site.close()

        asyncio.run(whole())

    yield running
    store.close()


def test_stored_events_come_first_and_live_ones_after_them(run: Any) -> None:
    async def test(site: Site) -> None:
        await site.put(*[("state", "a")] * 3)
        client = site.client(last_event_id="1")
        await client.until(lambda: client.joined)
        await site.put(("state", "b"), ("torn", None))
        await client.until(lambda: len(client.ids) == 4)
        assert client.status == 200
        assert client.ids == [2, 3, 4, 5]
        assert [each["event"] for each in client.events] == ["state", "state", "state", "torn"]

    run(test)


def test_an_event_is_the_row_that_a_page_has(run: Any) -> None:
    async def test(site: Site) -> None:
        live = site.client(accept="text/event-stream")
        await live.until(lambda: live.joined)
        await site.put(("state", "a"), ("server-start", None))
        await live.until(lambda: len(live.ids) == 2)
        stored = site.client(query="follow=1&cursor=0")
        await stored.until(lambda: len(stored.ids) == 2)
        page = site.client(query="order=asc")
        await page.done
        rows = json.loads(page.text)["rows"]
        assert [json.loads(each["data"]) for each in live.events] == rows
        assert live.events == stored.events

    run(test)


def test_without_an_id_a_client_hears_what_comes_and_where_it_stands(run: Any) -> None:
    async def test(site: Site) -> None:
        await site.put(*[("state", "a")] * 3)
        client = site.client()
        await client.until(lambda: client.joined)
        assert client.ids == []
        assert {"id": "3"} in blocks(client.text)

    run(test)


@pytest.mark.parametrize(
    ("path", "query", "ids"),
    [
        ("/jobs/a/events", "follow=1&cursor=0", [1, 3, 5]),
        ("/events", "follow=1&cursor=0&job=b", [2]),
        ("/events", "follow=1&cursor=0&kind=state,torn", [1, 2, 5]),
        ("/jobs/all/events", "follow=1&cursor=0", [1, 2, 3, 4, 5]),
    ],
)
def test_a_client_hears_only_what_it_asked_for(run: Any, path: str, query: str, ids: list[int]) -> None:
    events = [("state", "a"), ("state", "b"), ("read", "a"), ("read", None), ("torn", "a")]

    async def test(site: Site) -> None:
        await site.put(*events)
        stored = site.client(path, query)
        await stored.until(lambda: stored.joined)
        assert stored.ids == ids
        await site.put(*events)
        await stored.until(lambda: len(stored.ids) == 2 * len(ids))
        assert stored.ids == [*ids, *(number + 5 for number in ids)]

    run(test)


def test_nothing_is_missed_or_doubled_while_a_client_catches_up(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "CHUNK_EVENTS", 7)

    async def test(site: Site) -> None:
        await site.put(*[("state", "a")] * 100)
        clients = [site.client(last_event_id=str(start)) for start in (0, 50, 99, 100)]
        for _ in range(40):
            await site.put(*[("state", "b")] * 5)
        for client, start in zip(clients, (0, 50, 99, 100), strict=True):
            await client.until(lambda client=client: client.ids[-1:] == [300])  # type: ignore[misc]
            assert client.ids == list(range(start + 1, 301))

    run(test)


def test_a_client_catches_up_with_what_is_too_large_for_one_chunk(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PAGE_WEIGHT", 1)

    async def test(site: Site) -> None:
        await site.put(*[("state", "a")] * 20)
        client = site.client(query="follow=1&cursor=0")
        await client.until(lambda: client.joined)
        assert client.ids == list(range(1, 21))

    run(test)


def test_a_slow_client_is_dropped_and_told_and_can_resume_while_others_hear_all(run: Any) -> None:
    async def test(site: Site) -> None:
        slow, fast = site.client("/jobs/a/events"), site.client()
        for client in (slow, fast):
            await client.until(lambda client=client: client.joined)  # type: ignore[misc]
        slow.reads.clear()
        for _ in range(30):
            await site.put(*[("state", "a")] * 50)
            await fast.until(lambda: fast.ids and fast.ids[-1] % 50 == 0)
        await fast.until(lambda: len(fast.ids) == 1500)
        assert fast.ids == list(range(1, 1501))
        (dropped,) = (each for each in site.recorded if isinstance(each, Event))
        assert (dropped.kind, dropped.job, dropped.actor) == ("client-dropped", "a", "loopback:127.0.0.1:4")
        slow.reads.set()
        await slow.done
        assert [each["event"] for each in slow.events][-1] == "dropped"
        assert "id" not in slow.events[-1]
        assert slow.text.endswith("\n\n")
        again = site.client("/jobs/a/events", last_event_id=str(slow.ids[-1] if slow.ids else 0))
        await again.until(lambda: again.joined)
        assert slow.ids + again.ids == list(range(1, 1501))

    run(test)


def test_a_client_that_reads_is_not_dropped_because_much_comes_at_once(run: Any) -> None:
    async def test(site: Site) -> None:
        client = site.client("/jobs/a/events")
        await client.until(lambda: client.joined)
        await site.put(*[("state", "a")] * 2500)
        await site.put(("state", "a"))
        await client.until(lambda: client.ids[-1:] == [2501])
        assert client.ids == list(range(1, 2502))

    run(test)


def test_a_quiet_stream_has_heartbeats(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "HEARTBEAT_S", 0.01)

    async def test(site: Site) -> None:
        client = site.client()
        await client.until(lambda: client.text.count(": heartbeat\n\n") == 3)
        await site.put(("state", "a"))
        await client.until(lambda: client.ids == [1])

    run(test)


def test_a_client_that_leaves_is_forgotten(run: Any) -> None:
    async def test(site: Site) -> None:
        client = site.client()
        await client.until(lambda: client.joined)
        assert len(site.followers._followers) == 1
        await client.leave()
        assert not site.followers._followers

    run(test)


@pytest.mark.parametrize("reads", [True, False])
def test_a_server_that_stops_ends_its_streams(run: Any, monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    monkeypatch.setattr(endless, "_GOODBYE_S", 0.05)

    async def test(site: Site) -> None:
        client = site.client()
        await client.until(lambda: client.joined)
        if not reads:
            client.reads.clear()
            await site.put(("state", "a"))
        site.context.stopping.set()
        await client.done
        assert not site.followers._followers

    run(test)


@pytest.mark.parametrize(
    ("query", "headers", "words"),
    [
        ("follow=1&since=-1h", {}, "no such parameter"),
        ("follow=1&cursor=abc", {}, "takes the id of an event"),
        ("follow=1", {"last_event_id": "99999999999999999999"}, "takes the id of an event"),
        ("follow=1&kind=A", {}, "no such events as 'A'; there are: adopted"),
    ],
)
def test_what_cannot_be_followed_is_refused(run: Any, query: str, headers: dict[str, str], words: str) -> None:
    async def test(site: Site) -> None:
        client = site.client(query=query, **headers)
        await client.done
        assert client.status == 400
        assert words in json.loads(client.text)["detail"]

    run(test)


def test_there_is_room_for_so_many_and_no_more(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "MOST_FOLLOWERS", 1)

    async def test(site: Site) -> None:
        first = site.client()
        await first.until(lambda: first.joined)
        second = site.client()
        await second.done
        assert second.status == 503

    run(test)


# a real server


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    yield made
    made.close()


def stream(daemon: Daemon, last_id: int, wanted: Callable[[Told], bool]) -> list[Told]:
    """Return what a client hears from an id on, until it has heard what it wants or the stream breaks off."""
    told: list[Told] = []
    headers = {"accept": "text/event-stream", "last-event-id": str(last_id)}
    try:
        with daemon.kept.stream("GET", "/events", headers=headers) as answer:
            block: Told = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if line and name:
                    block[name] = value
                elif "data" in block:
                    told.append(block)
                    if wanted(block):
                        return told
                    block = {}
                else:
                    block = {}
    except httpx.TransportError:
        pass  # the server was killed, or is about to be there again
    return told


def test_a_client_that_comes_back_after_a_crash_has_every_event_once(daemon: Daemon) -> None:
    daemon.job("one", "Idle")
    daemon.start()
    daemon.wait_all("running")
    told = stream(daemon, 0, lambda each: each["event"] == "state" and '"to":"running"' in each["data"])
    assert [json.loads(each["data"])["job"] for each in told if each["event"] == "state"] == ["one", "one"]
    for number in range(3):
        old = daemon.kill_server()
        daemon.wait_new_server(old)
        assert daemon.post("/jobs/one/config", {"round": number}).status_code == 202
        told += stream(daemon, int(told[-1]["id"]), lambda each: each["event"] == "read")
        while told[-1]["event"] != "read":
            told += stream(daemon, int(told[-1]["id"]), lambda each: each["event"] == "read")
    ids = [int(each["id"]) for each in told]
    stored = [number for (number,) in daemon.rows("SELECT id FROM event WHERE id <= ? ORDER BY id", ids[-1])]
    assert ids == stored


def test_a_daemon_that_ends_does_not_wait_for_its_followers(daemon: Daemon) -> None:
    daemon.job("one", "Idle")
    daemon.start()
    with daemon.kept.stream("GET", "/events", params={"follow": 1}) as answer:
        pieces = answer.iter_text()
        assert next(pieces)
        assert daemon.stop() == 0
        assert "".join(pieces).endswith("\n\n")  # ended as it should be, or this would raise
    assert "without completing response" not in daemon.log
