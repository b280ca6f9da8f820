"""What the keeper tells systemd, or whoever set $NOTIFY_SOCKET (sd_notify(3)).

The keeper tells it, not the server: a server that hangs or dies is the keeper's business, and no reason for systemd to
end the jobs.
"""

from __future__ import annotations

import math
import os
import socket
import time

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """Takes its variables out of the environment, so that neither the server nor a job speaks in the keeper's name."""

    def __init__(self) -> None:
        address, usec, pid = (os.environ.pop(name, "") for name in _VARIABLES)
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._reloading = False
        self._every_s = math.inf
        if self._address and usec.isdecimal() and int(usec) and pid in ("", str(os.getpid())):
            self._every_s = int(usec) / 2e6  # twice as often as is asked for
        self.due = 0.0 if self._every_s < math.inf else math.inf  # monotonic time of the next WATCHDOG=1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None
        if self._socket:
            self._socket.setblocking(False)

    def ready(self, status: str) -> None:
        """A server serves; also the end of a reload."""
        self._reloading = False
        self._send("READY=1", f"STATUS={status}", f"MAINPID={os.getpid()}")

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}")

    def reloading(self) -> None:
        self._reloading = True
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        if self._reloading:
            self._reloading = False
            self._send("READY=1")

    def stopping(self, within_s: float) -> None:
        """The runs are being ended, which may take so long."""
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(within_s * 1e6)}")

    def keep_alive(self) -> None:
        """Say that the loop runs, if that is due."""
        if self.due <= time.monotonic():
            self.due = time.monotonic() + self._every_s
            self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._socket:
            try:
                self._socket.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                pass  # nobody is there to hear it, or the queue is full: the runs matter more
