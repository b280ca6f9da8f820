"""The transport of a connection as uvicorn is to see it: with an end that its client can read to."""

from __future__ import annotations

import asyncio
from typing import Any

LINGER_S = 2.0
LINGER_BYTES = 16 << 20


class Outlet(asyncio.Transport):
    """Writing to a closed one is no error: the client may go at any moment.

    Closing one on which the client is still sending would make the kernel reset the connection, and the reset overtakes
    the answer that says why. So that end is closed which is ours, and what still comes is thrown away for a while (RFC
    9112, 9.6). TLS has no such half end.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._left_bytes = 0
        self._until: float | None = None  # the loop's time; None: it does not linger
        self.is_fed = False  # the client is in the middle of a request

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.is_closing():
            try:
                self._transport.write(data)
            except RuntimeError:  # uvloop has closed it, and has not come to say so
                self._transport.abort()

    def close(self) -> None:
        if self.is_closing():
            return
        if not (self.is_fed and self._transport.can_write_eof()):
            self._transport.close()
            return
        self._until = asyncio.get_running_loop().time() + LINGER_S
        self._left_bytes = LINGER_BYTES
        self._transport.write_eof()
        self._transport.resume_reading()

    def abort(self) -> None:
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._until is not None or self._transport.is_closing()

    def throw_away(self, data: bytes) -> None:
        """Take what comes while it lingers."""
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            self._transport.abort()

    def check(self, now: float) -> None:
        """Make an end of lingering, once the answer is on its way."""
        if self._until is not None and now > self._until and not self._transport.get_write_buffer_size():
            self._transport.abort()

    def pause_reading(self) -> None:
        if not self.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)
