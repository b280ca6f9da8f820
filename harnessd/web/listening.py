"""The listening sockets: made before uvicorn is loaded, so that a port in use stops the start before any job begins."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from harnessd.errors import CannotListen

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises CannotListen, saying why."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Handed on to each connection: an answer goes out in two pieces, and Nagle's algorithm would hold the second
        # one back for 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CannotListen(f"cannot listen on {url_of(host, port)}: {why}; set http.port to a free one") from error
    listening.setblocking(False)
    return listening


def url_of(host: str, port: int, *, tls: bool = False) -> str:
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def bind_unix(path: Path) -> socket.socket:
    """Return a listening socket that its owner alone may connect to. Raises CannotListen.

    Whatever has the name goes: the caller holds the lock of the directory, so nobody else listens there. The name is
    bound by way of the directory's descriptor, as unix(7) takes 107 bytes and a state directory's path may be longer.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = -1
    try:
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        path.unlink(missing_ok=True)
        umask = os.umask(0o177)
        try:
            listening.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.umask(umask)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise CannotListen(f"cannot listen on {path}: {error.strerror or error}") from error
    finally:
        if folder >= 0:
            os.close(folder)
    listening.setblocking(False)
    return listening
