"""The keeper: one thread, one selector, one loop.

It forks, holds and reaps the runs, and holds what must outlive a server: mailboxes, pulse pages, listening sockets and
the exit records that no server has acknowledged. It decides nothing: the server says what to fork, whom to signal and
how long a grace is. Alone it does one thing only: when it is told to end, or when in single job mode the script is
gone, it ends every run's whole tree, and then itself.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from harnessd import __version__
from harnessd.errors import HarnessError, SpawnFailed, WireError
from harnessd.keeper.children import Children
from harnessd.keeper.respawn import ServerProcess
from harnessd.keeper.spawn import Pristine, fork
from harnessd.wire import PROTOCOL, Frame, FrameReader, RunSpec, pack_frame

_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
_RECORD_S = 5.0  # how long the keeper waits at its end for the server to store the last exits


class Keeper:
    """Holds the runs. With `server` it is the daemon's root; with `control` alone it serves the script it came from."""

    def __init__(
        self, *, control: socket.socket | None = None, server: ServerProcess | None = None, job: object | None = None
    ) -> None:
        self._children = Children()
        self._stored: dict[str, list[int]] = {}
        self._server = server
        self._ending = False  # no run is started any more
        self._leaving = False  # no server either
        self._record_until = math.inf
        self._exit_code: int | None = None
        self._final_code = 0
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._pristine = Pristine(
            keeper_pid=os.getpid(),
            handlers={number: _own_handler(number) for number in _SIGNALS},
            nofile=resource.getrlimit(resource.RLIMIT_NOFILE),
            own_fds=self._own_fds,
            job=job,
            script=server is None,
        )
        self._control: socket.socket | None = None
        self._reader = FrameReader()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._prepare()
        if control:
            self._attach(control)

    def _prepare(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for number in _SIGNALS:
            signal.signal(number, _record_only)
        signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()

    def run(self) -> int:
        """Keep until there is nothing left to keep. Return the exit code."""
        while True:
            self._work_due()
            if self._exit_code is not None:
                return self._exit_code
            for key, events in self._selector.select(self._timeout()):
                if key.fd == self._wakeup:
                    self._on_signals(os.read(self._wakeup, 4096))
                elif key.fileobj is self._control:
                    self._on_control(events)

    def _timeout(self) -> float | None:
        due = min(self._children.due(), math.inf if self._leaving else self._record_until)
        if self._server:
            due = min(due, self._server.due, self._server.kill_at)
        return None if due == math.inf else max(0.0, due - time.monotonic())

    def _work_due(self) -> None:
        for child in self._children.settle():
            os.close(child.mailbox)
            os.close(child.pulse)
            self._send(self._children.exits[child.spec.run].to_frame() | {"event": "exit"})
        if self._ending and not self._children.live:
            self._finish()
        if self._server and self._exit_code is None:
            self._server.kill_if_due()
            if self._server.due <= time.monotonic() and not self._leaving:
                self._attach(self._server.start())

    # the signals

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGCHLD in numbers:
            self._reap()
        if signal.SIGTERM in numbers or (self._server and signal.SIGINT in numbers):
            self._end_all(grace_s=0.0 if self._ending else None)
        if self._server and signal.SIGHUP in numbers:
            self._send({"event": "reload"})
        if self._server and signal.SIGUSR2 in numbers:
            self._server.replacing = True
            self._server.leave()

    def _reap(self) -> None:
        with suppress(ChildProcessError):  # there is no child
            while (ended := os.wait4(-1, os.WNOHANG))[0]:
                pid, status, usage = ended
                if self._server and pid == self._server.pid:
                    self._on_server_end(status)
                else:
                    self._children.reaped(pid, status, usage)

    def _on_server_end(self, status: int) -> None:
        assert self._server
        code = os.waitstatus_to_exitcode(status)
        self._detach()
        expected = self._server.replacing or self._leaving
        delay_s = self._server.ended()
        if not self._server.ready:  # nor will the next one
            self._leaving = True
            self._final_code = code if code > 0 else 1
            self._end_all(grace_s=None)
        elif not expected:
            _say(f"the server ended ({_how(code)}); the next one starts in {delay_s:.1f} s")

    def _end_all(self, grace_s: float | None) -> None:
        self._ending = True
        self._send({"event": "ending"})
        for run, child in list(self._children.live.items()):
            self._children.end(run, child.spec.kill_grace if grace_s is None else grace_s)

    def _finish(self) -> None:
        """No run is left: give the server its time to store the last exits, have it leave, and end."""
        self._record_until = min(self._record_until, time.monotonic() + _RECORD_S)
        can_record = self._server.ready if self._server else self._control is not None
        if can_record and self._children.exits and time.monotonic() < self._record_until:
            return
        self._leaving = True
        if self._server and self._server.pid:
            self._server.leave()
        else:
            self._exit_code = self._final_code

    # the server's socket

    def _attach(self, control: socket.socket) -> None:
        control.setblocking(False)
        self._control = control
        self._reader = FrameReader()
        self._unsent.clear()
        self._selector.register(control, selectors.EVENT_READ)
        self._send(
            {
                "event": "hello",
                "protocol": PROTOCOL,
                "version": __version__,
                "pid": os.getpid(),
                "server_starts": self._server.starts if self._server else 1,
                "ending": self._ending,
            }
        )

    def _detach(self) -> None:
        if self._control:
            self._selector.unregister(self._control)
            self._control.close()
            self._control = None

    def _on_control(self, events: int) -> None:
        assert self._control
        if events & selectors.EVENT_WRITE:
            self._flush()
        if not events & selectors.EVENT_READ:
            return
        try:
            alive = self._reader.receive(self._control)
            while found := self._reader.next():
                self._on_frame(*found)
        except BlockingIOError:
            return
        except WireError as error:  # it cannot be trusted any more; as root, the next server starts afresh
            _say(f"{error}; the connection is closed")
            alive = False
        if not alive:
            self._detach()
            if self._server is None:
                self._end_all(grace_s=None)
            elif self._server.pid:
                self._server.leave()

    def _on_frame(self, frame: Frame, fds: list[int]) -> None:
        answer: Frame = {"re": frame.get("id")}
        reply_fds: list[int] = []
        try:
            handler = _OPERATIONS.get(frame.get("op", ""))
            if handler is None:
                raise WireError(f"cannot do {frame.get('op')!r}: this keeper speaks protocol {PROTOCOL}")
            result, reply_fds = handler(self, frame, fds)
            answer |= result
        except (HarnessError, OSError, KeyError, TypeError, ValueError) as error:
            answer["error"] = str(error) if isinstance(error, HarnessError) else repr(error)
        self._send(answer, reply_fds)

    def _send(self, frame: Frame, fds: Iterable[int] = ()) -> None:
        if self._control is None:
            return
        fds = list(fds)
        self._unsent.append((pack_frame(frame | {"fds": len(fds)}), fds))
        self._flush()

    def _flush(self) -> None:
        assert self._control
        try:
            while self._unsent:
                data, fds = self._unsent[0]
                sent = socket.send_fds(self._control, [data], fds) if fds else self._control.send(data)
                if sent == len(data):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = (data[sent:], [])
        except BlockingIOError:
            pass
        except OSError:  # the server is gone: its end of the socket says so next
            self._unsent.clear()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        self._selector.modify(self._control, wanted)

    # what the server may ask for

    def _op_list(self, frame: Frame, fds: list[int]) -> tuple[Frame, list[int]]:
        for child in self._children.live.values():
            self._send(child.to_frame() | {"event": "child"}, [child.mailbox, child.pulse])
        for record in self._children.exits.values():
            self._send(record.to_frame() | {"event": "exit"})
        for name, held in self._stored.items():
            self._send({"event": "stored", "name": name}, held)
        return {}, []

    def _op_spawn(self, frame: Frame, fds: list[int]) -> tuple[Frame, list[int]]:
        spec = RunSpec.from_frame(frame["spec"])
        if self._ending:
            raise SpawnFailed(f"cannot start {spec.job!r}: the daemon is ending")
        if spec.run in self._children.live or spec.run in self._children.exits:
            raise SpawnFailed(f"cannot start {spec.job!r}: there is a run {spec.run} already")
        child = fork(spec, self._pristine)
        self._children.add(child)
        return child.to_frame(), [child.mailbox, child.pulse]

    def _op_end(self, frame: Frame, fds: list[int]) -> tuple[Frame, list[int]]:
        if frame["run"] in self._children.live:
            self._children.end(frame["run"], frame["grace"])
        return {}, []

    def _op_signal(self, frame: Frame, fds: list[int]) -> tuple[Frame, list[int]]:
        if frame["run"] in self._children.live:
            signals = tuple(signal.Signals(number) for number in frame["signals"])
            self._children.signal(frame["run"], signals, whole_tree=frame["tree"])
        return {}, []

    def _op_ack(self, frame: Frame, fds: list[int]) -> tuple[Frame, list[int]]:
        self._children.exits.pop(frame["run"], None)
        return {}, []

    def _op_store(self, frame: Frame, fds: list[int]) -> tuple[Frame, list[int]]:
        for fd in self._stored.pop(frame["name"], []):
            os.close(fd)
        if fds:
            self._stored[frame["name"]] = fds
        return {}, []

    def _op_ready(self, frame: Frame, fds: list[int]) -> tuple[Frame, list[int]]:
        if self._server:
            self._server.ready = True
        return {}, []

    def _own_fds(self) -> list[int]:
        """Return what this keeper has open, so that a run closes it."""
        fds = [self._selector.fileno(), self._wakeup, self._wakeup_write]
        fds += [self._control.fileno()] if self._control else []
        for held in self._stored.values():
            fds += held
        for child in self._children.live.values():
            fds += (child.mailbox, child.pulse)
        return fds


_Operation = Callable[[Keeper, Frame, list[int]], tuple[Frame, list[int]]]
_OPERATIONS: dict[str, _Operation] = {
    "list": Keeper._op_list,
    "spawn": Keeper._op_spawn,
    "end": Keeper._op_end,
    "signal": Keeper._op_signal,
    "ack": Keeper._op_ack,
    "store": Keeper._op_store,
    "ready": Keeper._op_ready,
}


def _own_handler(number: int) -> Any:
    """Return the handler a run is to find: what was there before, without asyncio's own in the user's script."""
    handler = signal.getsignal(number)
    function = getattr(handler, "func", handler)  # asyncio.Runner installs a partial for SIGINT
    if getattr(function, "__module__", "").startswith("asyncio."):
        return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    return signal.SIG_DFL if handler is None else handler


def _record_only(number: int, frame: object) -> None:
    """Let the wakeup descriptor tell the loop; the loop acts."""


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _say(text: str) -> None:
    print(f"harnessd: {text}", file=sys.stderr, flush=True)
