"""uvicorn on sockets that others made, inside an event loop and beside signal handlers that others own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from harnessd.web.listening import BACKLOG

_DRAIN_S = 5  # how long requests under way may take once the end is near


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # whoever runs the loop handles signals


class HttpServer:
    """Serves until it is stopped."""

    def __init__(self, app: ASGIApp, sockets: list[socket.socket]) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # who asks is who connected
            server_header=False,
            ws="none",
            http="httptools",
            backlog=BACKLOG,
            timeout_graceful_shutdown=_DRAIN_S,
        )
        self._server = _Uvicorn(config)
        self._sockets = sockets
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once requests are answered."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve(self._sockets))
        while not self._server.started and not self._task.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.001)
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        """Finish the requests under way and close."""
        self._server.should_exit = True
        if self._task:
            await self._task
