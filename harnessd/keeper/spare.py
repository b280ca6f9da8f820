"""A process forked ahead, which becomes the next run: a job that has crashed need not wait for a fork.

The copy of the page tables, and what CPython does after a fork, are a third of the time from a crash to the job's code.
Here they are over before. A spare holds stdio and its end of a socket, waits in one read, and ends with the keeper.
"""

from __future__ import annotations

import os
import signal
import socket
from typing import NoReturn

from harnessd import tree
from harnessd.keeper.spawn import (
    Prepared,
    Pristine,
    become,
    die_with,
    forking,
    handed,
    restore_signals,
    set_apart,
    set_title,
)
from harnessd.wire import FrameReader, pack_frame

_MOST_BYTES = 1 << 16  # of what it is told: so much fits into a socket at once


class Spare:
    """The keeper's view of it."""

    def __init__(self, before: Pristine) -> None:
        """Fork it. Raise OSError when the system refuses."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        try:
            with theirs, forking(before) as unsafe:
                if unsafe:
                    raise unsafe
                self.pid = os.fork()
                if self.pid == 0:
                    try:
                        _be_spare(theirs, before)
                    finally:
                        os._exit(1)
        except OSError:
            self.close()
            raise

    def become(self, prepared: Prepared) -> bool:
        """Have it become the run. Return False if it cannot; nothing is left of it then."""
        fds = prepared.of_the_run()
        try:
            frame = pack_frame(prepared.told() | {"fds": len(fds)})
            # It wears the mark before it is told: no signal to the run's tree can miss it.
            marked = len(frame) <= _MOST_BYTES and tree.put_on(prepared.spec.mark, self.pid)
            told = marked and socket.send_fds(self._socket, [frame], fds) == len(frame)
        except Exception:  # it was killed, or the spec is without sense, as a fork will tell
            told = False
        if told:
            self.close()
        else:
            self.end()
        return told

    def close(self) -> None:
        """Say no more to it. If it has become nothing, it ends."""
        self._socket.close()

    def end(self) -> None:
        """Kill it, and reap it."""
        self.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _be_spare(control: socket.socket, before: Pristine) -> NoReturn:
    set_apart(before, [control.fileno()])
    die_with(before.keeper_pid)
    restore_signals(before)
    set_title("harnessd: spare")
    reader = FrameReader()
    while reader.receive(control):
        if found := reader.next():
            control.close()
            spec, ends, enter = handed(*found)
            become(spec, ends, before, enter)
    os._exit(0)
