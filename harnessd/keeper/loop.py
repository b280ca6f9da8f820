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
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from harnessd import __version__
from harnessd.channel import Channel
from harnessd.errors import HarnessError, SpawnFailed, WireError
from harnessd.job import pulse
from harnessd.keeper.cgroup import Cgroups
from harnessd.keeper.children import Children
from harnessd.keeper.notify import Notifier
from harnessd.keeper.respawn import LEAVE_S, SIGNALS, ServerProcess, allow_many_files
from harnessd.keeper.say import say
from harnessd.keeper.spare import Spare
from harnessd.keeper.spawn import Began, Prepared, Pristine, fork, prepare
from harnessd.keeper.zygote import Zygote
from harnessd.wire import PROTOCOL, Frame, RunSpec

_PR_SET_CHILD_SUBREAPER = 36
_SPARE_AFTER_S = 0.05  # a run was started: those started with it go first
_FORKED_AT_ONCE = 32  # runs; their descriptors are all open here until then
_FDS_OF_RUN = 3  # mailbox, page and journal, all open in the server
_FDS_OF_SERVER = 48  # database, sockets, what it reads meanwhile
_RUNS_SHARE = 0.75  # of all descriptors; the others are for connections
_RECORD_S = 5.0  # how long the keeper waits at its end for the server to store the last exits


class Answer(NamedTuple):
    """What a request is answered with."""

    frame: Frame = {}  # noqa: RUF012 - never changed
    fds: tuple[int, ...] = ()


class Keeper:
    """Holds the runs. With `server` it is the daemon's root; with `control` alone it serves the script it came from."""

    def __init__(
        self, *, control: socket.socket | None = None, server: ServerProcess | None = None, job: object | None = None
    ) -> None:
        self._children = Children()
        self._prepared: dict[int, Prepared] = {}  # to be forked together, by their runs
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
            handlers={number: _own_handler(number) for number in SIGNALS},
            nofile=resource.getrlimit(resource.RLIMIT_NOFILE),
            own_fds=None if server else self._own_fds,
            job=job,
            script=server is None,
        )
        self._control: Channel | None = None
        self._zygote: Zygote | None = None
        self._spare: Spare | None = None
        self._spare_due = math.inf
        self._unclaimed: dict[int, tuple[int, resource.struct_rusage]] = {}
        self._cgroups = Cgroups()
        self._notifier = Notifier() if server else None  # what a script was started by is its job's to tell
        self._prepare()
        if control:
            self._attach(control)

    def _prepare(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        allow_many_files()
        for number in SIGNALS:
            signal.signal(number, _record_only)
        signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self._server:
            self._cgroups.settle_in(self._server.pid)

    def run(self) -> int:
        """Keep until there is nothing left to keep. Return the exit code."""
        gc.collect()
        gc.freeze()
        while True:
            self._work_due()
            if self._exit_code is not None:
                self._cgroups.leave()
                return self._exit_code
            for key, events in self._selector.select(self._timeout()):
                if key.fd == self._wakeup:
                    self._on_signals(os.read(self._wakeup, 4096))
                elif key.fileobj is self._control:
                    self._on_control(events)
                elif self._zygote and key.fileobj is self._zygote.channel:
                    self._on_zygote(events)

    def _timeout(self) -> float | None:
        due = min(
            self._children.due(),
            self._cgroups.due(),
            self._spare_due,
            math.inf if self._leaving else self._record_until,
        )
        if self._server:
            due = min(due, self._server.due, self._server.kill_at)
        if self._notifier:
            due = min(due, self._notifier.due)
        return None if due == math.inf else max(0.0, due - time.monotonic())

    def _work_due(self) -> None:
        for child in self._children.settle():
            os.close(child.mailbox)
            os.close(child.pulse)
            if child.cell:
                self._cgroups.remove(child.cell)
            self._send(self._children.exits[child.spec.run].to_frame() | {"event": "exit"})
        if not (self._zygote and self._zygote.waiting):
            self._unclaimed.clear()
        if self._cgroups.due() <= time.monotonic():
            self._cgroups.tidy()
        if self._spare_due <= time.monotonic():
            self._fork_spare()
        if self._ending and not self._children.live:
            self._finish()
        if self._server and self._exit_code is None:
            self._server.kill_if_due()
            if self._server.due <= time.monotonic() and not self._leaving:
                self._start_server()
        if self._notifier:
            self._notifier.keep_alive()

    def _start_server(self) -> None:
        assert self._server
        try:
            control = self._server.start()
        except OSError as error:  # no process, memory or descriptor is left: the jobs go on
            say("error", "cannot start the server", error=error, next_start_s=round(self._server.ended(), 1))
        else:
            self._attach(control)

    # the signals

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGCHLD in numbers:
            self._reap()
        if signal.SIGTERM in numbers or (self._server and signal.SIGINT in numbers):
            self._end_all(grace_s=0.0 if self._ending else None)
        if self._notifier and signal.SIGHUP in numbers:
            self._notifier.reloading()
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
                elif self._spare and pid == self._spare.pid:  # killed: the next run is forked
                    self._spare.close()
                    self._spare = None
                elif not self._children.reaped(pid, status, usage) and self._zygote and self._zygote.waiting:
                    self._unclaimed[pid] = (status, usage)  # of a run, maybe, that the zygote has not told of yet

    def _on_server_end(self, status: int) -> None:
        assert self._server
        code = os.waitstatus_to_exitcode(status)
        self._drain()
        self._detach()
        if self._zygote:
            for prepared in self._zygote.void_all():  # the next server does not know of them, and starts the jobs anew
                prepared.close(self._cgroups)
        expected = self._server.replacing or self._leaving
        delay_s = self._server.ended()
        refuses = code > 0 and not self._server.ready  # nor would the next one serve
        if refuses and not (expected or self._ending):
            self._leaving = True
            self._final_code = code
            self._end_all(grace_s=None)
        elif not expected:
            say("error", "the server ended", how=_how(code), next_start_s=round(delay_s, 1))
            if self._notifier:
                self._notifier.status(f"the server ended ({_how(code)}); the jobs go on")

    def _drain(self) -> None:
        """Do what the server had asked for before it ended: nobody will ask again."""
        alive = True
        with suppress(WireError):  # cut off in the middle of a frame
            while alive and self._control and self._control.is_readable:
                frames, alive = self._control.receive()
                self._on_frames(frames)

    def _end_all(self, grace_s: float | None) -> None:
        if self._notifier and not self._ending:
            graces_s = [child.spec.kill_grace for child in self._children.live.values()]
            self._notifier.stopping(within_s=max(graces_s, default=0.0) + _RECORD_S + 2 * LEAVE_S)
        self._ending = True
        self._drop_spare()
        self._send({"event": "ending"})
        if self._zygote:
            self._drop_zygote()  # it may be importing yet, for as long as it likes
        for run, child in list(self._children.live.items()):
            self._children.end(run, child.spec.kill_grace if grace_s is None else grace_s)

    def _finish(self) -> None:
        """No run is left: give the server its time to store the last exits, have it leave, and end."""
        self._record_until = min(self._record_until, time.monotonic() + _RECORD_S)
        server = self._server  # one that is still coming up will store them, one that never came up will not
        can_record = bool(server.pid or server.ready) if server else self._control is not None
        if can_record and self._children.exits and time.monotonic() < self._record_until:
            return
        self._leaving = True
        if self._server and self._server.pid:
            self._server.leave()
        else:
            self._exit_code = self._final_code

    # the server's socket

    def _attach(self, control: socket.socket) -> None:
        self._control = Channel(control)
        self._selector.register(self._control, selectors.EVENT_READ)
        self._send(
            {
                "event": "hello",
                "protocol": PROTOCOL,
                "version": __version__,
                "pid": os.getpid(),
                "server_starts": self._server.starts if self._server else 1,
                "served": bool(self._server and self._server.ready),
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
            self._control.flush()
            self._watch(self._control)
        if not events & selectors.EVENT_READ:
            return
        try:
            frames, alive = self._control.receive()
        except WireError as error:  # it cannot be trusted any more; as root, the next server starts afresh
            say("error", f"{error}; the connection is closed")
            frames, alive = [], False
        self._on_frames(frames)
        if not alive:
            self._detach()
            if self._server is None:
                self._end_all(grace_s=None)
            else:
                self._server.expire()

    def _on_frames(self, frames: Iterable[tuple[Frame, list[int]]]) -> None:
        for frame, fds in frames:
            if frame.get("op") != "spawn" or len(self._prepared) == _FORKED_AT_ONCE:
                self._fork_prepared()
            self._on_frame(frame, fds)
        self._fork_prepared()

    def _on_frame(self, frame: Frame, fds: list[int]) -> None:
        try:
            handler = _OPERATIONS.get(frame.get("op", ""))
            if handler is None:
                raise WireError(f"cannot do {frame.get('op')!r}: this keeper speaks protocol {PROTOCOL}")
            answer = handler(self, frame, fds)
        except (HarnessError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            answer = Answer({"error": str(error) if isinstance(error, HarnessError) else repr(error)})
        if answer is not None:
            self._answer(frame.get("id"), answer)

    def _answer(self, request: int | None, answer: Answer) -> None:
        self._send({"re": request} | answer.frame, answer.fds)

    def _send(self, frame: Frame, fds: Iterable[int] = ()) -> None:
        if self._control:
            self._control.send(frame, fds)
            self._watch(self._control)

    def _watch(self, channel: Channel) -> None:
        self._selector.modify(channel, selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.is_blocked else 0))

    # what the server may ask for

    def _op_list(self, frame: Frame, fds: list[int]) -> Answer | None:
        for child in self._children.live.values():
            self._send(child.to_frame() | {"event": "child"}, [child.mailbox, child.pulse])
        for record in self._children.exits.values():
            self._send(record.to_frame() | {"event": "exit"})
        for name, held in self._stored.items():
            self._send({"event": "stored", "name": name}, held)
        return Answer()

    def _op_spawn(self, frame: Frame, fds: list[int]) -> Answer | None:
        spec = RunSpec.from_frame(frame["spec"])
        if self._ending:
            raise _too_late(spec.job)
        if any(spec.run in runs for runs in (self._children.live, self._children.exits, self._prepared)):
            raise SpawnFailed(f"cannot start {spec.job!r}: there is a run {spec.run} already")
        if self._server:
            self._require_descriptors(spec.job)
        prepared = prepare(frame.get("id"), spec, self._cgroups)
        if self._zygote and not spec.is_executed:
            try:
                self._zygote.fork(prepared)
            except OSError:
                prepared.close(self._cgroups)
                raise
            self._watch(self._zygote.channel)
        else:
            self._prepared[spec.run] = prepared
        return None  # it is answered when it is a process

    def _require_descriptors(self, job: str) -> None:
        """Raise SpawnFailed for a run that would leave the server too few to answer with, or to take over all runs."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = int(limit * _RUNS_SHARE - _FDS_OF_SERVER) // _FDS_OF_RUN
        runs = len(self._children.live) + len(self._prepared) + (len(self._zygote.waiting) if self._zygote else 0)
        if runs >= most:
            raise SpawnFailed(
                f"cannot start {job!r}: there are {runs} runs, and {limit} file descriptors are enough for "
                f"{max(0, most)}; raise the limit that the daemon starts with (ulimit -Hn, LimitNOFILE=)"
            )

    def _fork_prepared(self) -> None:
        if not self._prepared:
            return
        several = [prepared for prepared in self._prepared.values() if not self._use_spare(prepared)]
        forked = fork(several, self._pristine)
        self._prepared.clear()
        for prepared, result in zip(several, forked, strict=True):
            if isinstance(result, SpawnFailed):
                self._refuse(prepared, result)
            else:
                self._started(prepared, *result)

    def _refuse(self, prepared: Prepared, why: SpawnFailed) -> None:
        prepared.close(self._cgroups)
        self._answer(prepared.request, Answer({"error": str(why)}))

    def _started(self, prepared: Prepared, pid: int, began: Began) -> None:
        child = prepared.child(pid, began)
        self._children.add(child)
        if not (self._spare or self._zygote or self._pristine.script or child.spec.is_executed):
            self._spare_due = time.monotonic() + _SPARE_AFTER_S
        if pid in self._unclaimed:
            self._children.reaped(pid, *self._unclaimed.pop(pid))
        try:
            self._answer(prepared.request, Answer(child.to_frame(), (child.mailbox, child.pulse)))
        except OSError as error:  # no descriptor is left to hand over: the server could not be told of it
            self._children.end(child.spec.run, 0.0)
            self._answer(prepared.request, Answer({"error": f"cannot start {child.spec.job!r}: {error}"}))

    def _op_preload(self, frame: Frame, fds: list[int]) -> Answer | None:
        """Have later runs forked from a process that has imported the modules; with none, from the keeper."""
        if self._zygote and self._zygote.modules == frame["modules"]:
            return Answer()
        if self._zygote:
            self._drop_zygote()
        if frame["modules"]:
            self._drop_spare()
            self._zygote = Zygote(list(frame["modules"]), self._pristine)
            self._selector.register(self._zygote.channel, selectors.EVENT_READ)
        return Answer()

    def _op_end(self, frame: Frame, fds: list[int]) -> Answer | None:
        self._children.note_end(frame["run"], frame.get("note", {}))
        if frame["grace"] is None:
            return Answer()
        if frame["run"] in self._children.live:
            self._children.end(frame["run"], frame["grace"])
        elif self._zygote and (prepared := self._zygote.void(frame["run"])):  # it may import for as long as it likes
            self._refuse(prepared, SpawnFailed(f"cannot start {prepared.spec.job!r}: it was ended before"))
        return Answer()

    def _op_signal(self, frame: Frame, fds: list[int]) -> Answer | None:
        if frame["run"] in self._children.live:
            signals = tuple(signal.Signals(number) for number in frame["signals"])
            self._children.signal(frame["run"], signals, whole_tree=frame["tree"])
        return Answer()

    def _op_ack(self, frame: Frame, fds: list[int]) -> Answer | None:
        self._children.exits.pop(frame["run"], None)
        return Answer()

    def _op_store(self, frame: Frame, fds: list[int]) -> Answer | None:
        for fd in self._stored.pop(frame["name"], []):
            os.close(fd)
        if fds:
            self._stored[frame["name"]] = fds
        return Answer()

    def _op_ready(self, frame: Frame, fds: list[int]) -> Answer | None:
        if self._server:
            self._server.ready = True
        if self._notifier and not self._ending:
            self._notifier.ready("serving")
        return Answer()

    def _op_reloaded(self, frame: Frame, fds: list[int]) -> Answer | None:
        if self._notifier:
            self._notifier.reloaded()
        return Answer()

    # the spare

    def _fork_spare(self) -> None:
        self._spare_due = math.inf
        with suppress(OSError):  # the next run is forked, or refused with a reason
            self._spare = Spare(self._pristine)

    def _use_spare(self, prepared: Prepared) -> bool:
        """Have the spare become the run. Return False if there is none, or it could not."""
        if self._spare is None or prepared.spec.is_executed:
            return False
        spare, self._spare = self._spare, None
        began = Began.now()
        if not spare.become(prepared):
            return False
        self._started(prepared, spare.pid, began)
        return True

    def _drop_spare(self) -> None:
        self._spare_due = math.inf
        if self._spare:
            self._spare.end()
            self._spare = None

    # the zygote

    def _on_zygote(self, events: int) -> None:
        assert self._zygote
        if events & selectors.EVENT_WRITE:
            self._zygote.channel.flush()
            self._watch(self._zygote.channel)
        try:
            frames, alive = self._zygote.channel.receive()
        except WireError:
            frames, alive = [], False
        failed = "" if alive else "the process that holds the preloaded modules has died"
        for frame, _ in frames:
            failed = frame.get("failed", failed)
            if "pid" in frame:
                self._on_forked(frame["run"], frame["pid"])
        if failed:
            self._send({"event": "preload-failed", "modules": self._zygote.modules, "why": failed})
            self._drop_zygote()

    def _on_forked(self, run: int, pid: int) -> None:
        assert self._zygote
        prepared = self._zygote.waiting.pop(run, None)
        if prepared is None:
            return  # void, and about to end
        pulse.claim(prepared.ends.pulse, pid)
        self._started(prepared, pid, Began.now())
        if not self._zygote.waiting:
            self._unclaimed.clear()

    def _drop_zygote(self) -> None:
        """Let it go; what it was asked for and has not done is forked from the keeper, or refused at the end."""
        zygote, self._zygote = self._zygote, None
        assert zygote
        self._selector.unregister(zygote.channel)
        zygote.end()
        self._unclaimed.clear()
        for prepared in zygote.void_all():
            if self._ending:
                self._refuse(prepared, _too_late(prepared.spec.job))
            else:
                self._prepared[prepared.spec.run] = prepared
        self._fork_prepared()

    def _own_fds(self) -> list[int]:
        """Return what this keeper has open beside what the script had, so that its run closes it."""
        fds = [self._selector.fileno(), self._wakeup, self._wakeup_write]
        fds += [self._control.fileno()] if self._control else []
        for child in self._children.live.values():
            fds += (child.mailbox, child.pulse)
        for prepared in self._prepared.values():
            fds += prepared.fds()
        return fds


_Operation = Callable[[Keeper, Frame, list[int]], Answer | None]
_OPERATIONS: dict[str, _Operation] = {
    "list": Keeper._op_list,
    "spawn": Keeper._op_spawn,
    "end": Keeper._op_end,
    "signal": Keeper._op_signal,
    "ack": Keeper._op_ack,
    "store": Keeper._op_store,
    "ready": Keeper._op_ready,
    "reloaded": Keeper._op_reloaded,
    "preload": Keeper._op_preload,
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


def _too_late(job: str) -> SpawnFailed:
    return SpawnFailed(f"cannot start {job!r}: the daemon is ending")


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"signal {-code}"
