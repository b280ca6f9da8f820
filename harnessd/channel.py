"""Frames in both directions over one stream socket, for loops that never wait."""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from harnessd.errors import WireError
from harnessd.wire import Frame, FrameReader, pack_frame


class Channel:
    """One end. Watch it for reading always, and for writing while `is_blocked`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = FrameReader()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def is_blocked(self) -> bool:
        """Whether something waits to be sent until the peer has read."""
        return bool(self._unsent)

    @property
    def is_readable(self) -> bool:
        """Whether there is something to receive, if only the news that the peer is gone."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, frame: Frame, fds: Iterable[int] = ()) -> None:
        """Send the frame with copies of the descriptors, now or once `flush` finds room.

        Raise OSError when no copy can be made.
        """
        copies: list[int] = []
        try:
            copies.extend(map(os.dup, fds))
        except OSError:
            _close(copies)
            raise
        self._unsent.append((pack_frame(frame | {"fds": len(copies)}), copies))
        self.flush()

    def flush(self) -> None:
        """Send what fits. When the peer is gone nothing is sent any more; `receive` tells of it."""
        try:
            while self._unsent:
                data, fds = self._unsent[0]
                sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
                _close(fds)
                self._unsent[0] = (data[sent:], [])
                if sent == len(data):
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._drop()

    def receive(self) -> tuple[list[tuple[Frame, list[int]]], bool]:
        """Return the frames that have come, with their descriptors, and whether the peer is still there.

        Raises WireError for what is no frame.
        """
        try:
            alive = self._reader.receive(self._sock)
        except BlockingIOError:
            return [], True
        frames: list[tuple[Frame, list[int]]] = []
        try:
            while found := self._reader.next():
                frames.append(found)
        except WireError:
            for _, fds in frames:
                _close(fds)
            raise
        return frames, alive

    def close(self) -> None:
        self._drop()
        self._reader.close()
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # also for copies that forks have taken with them
        self._sock.close()

    def _drop(self) -> None:
        for _, fds in self._unsent:
            _close(fds)
        self._unsent.clear()


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
