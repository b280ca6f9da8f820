"""An answer that has no end of its own: it is sent until the client goes or the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Receive, Send

_GOODBYE_S = 1.0

T = TypeVar("T")


async def until_gone(sending: Coroutine[None, None, T], receive: Receive, stopping: asyncio.Event | None) -> T | None:
    """Return what the sending returns or raises; None when the client has gone, or the server stops, before its end."""
    sent = asyncio.ensure_future(sending)
    tasks: list[asyncio.Future[Any]] = [sent, asyncio.ensure_future(_gone(receive))]
    if stopping:
        tasks.append(asyncio.ensure_future(stopping.wait()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return None if sent.cancelled() else sent.result()


async def end(send: Send) -> None:
    """End the answer. A client that does not read is not waited for: its connection is cut."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_GOODBYE_S):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
