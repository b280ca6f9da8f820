"""The listening socket: made before uvicorn is loaded, so that a port in use stops the start before any job begins."""

from __future__ import annotations

import socket

from harnessd.errors import CannotListen

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises CannotListen, saying why."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CannotListen(f"cannot listen on {url_of(host, port)}: {why}; set http.port to a free one") from error
    listening.setblocking(False)
    return listening


def url_of(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
