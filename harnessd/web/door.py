"""Accepts connections, no more than there is room for.

It accepts by itself, and not by the event loop's server: so a connection is counted from the first moment on, its TLS
handshake included, one too many is turned away before it costs anything, and a process that is out of descriptors waits
a while where it would otherwise spin.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

from harnessd.errors import Unavailable
from harnessd.web.connection import Connection, refusal
from harnessd.web.room import Room, peer_of

_AT_ONCE = 64  # accepted before others get their turn
_PAUSE_S = 0.5
_SHUTDOWN_S = 3.0  # for the client's part of the end of TLS
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TOLD_EVERY_S = 60.0

Make = Callable[[str], Connection]

logger = logging.getLogger(__name__)


class Door:
    """One listening socket. `tls` may change at any time: it is for the connections to come."""

    def __init__(
        self,
        listening: socket.socket,
        room: Room,
        make: Make,
        *,
        handshake_s: float,
        tls: ssl.SSLContext | None = None,
        spare_fds: int = 0,
    ) -> None:
        """`make` returns the protocol for a peer. With `spare_fds`, so many descriptors are left to others."""
        self._loop = asyncio.get_running_loop()
        self._listening = listening
        self._room = room
        self._make = make
        self._handshake_s = handshake_s
        self.tls = tls
        self._spare_fds = spare_fds
        self._connecting: set[Connection] = set()
        self._again: asyncio.TimerHandle | None = None
        self._told_at = -_TOLD_EVERY_S
        self._loop.add_reader(listening.fileno(), self._accept)

    @property
    def is_local(self) -> bool:
        """Whether it is a Unix socket."""
        return self._listening.family == socket.AF_UNIX

    def close(self) -> None:
        """Accept no more."""
        self._loop.remove_reader(self._listening.fileno())
        if self._again:
            self._again.cancel()
        for connection in list(self._connecting):
            connection.cut()

    async def wait_closed(self) -> None:
        """Nothing is left to be waited for."""

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, address = self._listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._rest(error)
                    return
                continue  # that one is gone again
            accepted.setblocking(False)
            self._admit(accepted, address[0] if isinstance(address, tuple) else "")

    def _rest(self, error: OSError) -> None:
        """Accept nothing for a while; those who come wait in the kernel's queue."""
        self._tell(f"cannot accept connections for a while: {error.strerror}")
        self._room.make_room()
        self._loop.remove_reader(self._listening.fileno())
        self._again = self._loop.call_later(_PAUSE_S, self._loop.add_reader, self._listening.fileno(), self._accept)

    def _admit(self, accepted: socket.socket, address: str) -> None:
        connection = self._make(peer_of(address))
        if not (self._has_descriptors(accepted) and self._room.enter(connection)):
            self._tell(f"no room for more connections: there are {len(self._room)}")
            if self.tls is None:
                with suppress(OSError):  # it is gone already
                    accepted.send(_FULL)
            accepted.close()
            return
        connection.connecting = self._loop.create_task(self._connect(connection, accepted))
        self._connecting.add(connection)

    def _has_descriptors(self, accepted: socket.socket) -> bool:
        """The kernel gives the lowest number that is free, so a high one says that few are left."""
        if not self._spare_fds:
            return True
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - self._spare_fds
        return accepted.fileno() < most or self._room.make_room()

    async def _connect(self, connection: Connection, accepted: socket.socket) -> None:
        seconds = self._handshake_s, _SHUTDOWN_S
        try:
            if self.tls:
                await self._loop.connect_accepted_socket(
                    lambda: connection,
                    accepted,
                    ssl=self.tls,
                    ssl_handshake_timeout=seconds[0],
                    ssl_shutdown_timeout=seconds[1],
                )
            else:
                await self._loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError:  # the handshake failed, or took too long: nobody is there to be told
            self._room.leave(connection)
        except BaseException:
            self._room.leave(connection)
            raise
        finally:
            connection.connecting = None
            self._connecting.discard(connection)

    def _tell(self, what: str) -> None:
        now = self._loop.time()
        if now - self._told_at >= _TOLD_EVERY_S:
            self._told_at = now
            logger.warning("%s; said at most once a minute", what)


_FULL = refusal(Unavailable("cannot serve one more connection: every one there is has a request under way"))
