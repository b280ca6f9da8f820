"""The server as the keeper's child: started, and started again whenever it dies."""

from __future__ import annotations

import math
import os
import resource
import signal
import socket
import sys
import time

from harnessd.keeper.say import say

SIGNALS = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)  # the keeper acts on them
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0
_STEADY_S = 10.0  # a server that was up for so long is started again after the first delay
LEAVE_S = 10.0  # how long a server may take to leave when it is asked to


class ServerProcess:
    """Holds the pid of the server and the time at which the next one is due."""

    def __init__(self, argv: list[str]) -> None:
        self._argv = argv
        self.pid = 0
        self.starts = 0
        self.ready = False  # some server has served; until then one that gives up ends the daemon
        self.replacing = False
        self.due = 0.0  # monotonic time of the next start; infinity while one runs
        self.kill_at = math.inf
        self._delay_s = FIRST_DELAY_S
        self._started = 0.0

    def start(self) -> socket.socket:
        """Start a server. Return the keeper's end of the control socket. Raise OSError when the system refuses."""
        self._started = time.monotonic()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the child's first ones must not be the keeper's
            try:
                self.pid = os.fork()
                if self.pid == 0:
                    self._execute(theirs)
            except OSError:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ours.setblocking(False)
        self.starts += 1
        self.replacing = False
        self.due = self.kill_at = math.inf
        return ours

    def _execute(self, control: socket.socket) -> None:
        try:
            os.setsid()  # a Ctrl-C in the terminal is for the keeper
            allow_many_files()
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            control.set_inheritable(True)
            os.execv(sys.executable, [sys.executable, *self._argv, str(control.fileno())])
        except OSError as error:
            say("error", "cannot start the server", error=str(error))
        finally:
            os._exit(1)

    def ended(self) -> float:
        """Note that the server has ended. Return in how many seconds the next one starts."""
        now = time.monotonic()
        self.pid = 0
        if self.replacing:
            delay_s = 0.0
        else:
            if now - self._started > _STEADY_S:
                self._delay_s = FIRST_DELAY_S
            delay_s = self._delay_s
            self._delay_s = min(self._delay_s * 2, MAX_DELAY_S)
        self.due = now + delay_s
        return delay_s

    def leave(self) -> None:
        """Ask the server to store what it has and end; it is killed if it does not."""
        if self.pid and self.kill_at == math.inf:
            os.kill(self.pid, signal.SIGTERM)
            self.kill_at = time.monotonic() + LEAVE_S

    def expire(self) -> None:
        """Let the server, which has closed its end of the socket, end by itself; kill it if it does not."""
        self.kill_at = min(self.kill_at, time.monotonic() + LEAVE_S)

    def kill_if_due(self) -> None:
        if self.pid and time.monotonic() >= self.kill_at:
            os.kill(self.pid, signal.SIGKILL)
            self.kill_at = math.inf


def allow_many_files() -> None:
    """Raise the limit of descriptors as far as this process may; a run gets back what was there before."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
