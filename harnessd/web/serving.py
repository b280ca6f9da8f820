"""uvicorn on sockets that others made, inside an event loop and beside signal handlers that others own."""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from harnessd.server.settings import Http, Tls
from harnessd.web.connection import Connection
from harnessd.web.door import Door
from harnessd.web.listening import BACKLOG
from harnessd.web.room import Room

_DRAIN_S = 5  # how long requests under way may take once the end is near
_CHECK_S = 1.0
_MOST_UNSENT_BYTES = 256 << 20  # that all clients together may leave lying


class _Uvicorn(uvicorn.Server):
    """Serves `sockets`; a Unix socket is its owner's alone, has room of its own and no TLS."""

    def __init__(self, config: uvicorn.Config, http: Http) -> None:
        super().__init__(config)
        self._http = http
        self._tls = http.tls.context() if http.tls else None
        self._doors: list[Door] = []
        self.leaving = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.lifespan = self.config.lifespan_class(self.config)
        most, of_peer = self._http.max_connections, self._http.max_connections_per_peer
        outside, inside = Room(most, of_peer), Room(most, most)
        for listening in sockets or []:
            local = listening.family == socket.AF_UNIX
            self._doors.append(self._door(listening, inside if local else outside, local=local))
        self.servers = self._doors  # type: ignore[assignment]  # closed by uvicorn at the end
        self.started = True

    def _door(self, listening: socket.socket, room: Room, *, local: bool) -> Door:
        def make(peer: str) -> Connection:
            return Connection(self.config, self.server_state, peer, room, self._http)

        handshake_s = self._http.header_seconds
        if local:
            return Door(listening, room, make, handshake_s=handshake_s)
        spare = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8  # for runs, files and the Unix socket
        return Door(listening, room, make, handshake_s=handshake_s, tls=self._tls, spare_fds=spare)

    def renew_tls(self, tls: ssl.SSLContext | None) -> None:
        for door in self._doors:
            if not door.is_local:
                door.tls = tls

    async def main_loop(self) -> None:
        """Look after the connections every second: uvicorn's ten times were a fifth of what an idle daemon did."""
        while not self.should_exit:
            await self.on_tick(0)  # has the Date header renewed
            self._check_connections()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.leaving.wait(), _CHECK_S)

    def _check_connections(self) -> None:
        now = asyncio.get_running_loop().time()
        connections = [each for each in self.server_state.connections if isinstance(each, Connection)]
        unsent = {connection: connection.check(now) for connection in connections}
        too_many = sum(unsent.values()) - _MOST_UNSENT_BYTES
        if too_many > 0:
            for connection in sorted(unsent, key=lambda each: each.taken_at):
                if too_many > 0 and unsent[connection]:
                    connection.cut()
                    too_many -= unsent[connection]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # whoever runs the loop handles signals


class HttpServer:
    """Serves until it is stopped."""

    def __init__(
        self,
        app: ASGIApp,
        sockets: list[socket.socket],
        http: Http = Http(),  # noqa: B008 - never changed
    ) -> None:
        config = uvicorn.Config(
            app,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # who asks is who connected
            server_header=False,
            ws="none",
            http="httptools",
            backlog=BACKLOG,
            timeout_keep_alive=math.ceil(http.idle_seconds),
            timeout_graceful_shutdown=_DRAIN_S,
        )
        self._server = _Uvicorn(config, http)
        self._sockets = sockets
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once requests are answered."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve(self._sockets))
        while not self._server.started and not self._task.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.001)
        if self._task.done():
            self._task.result()

    def renew_tls(self, tls: Tls | None) -> None:
        """Have the connections to come made with this certificate; those there are go on as they are."""
        self._server.renew_tls(tls.context() if tls else None)

    async def stop(self) -> None:
        """Finish the requests under way and close."""
        self._server.should_exit = True
        self._server.leaving.set()
        if self._task:
            await self._task
