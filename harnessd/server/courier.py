"""Brings a message to a receiver: a POST, or a program that gets it on its stdin. Says why one was not taken.

What goes wrong is named without the URL, which may be all that keeps others from writing there.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from harnessd.server.definition import OWN_VARIABLES

if TYPE_CHECKING:
    import httpx

    from harnessd.server.settings import Notify

_LATER = frozenset({408, 425, 429})  # of 4xx, those that ask for another try
_MOST_LATER_S = 3600.0


class Undelivered(Exception):
    """It was not taken. `refused`: nor will it be as it is, unless somebody changes something there."""

    def __init__(self, why: str, *, refused: bool = False, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.refused = refused
        self.after_s = after_s  # the receiver asks to be left alone for so long


class Courier(Protocol):
    async def send(self, body: bytes) -> None:
        """Return once the receiver has it. Raises Undelivered."""

    async def close(self) -> None: ...


def courier(settings: Notify) -> Courier:
    return Post(settings) if settings.url else Program(settings)


class Post:
    """POSTs JSON. The library is loaded for the first message: a daemon that has nothing to say does without."""

    def __init__(self, settings: Notify) -> None:
        assert settings.url
        self._url = settings.url.get_secret_value()
        self._headers = {name: value.get_secret_value() for name, value in settings.headers.items()}
        self._timeout_s = settings.timeout
        self._client: httpx.AsyncClient | None = None

    async def send(self, body: bytes) -> None:
        if self._client is None:
            self._client = await asyncio.to_thread(self._make)
        headers = {"Content-Type": "application/json", **self._headers}
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream("POST", self._url, content=body, headers=headers) as answer,
            ):
                _judge(answer.status_code, answer.headers.get("Retry-After", ""))
        except TimeoutError:
            raise Undelivered(f"no answer within {self._timeout_s:g} s") from None
        except _errors() as error:
            raise Undelivered(_words(error)) from None

    def _make(self) -> httpx.AsyncClient:
        import logging

        import httpx

        for name in ("httpx", "httpcore"):  # they log the URLs
            logging.getLogger(name).setLevel(logging.WARNING)
        return httpx.AsyncClient(timeout=None, follow_redirects=False, limits=httpx.Limits(max_keepalive_connections=0))

    async def close(self) -> None:
        if self._client:
            await self._client.aclose()


def _errors() -> tuple[type[Exception], ...]:
    import httpx

    return httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError


def _words(error: Exception) -> str:
    import httpx

    if isinstance(error, httpx.ConnectError):
        return f"cannot connect: {error}"
    return f"the connection failed: {type(error).__name__}"


def _judge(status: int, retry_after: str) -> None:
    if 200 <= status < 300:
        return
    refused = 300 <= status < 500 and status not in _LATER
    after_s = min(float(retry_after), _MOST_LATER_S) if retry_after.isascii() and retry_after.isdecimal() else 0.0
    raise Undelivered(f"it answered {status}", refused=refused, after_s=after_s)


class Program:
    """Runs a program a message, in a session of its own. It has done its work when its exit code is 0."""

    def __init__(self, settings: Notify) -> None:
        assert settings.command
        self._argv = settings.command
        self._timeout_s = settings.timeout

    async def send(self, body: bytes) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
        none = asyncio.subprocess.DEVNULL
        try:
            process = await asyncio.create_subprocess_exec(
                *self._argv, stdin=asyncio.subprocess.PIPE, stdout=none, start_new_session=True, env=env
            )
        except OSError as error:
            raise Undelivered(f"cannot start the program: {error.strerror}") from None
        try:
            async with asyncio.timeout(self._timeout_s):
                await process.communicate(body)
        except TimeoutError:
            raise Undelivered(f"it took longer than {self._timeout_s:g} s") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with suppress(ProcessLookupError):
                    process.kill()  # it may have left its group
                await process.wait()
        if process.returncode:
            raise Undelivered(f"its exit code was {process.returncode}")

    async def close(self) -> None:
        pass
