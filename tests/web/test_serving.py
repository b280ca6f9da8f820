"""What a client can do to the server with bytes and time alone: real sockets, with a small application behind them."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from harnessd.server.settings import Http
from harnessd.web import serving
from harnessd.web.body import read_body
from harnessd.web.connection import Connection
from harnessd.web.listening import bind, bind_unix
from harnessd.web.problem import response_for
from harnessd.web.serving import HttpServer

DEADLINE_S = 40.0
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
SOON: dict[str, float] = {"header_seconds": 0.3, "body_seconds": 0.3, "idle_seconds": 0.3, "send_seconds": 0.3}

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Site:
    """Answers `/` with what it was sent, `/flood` without an end, `/wait` when the test says."""

    def __init__(self, http: Http, sockets: list[socket.socket]) -> None:
        self.server = HttpServer(self._app, sockets, http)
        self.port = sockets[0].getsockname()[1]
        self.go = asyncio.Event()
        self.limit_bytes = http.max_body_bytes
        self.headers: list[tuple[bytes, bytes]] = []
        self.flooded_bytes = 0
        self.begun = 0
        self._open = AsyncExitStack()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun += 1
        start = {"type": "http.response.start", "status": 200, "headers": []}
        if scope["path"] == "/flood":
            await send(start)
            while not self.go.is_set():
                await send({"type": "http.response.body", "body": bytes(10_000), "more_body": True})
                self.flooded_bytes += 10_000
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b""})
            return
        if scope["path"] == "/wait":
            await self.go.wait()
        body = b""
        if scope["path"] != "/unread":
            try:
                body = await read_body(scope, receive, self.limit_bytes)
            except Exception as error:
                await response_for(error)(scope, receive, send)
                return
        self.headers = list(scope["headers"])
        await send(start | {"headers": [(b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": body})

    async def connect(self, address: str = "127.0.0.1") -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(address, 0))

        async def close() -> None:
            writer.transport.abort()

        self._open.push_async_callback(close)
        return reader, writer

    async def say(self, text: bytes, address: str = "127.0.0.1") -> Client:
        client = await self.connect(address)
        client[1].write(text)
        return client

    async def ask(self, text: bytes = GET, address: str = "127.0.0.1") -> tuple[int, bytes]:
        return await answer(await self.say(text, address))

    async def close(self) -> None:
        self.go.set()
        await self._open.aclose()
        await self.server.stop()


async def answer(client: Client) -> tuple[int, bytes]:
    """Return the status and the body of the next answer."""
    head = await client[0].readuntil(b"\r\n\r\n")
    sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    body = await client[0].readexactly(int(sizes[0].split()[1]) if sizes else 0)
    return int(head.split()[1]), body


async def until_closed(client: Client) -> bytes:
    """Return what still comes before the end, be it a polite one or not."""
    try:
        return await client[0].read()
    except ConnectionError:
        return b""


async def until(found: Callable[[], Any]) -> None:
    while not found():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_CHECK_S", 0.1)


@asynccontextmanager
async def site(**http: Any) -> AsyncIterator[Site]:
    made = Site(Http(**http), [bind("127.0.0.1", 0)])
    await made.server.start()
    try:
        yield made
    finally:
        await made.close()


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), DEADLINE_S))

    return run


@in_a_loop
async def test_requests_in_pieces_of_any_size_are_read() -> None:
    async with site() as served:
        for size in (1, 7, 1023, 1024, 1025, 5000):
            reader, writer = await served.connect()
            body = bytes(range(256)) * 16
            text = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
            for start in range(0, len(text), size):
                writer.write(text[start : start + size])
                await writer.drain()
            assert await answer((reader, writer)) == (200, body)


@in_a_loop
async def test_pipelined_requests_are_answered_in_order_however_many() -> None:
    async with site() as served:
        posts = b"".join(POST + b"Content-Length: 4\r\n\r\n%04d" % number for number in range(2000))
        client = await served.say(posts)
        for number in range(2000):
            assert await answer(client) == (200, b"%04d" % number)


@in_a_loop
async def test_pipelined_requests_behind_one_that_waits_are_not_all_kept_as_requests() -> None:
    async with site() as served:
        client = await served.say(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n" + GET * 100_000)
        await until(lambda: served.begun)
        (connection,) = served.server._server.server_state.connections
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert len(connection.pipeline) < 60  # type: ignore[union-attr]
        served.go.set()
        assert (await answer(client))[0] == 200


ENDLESS_HEADS = {
    "request line": b"GET /" + b"a" * 100_000,
    "header value": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000,
    "header name": b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a" * 100_000,
    "headers": b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 20_000,
    "blank lines": b"\r\n" * 50_000,
}


@in_a_loop
async def test_whoever_connects_while_the_server_leaves_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = asyncio.Event()
    shutdown = Connection.shutdown

    def leave(connection: Connection) -> None:
        shutdown(connection)
        leaves.set()

    monkeypatch.setattr(Connection, "shutdown", leave)
    async with site() as served:
        asking, silent = await served.connect(), await served.connect()
        assert (await served.ask())[0] == 200  # they are accepted
        stopping = asyncio.create_task(served.server.stop())
        await leaves.wait()
        asking[1].write(GET)
        assert (await answer(asking))[0] == 200
        assert await until_closed(silent) == b""
        await stopping


@in_a_loop
async def test_a_head_without_an_end_is_431() -> None:
    async with site() as served:
        for which, text in ENDLESS_HEADS.items():
            status, body = await served.ask(text)
            assert status == 431, which
            assert json.loads(body)["status"] == 431
        assert served.begun == 0


@in_a_loop
async def test_so_many_headers_as_may_be_are_read() -> None:
    async with site(max_headers=20) as served:
        assert (await served.ask(GET[:-2] + b"X: 1\r\n" * 19 + b"\r\n"))[0] == 200
        assert (await served.ask(GET[:-2] + b"X: 1\r\n" * 20 + b"\r\n"))[0] == 431


@in_a_loop
async def test_chunked_bodies_with_extensions_or_trailers_without_an_end_are_431() -> None:
    async with site() as served:
        for rest in (b"5;" + b"x" * 100_000, b"0" * 100_000, b"5\r\nhello\r\n0\r\n" + b"X: 1\r\n" * 20_000):
            assert (await served.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n" + rest))[0] == 431


@in_a_loop
async def test_trailers_do_not_become_headers() -> None:
    async with site() as served:
        chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nAuthorization: Bearer x\r\n\r\n"
        assert await served.ask(chunked) == (200, b"hi")
        assert b"authorization" not in dict(served.headers)


@in_a_loop
async def test_what_is_no_http_is_a_problem_document() -> None:
    async with site() as served:
        for text in (b"\x16\x03\x01\x02\x00\x01", b"NONSENSE\r\n\r\n", b"GET \xff HTTP/1.1\r\n\r\n"):
            status, body = await served.ask(text)
            assert status == 400
            assert json.loads(body)["kind"] == "bad-request"


@in_a_loop
async def test_nonsense_behind_a_request_does_not_cost_it_its_answer() -> None:
    async with site() as served:
        client = await served.say(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\nNONSENSE\r\n\r\n")
        await until(lambda: served.begun)
        served.go.set()
        assert (await answer(client))[0] == 200
        assert await until_closed(client) == b""


@in_a_loop
async def test_an_upgrade_that_is_not_spoken_is_answered_as_http_and_closed() -> None:
    async with site() as served:
        client = await served.say(GET[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        assert (await answer(client))[0] == 200
        assert await until_closed(client) == b""


@pytest.mark.parametrize("path", [b"/", b"/unread"])
@pytest.mark.parametrize("framing", [b"Content-Length: 1000000000", b"Transfer-Encoding: chunked"])
@in_a_loop
async def test_a_huge_body_is_not_taken(path: bytes, framing: bytes) -> None:
    async with site(max_body_bytes=100_000) as served:
        _, writer = await served.say(b"POST " + path + b" HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n")
        piece = bytes(50_000) if b"Length" in framing else b"C350\r\n" + bytes(50_000) + b"\r\n"
        sent = 0
        try:
            while sent < 1_000_000_000:
                writer.write(piece)
                await writer.drain()
                sent += 50_000
        except ConnectionError:
            pass
        assert sent < 100_000_000


@in_a_loop
async def test_a_refusal_reaches_a_client_that_goes_on_sending() -> None:
    async with site(max_body_bytes=1000) as served:
        reader, writer = await served.say(POST + b"Content-Length: 8000000\r\n\r\n" + bytes(8_000_000))
        await writer.drain()
        assert (await answer((reader, writer)))[0] == 413
        assert await reader.read() == b""


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: ", 408),
        (b"\r\n", 408),
        (POST + b"Content-Length: 5\r\n\r\nhi", 408),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n", 408),
        (b"", None),
    ],
    ids=["head", "blank line", "body", "chunk", "nothing"],
)
@in_a_loop
async def test_what_does_not_come_is_not_waited_for(text: bytes, status: int | None) -> None:
    async with site(**SOON) as served:
        client = await served.say(text)
        said = await until_closed(client)
        assert (int(said.split()[1]) if said else None) == status


@in_a_loop
async def test_a_head_or_body_that_drips_is_not_waited_for() -> None:
    async with site(**SOON) as served:
        for text in (b"GET / HTTP/1.1\r\nX: ", POST + b"Content-Length: 500000\r\n\r\n"):
            reader, writer = await served.say(text)
            ended = asyncio.ensure_future(until_closed((reader, writer)))
            while not ended.done():
                writer.write(b"a")
                await asyncio.sleep(0.05)
            assert b" 408 " in ended.result() or not ended.result()  # a reset may have overtaken it


@in_a_loop
async def test_an_answer_that_takes_its_time_is_waited_for() -> None:
    async with site(**SOON) as served:
        client = await served.say(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.sleep(1.0)
        served.go.set()
        assert (await answer(client))[0] == 200


@in_a_loop
async def test_a_connection_that_was_used_may_wait_no_longer_than_a_new_one() -> None:
    async with site(**SOON) as served:
        client = await served.say(GET)
        assert (await answer(client))[0] == 200
        assert await until_closed(client) == b""


@in_a_loop
async def test_an_answer_that_nobody_takes_is_held_back_and_then_cut_off() -> None:
    async with site(send_seconds=0.5) as served:
        _, writer = await served.say(b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        before = -1
        while served.flooded_bytes != before or not before:
            before = served.flooded_bytes
            await asyncio.sleep(0.2)
        assert served.flooded_bytes < 20_000_000
        await until(lambda: not served.server._server.server_state.connections)


@in_a_loop
async def test_an_answer_that_is_taken_slowly_goes_on() -> None:
    async with site(send_seconds=0.5) as served:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", served.port))
        with connection:
            await loop.sock_sendall(connection, b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n")
            for _ in range(8):
                assert await loop.sock_recv(connection, 20_000)
                await asyncio.sleep(0.15)


# how many


@in_a_loop
async def test_a_newcomer_takes_the_place_of_who_waits_longest() -> None:
    async with site(max_connections=3) as served:
        first = await served.say(GET, "127.0.0.2")
        await answer(first)
        others = [await served.say(GET) for _ in range(2)]
        for other in others:
            await answer(other)
        assert (await served.ask())[0] == 200
        assert await until_closed(first) == b""
        others[1][1].write(GET)
        assert (await answer(others[1]))[0] == 200


@in_a_loop
async def test_a_request_that_drips_does_not_keep_its_place() -> None:
    async with site(max_connections=2) as served:
        dripping = await served.say(b"GET / HTTP/1.1\r\nX: ", "127.0.0.2")
        used = await served.say(GET)
        await answer(used)
        dripping[1].write(b"a")
        assert (await served.ask())[0] == 200
        assert await until_closed(dripping) == b""


@in_a_loop
async def test_a_newcomer_is_told_503_when_all_are_served() -> None:
    async with site(max_connections=2) as served:
        waiting = [await served.say(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n") for _ in range(2)]
        await until(lambda: served.begun == 2)
        status, body = await answer(await served.connect())
        assert (status, json.loads(body)["status"]) == (503, 503)
        served.go.set()
        for client in waiting:
            assert (await answer(client))[0] == 200
        assert (await served.ask())[0] == 200


@in_a_loop
async def test_one_peer_cannot_have_all_the_room() -> None:
    async with site(max_connections=10, max_connections_per_peer=2) as served:
        used = await served.say(GET, "127.0.0.2")
        await answer(used)
        greedy = [await served.say(GET, "127.0.0.3") for _ in range(5)]
        for client in greedy[:-2]:
            await until_closed(client)
        used[1].write(GET)
        assert (await answer(used))[0] == 200


@in_a_loop
async def test_a_full_house_still_answers_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "it.sock"
    made = Site(Http(max_connections=1), [bind("127.0.0.1", 0), bind_unix(path)])
    await made.server.start()
    try:
        await made.say(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: made.begun)
        assert (await made.ask())[0] == 503
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(GET)
        assert (await answer((reader, writer)))[0] == 200
        writer.close()
    finally:
        await made.close()


@in_a_loop
async def test_a_server_without_descriptors_waits_and_goes_on() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with site() as served:
        first = await served.say(GET)
        await answer(first)
        taken = [socket.socket() for _ in range(2)]  # the clients': made while there are descriptors
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(each.fileno() for each in taken) + 1, hard))
        try:
            loop = asyncio.get_running_loop()
            for each in taken:
                each.setblocking(False)
                await loop.sock_connect(each, ("127.0.0.1", served.port))
            await asyncio.sleep(0.2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await loop.sock_sendall(taken[0], GET)
        assert (await loop.sock_recv(taken[0], 100)).startswith(b"HTTP/1.1 200")
        for each in taken:
            each.close()
