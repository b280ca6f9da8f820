"""Any bytes to the real HTTP server: it stays, every answer is whole, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

from fuzz.profile import CUTS, examples, pieces
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from harnessd.errors import Refused
from harnessd.server.settings import Http
from harnessd.web.body import command_data, read_body
from harnessd.web.problem import response_for
from harnessd.web.serving import HttpServer

DEADLINE_S = 20.0
PIECES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n",
        b"POST /x HTTP/1.1\r\n",
        b"Host: a\r\n",
        b"\r\n",
        b"\r\n\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"5\r\nhello\r\n",
        b"0\r\n\r\n",
        b"ffffffffffffffff\r\n",
        b"Connection: close\r\n",
        b"Expect: 100-continue\r\n",
        b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
        b"X: " + b"y" * 3000 + b"\r\n",
        b"A:b\r\n" * 20,
        b"\0",
        b"\n",
        b"{'a':1}",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n",
        b"GET  HTTP/9.9\r\n",
        b" folded\r\n",
        b"\xff\xfe",
    ]
)
STREAMS = st.lists(PIECES | st.binary(max_size=10), max_size=12).map(b"".join)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    try:
        command_data(await read_body(scope, receive, 1000), (), frozenset())
    except Refused as error:
        await response_for(error)(scope, receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def say(port: int, stream: bytes, cuts: list[int]) -> bytes:
    """Return all that is answered, once the client has said everything."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with suppress(ConnectionError):
        for piece in pieces(stream, cuts):
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
    answer = b""
    with suppress(ConnectionError):
        answer = await reader.read()
    writer.transport.abort()
    return answer


async def served(streams: list[bytes], cuts: list[int]) -> list[str]:
    """Return what reached the loop's exception handler."""
    wrong: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(repr(context)))
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    server = HttpServer(app, [listening], Http(max_header_bytes=4096, max_headers=20, max_body_bytes=1000))
    await server.start()
    port = listening.getsockname()[1]
    try:
        async with asyncio.timeout(DEADLINE_S):
            answers = await asyncio.gather(*(say(port, stream, cuts) for stream in streams))
            honest = await say(port, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", [])
    finally:
        await server.stop()
        listening.close()
    assert honest.startswith(b"HTTP/1.1 200 ") and honest.endswith(b"ok")
    for answer in answers:
        assert not answer or answer.startswith(b"HTTP/1.1 ")
        assert b"HTTP/1.1 500" not in answer
    return wrong


@examples(15)
@given(st.lists(STREAMS, min_size=1, max_size=4), CUTS)
def test_any_bytes_are_answered_or_cut_off_and_others_are_served(streams: list[bytes], cuts: list[int]) -> None:
    assert asyncio.run(served(streams, cuts)) == []
