"""A proxy between clients and daemon that cuts connections: on demand, and by chance in the middle of what passes."""

from __future__ import annotations

import random
import selectors
import socket
import threading
from contextlib import suppress

_CHUNK = 512
_CUT_RATE = 0.03  # of the pieces that pass


class Proxy:
    """Listens on a port of its own. One thread."""

    def __init__(self, target_port: int, seed: str) -> None:
        self._target_port = target_port
        self._chance = random.Random(f"{seed}/proxy")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._peers: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()  # held for `_peers`
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="proxy")
        self.cuts = 0

    def start(self) -> None:
        self._thread.start()

    def cut(self) -> int:
        """Cut every connection. Return how many there were."""
        with self._lock:
            ends = list(self._peers)
        for end in ends:
            with suppress(OSError):  # it has ended by itself
                end.shutdown(socket.SHUT_RDWR)
        return len(ends) // 2

    def close(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        for end in list(self._peers):
            self._drop(end)
        self._selector.close()
        self._listening.close()

    def _work(self) -> None:
        while not self._over.is_set():
            for key, _ in self._selector.select(0.2):
                end = key.fileobj
                assert isinstance(end, socket.socket)
                if end is self._listening:
                    self._accept()
                elif end in self._peers:
                    self._pass_on(end)

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self._target_port), 5)
        except OSError:
            client.close()
            return
        with self._lock:
            self._peers |= {client: server, server: client}
        for end in (client, server):
            end.settimeout(5)
            self._selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, end: socket.socket) -> None:
        try:
            piece = end.recv(_CHUNK)
            if piece and self._chance.random() < _CUT_RATE:
                self.cuts += 1
                self._peers[end].sendall(piece[: len(piece) // 2])
                piece = b""
            if piece:
                self._peers[end].sendall(piece)
                return
        except OSError:
            pass  # either side has gone: so does the other
        self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        with self._lock:
            other = self._peers.pop(end, None)
            if other:
                self._peers.pop(other, None)
        for each in (end, other):
            if each:
                self._selector.unregister(each)
                each.close()
