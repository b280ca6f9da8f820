"""Who is at the other end of a Unix socket, as the kernel has it from the moment of its connect (unix(7))."""

from __future__ import annotations

import asyncio
import pwd
import socket
import struct
from functools import lru_cache
from typing import NamedTuple

_UCRED = struct.Struct("3i")  # pid, uid, gid


class Credentials(NamedTuple):
    """A process and its user; `user` is the name, or the number of one that has none."""

    pid: int
    uid: int
    user: str


def credentials(transport: asyncio.BaseTransport) -> Credentials | None:
    """Return who is at the other end, None when the transport is no Unix socket."""
    connection = transport.get_extra_info("socket")
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Credentials(pid, uid, _user(uid))


@lru_cache(maxsize=64)
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
