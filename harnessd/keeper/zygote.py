"""A process beside the keeper in which heavy libraries are imported once, and the runs that are forked from it.

The keeper itself imports nothing that could start a thread or hold a lock. A run is forked twice, so that it becomes a
child of the keeper, which is the subreaper: the keeper holds and reaps it like any other, and the zygote may die.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn

from harnessd import tree
from harnessd.channel import Channel
from harnessd.job import pulse
from harnessd.job.conduct import Ends
from harnessd.keeper.spawn import EXIT_CANNOT_EXECUTE, Prepared, Pristine, become, die_with, handed, set_apart
from harnessd.wire import Frame, FrameReader, pack_frame

_CLAIM_S = 5.0


class Zygote:
    """The keeper's view of it."""

    def __init__(self, modules: list[str], before: Pristine) -> None:
        """Fork it. It says `ready`, or why it `failed`, when it has imported the modules."""
        self.modules = modules
        self.waiting: dict[int, Prepared] = {}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                _be_zygote(theirs, modules, before)
            finally:
                os._exit(1)
        theirs.close()
        self._pidfd = os.pidfd_open(pid)
        self.channel = Channel(ours)

    def fork(self, prepared: Prepared) -> None:
        """Ask for a run. It answers with the run's pid. Raise OSError when no descriptor is left to ask with."""
        self.channel.send(prepared.told(), prepared.of_the_run())
        self.waiting[prepared.spec.run] = prepared

    def void(self, run: int) -> Prepared | None:
        """Return the run if it was asked for and is not told of yet. What was forked of it ends at once."""
        if prepared := self.waiting.pop(run, None):
            pulse.claim(prepared.ends.pulse, pulse.VOID)
        return prepared

    def void_all(self) -> list[Prepared]:
        return [prepared for run in list(self.waiting) if (prepared := self.void(run))]

    def end(self) -> None:
        """Kill it. The runs that were forked from it and claimed are the keeper's, and live on."""
        self.channel.close()
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        os.close(self._pidfd)


def _be_zygote(control: socket.socket, modules: list[str], before: Pristine) -> NoReturn:
    os.setsid()
    die_with(before.keeper_pid)
    signal.set_wakeup_fd(-1)
    os.closerange(3, control.fileno())
    os.closerange(control.fileno() + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    for number in before.handlers:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control.setblocking(True)
    failure = _import(modules)
    control.sendall(pack_frame({"failed": failure} if failure else {"ready": True}))
    if failure:
        os._exit(0)
    gc.collect()
    gc.freeze()
    reader = FrameReader()
    while reader.receive(control):
        while found := reader.next():
            _fork_twice(*found, before, control)
    os._exit(0)


def _import(modules: Iterable[str]) -> str:
    """Import the modules. Return why no run may be forked from here, if that is so."""
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:  # a library may raise anything at import, SystemExit too
            return f"cannot preload {name!r}: {type(error).__name__}: {error}"
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate()[1:])
        return f"cannot preload: the modules have left threads running ({names})"
    if (pid := os.fork()) == 0:  # math libraries end their native threads when a fork is near
        os._exit(0)
    os.waitpid(pid, 0)
    if len(os.listdir("/proc/self/task")) > 1:
        return "cannot preload: the modules have left native threads running"
    return ""


def _fork_twice(frame: Frame, fds: list[int], before: Pristine, control: socket.socket) -> None:
    spec, ends, enter = handed(frame, fds)
    middle = os.fork()
    if middle == 0:
        code = 1
        try:
            tree.wear(spec.mark)
            run = os.fork()
            if run == 0:
                _await_claim(ends, before.keeper_pid)
                _reseed()
                set_apart(before, fds)
                become(spec, ends, before, enter)
            control.sendall(pack_frame({"run": spec.run, "pid": run}))
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(middle, 0)[1]:
        os._exit(1)  # there is no run: the keeper, which hears of this process's end, forks it itself or says why not
    for fd in fds:
        os.close(fd)


def _reseed() -> None:
    """Have each run draw other numbers: numpy seeds its global generator when it is imported, Python at each fork."""
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()


def _await_claim(ends: Ends, keeper_pid: int) -> None:
    """Go on once the keeper is the parent and has this process in its table; end if it has forked another instead."""
    page = pulse.attach(ends.pulse)
    deadline = time.monotonic() + _CLAIM_S
    while os.getppid() != keeper_pid or page[pulse.CLAIM] != os.getpid():
        if page[pulse.CLAIM] == pulse.VOID:
            os._exit(0)
        if time.monotonic() > deadline:
            os._exit(EXIT_CANNOT_EXECUTE)  # the keeper, if it comes to claim it yet, must not take it for a success
        time.sleep(0.0002)
