"""One connection, with bounds to what its client can make the server hold or wait for.

httptools and uvicorn keep whatever comes: a header line that never ends, a thousand requests sent in one go. So input
is fed to the parser in small pieces, and what lies between is looked at:

- Bytes that bring no body are counted until they add up to something: the request line, headers, blank lines, chunk
  extensions and trailers have one limit together.
- Requests behind one that is still being answered are parsed a piece at a time, each when the one before is done.
- Trailers are dropped: they would otherwise join the headers after the guard has looked at these.

Waiting is bounded by `check`, which the server calls for every connection once a second: no timer is set or unset for a
request.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import termios
from enum import Enum
from http import HTTPStatus

import httptools
from starlette.exceptions import HTTPException
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from harnessd.errors import BadRequest, Refused, TooLarge
from harnessd.server.settings import Http
from harnessd.web.outlet import Outlet
from harnessd.web.peercred import credentials
from harnessd.web.problem import response_for
from harnessd.web.room import Room

_PIECE_BYTES = 1024
_FIRST_S = 0.2  # for the first request of a connection, when the server leaves


class _Reading(Enum):
    """What the parser is in the middle of."""

    NOTHING = 0
    HEAD = 1
    BODY = 2


class _TooManyHeaders(Exception):
    pass


class Connection(HttpToolsProtocol):
    """Speaks HTTP with one client."""

    def __init__(self, config: Config, state: ServerState, peer: str, room: Room, http: Http) -> None:
        super().__init__(config, state, {})
        self.peer = peer
        self.connecting: asyncio.Task[None] | None = None  # until the TLS handshake is done
        self._room = room
        self._http = http
        self._reading = _Reading.NOTHING
        self._since = 0.0
        self._bare_bytes = 0  # since the last that brought something
        self._body_bytes = 0
        self._held = b""  # requests behind those that wait
        self._unsent_bytes = 0
        self._taken_at = 0.0  # when the client last took some of what it is sent

    @property
    def is_reading(self) -> bool:
        return self.transport is not None and self.transport.get_write_buffer_size() > 0

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        elif self.connecting:
            self.connecting.cancel()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._outlet = Outlet(transport)
        super().connection_made(self._outlet)
        self.app_state["peer"] = credentials(transport)
        self._since = self._taken_at = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._room.leave(self)
        self._held = b""

    def shutdown(self) -> None:
        """Close once what is under way is answered. Whoever has just connected is about to ask, and is heard."""
        if self.cycle is None and not self._outlet.is_closing():
            self.loop.call_later(_FIRST_S, super().shutdown)
        else:
            super().shutdown()

    # what comes in

    def data_received(self, data: bytes) -> None:
        if self._outlet.is_closing():
            self._outlet.throw_away(data)
            return
        self._unset_keepalive_if_required()
        if self._reading is _Reading.NOTHING:
            self._reading = _Reading.HEAD
            self._since = self.loop.time()
            self._outlet.is_fed = True
        if self._held or self.pipeline:
            self.flow.pause_reading()
            self._held += data
        else:
            self._feed(memoryview(data))

    def _feed(self, data: memoryview) -> None:
        for start in range(0, len(data), _PIECE_BYTES):
            if self.pipeline:
                self._held = bytes(data[start:])
                return
            if self.transport.is_closing() or not self._feed_piece(data[start : start + _PIECE_BYTES]):
                return

    def _feed_piece(self, piece: memoryview) -> bool:
        """Return whether the connection can go on."""
        self._bare_bytes += len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:  # as `curl --http2` asks for: it is answered as if it had not
            self.cycle.keep_alive = False
            return False
        except httptools.HttpParserError as error:
            self._refuse(self._reason(error))
            return False
        if self._bare_bytes > self._http.max_header_bytes:
            limit = self._http.max_header_bytes
            self._refuse(HTTPException(431, f"cannot take these headers: the limit is {limit} bytes"))
            return False
        return True

    def _reason(self, error: httptools.HttpParserError) -> Refused | HTTPException:
        if isinstance(error.__context__, _TooManyHeaders):
            return HTTPException(431, f"cannot take more than {self._http.max_headers} headers")
        why = "" if isinstance(error, httptools.HttpParserCallbackError) else f" ({error})"
        return BadRequest(f"cannot read the request: it is not HTTP/1.1{why}")

    def on_message_begin(self) -> None:
        self._reading = _Reading.HEAD
        self._outlet.is_fed = True
        self._body_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading is _Reading.BODY:
            return
        super().on_header(name, value)
        if len(self.headers) > self._http.max_headers:
            raise _TooManyHeaders

    def on_headers_complete(self) -> None:
        self._reading = _Reading.BODY
        self._bare_bytes = 0
        self._since = self.loop.time()
        self._room.is_served(self)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._bare_bytes = 0
        self._body_bytes += len(body)
        if self._body_bytes > self._http.max_body_bytes and self.cycle.response_started:  # whose answer did not wait
            self._refuse(TooLarge(""))
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._bare_bytes = 0
        self._reading = _Reading.NOTHING
        self._outlet.is_fed = False
        super().on_message_complete()
        self._await_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._room.waits(self)  # for nothing but its end
            return
        if self._held and not self.pipeline:
            held, self._held = self._held, b""
            self._feed(memoryview(held))
        if self._held or self.pipeline:
            self.flow.pause_reading()
        self._await_request()

    def _await_request(self) -> None:
        """Note that the next move is the client's, if it is."""
        if self._reading is not _Reading.BODY and not self._is_answering:
            self._since = self.loop.time()
            self._room.waits(self)

    # patience

    def check(self, now: float) -> int:
        """Close the connection if its client has taken too long. Return how many bytes it has not taken yet."""
        self._outlet.check(now)
        self._look_at_sending(now)
        if now - self._taken_at > self._http.send_seconds:
            self.transport.abort()
        elif self.flow.read_paused or self.transport.is_closing():
            self._since = now
        elif self._reading is _Reading.BODY:
            if now - self._since > self._http.body_seconds:
                self._refuse(HTTPException(408, f"cannot wait longer than {self._http.body_seconds:g} s for the body"))
        elif self._is_answering:
            self._since = now
        elif self._reading is _Reading.HEAD:
            if now - self._since > self._http.header_seconds:
                limit = self._http.header_seconds
                self._refuse(HTTPException(408, f"cannot wait longer than {limit:g} s for a request's headers"))
        elif now - self._since > self._http.idle_seconds:
            self.transport.close()
        return self._unsent_bytes

    def resume_writing(self) -> None:
        self._taken_at = self.loop.time()
        super().resume_writing()

    @property
    def taken_at(self) -> float:
        """When the client last took some of what it is sent; the loop's time."""
        return self._taken_at

    def _look_at_sending(self, now: float) -> None:
        before, self._unsent_bytes = self._unsent_bytes, self.transport.get_write_buffer_size()
        if self._unsent_bytes:
            self._unsent_bytes += _queued_bytes(self.transport)
        if not self._unsent_bytes or self._unsent_bytes < before:
            self._taken_at = now

    def _refuse(self, error: Refused | HTTPException) -> None:
        """Answer so, unless another answer is under way, and close."""
        if not self._is_answering:
            if self._reading is not _Reading.BODY:  # else it has its answer, and did not end what it asked
                self.transport.write(refusal(error))
            self.transport.close()
        elif self._reading is not _Reading.BODY:
            self.cycle.keep_alive = False  # those before it are answered first
            self.flow.pause_reading()
        elif self.cycle.response_started or self.pipeline:
            self.transport.abort()
        else:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.transport.write(refusal(error))
            self.transport.close()
            self._room.waits(self)


def refusal(error: Refused | HTTPException) -> bytes:
    """Return the whole answer, behind which the connection is closed."""
    response = response_for(error)
    response.headers["connection"] = "close"
    lines = [f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


def _queued_bytes(transport: asyncio.Transport) -> int:
    """Return what the kernel holds of what was sent; tcp(7), SIOCOUTQ."""
    connection = transport.get_extra_info("socket")
    found = array.array("i", [0])
    try:
        fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, found)
    except (OSError, AttributeError):  # it is closed
        return 0
    return found[0]
