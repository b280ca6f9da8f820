"""After the fork: what turns a copy of the keeper into a run, and the end of one.

Nothing here returns into the keeper: every path leads to execve(2) or to os._exit(2).
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from harnessd import tree
from harnessd.errors import SpawnFailed
from harnessd.job import pulse
from harnessd.job.conduct import Ends, conduct
from harnessd.job.journal import Journal
from harnessd.keeper.cgroup import Cell, Cgroups
from harnessd.keeper.children import Child
from harnessd.keeper.say import say
from harnessd.wire import Frame, RunSpec

_HIGH_FD = 900  # below every usual limit, above what a job opens: a job that closes all and opens anew won't meet it
_COMMAND_MAILBOX = 3  # a shell can name descriptors of one digit only
_PR_SET_PDEATHSIG = 1
EXIT_CANNOT_EXECUTE = 126  # as a shell says it
_EXIT_NOT_FOUND = 127
_prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: in a run that would touch more of its pages


@dataclass(frozen=True, slots=True)
class Pristine:
    """How the process was before the keeper changed it for itself, so that a run finds it so."""

    keeper_pid: int
    handlers: dict[int, Any]
    nofile: tuple[int, int]
    own_fds: Callable[[], Iterable[int]] | None  # what the keeper has open; None: all but stdio
    job: object | None  # in single job mode: what the user's script handed to main()
    script: bool  # in single job mode: the process is a copy of the user's script


class Began(NamedTuple):
    """When a run began: when it was forked, or what was forked ahead became it."""

    at: float  # wall clock, epoch seconds
    mono: float
    ticks: int  # since boot

    @classmethod
    def now(cls) -> Began:
        return cls(time.time(), time.monotonic(), tree.ticks_now())


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that has its descriptors and no process yet."""

    request: int | None  # the server's
    spec: RunSpec
    ends: Ends
    mailbox: int  # the keeper's end
    cell: Cell | None
    enter: int | None  # where to write to be in it
    limits: dict[str, str]  # how each is enforced

    def fds(self) -> list[int]:
        """Return all of them."""
        return [self.mailbox, *self.of_the_run()]

    def told(self) -> Frame:
        """Return what a process has to be told to become it, beside the descriptors."""
        return {"spec": self.spec.to_frame(), "enter": self.enter is not None}

    def of_the_run(self) -> list[int]:
        """Return those that the run wants, in the order in which they are handed to it."""
        return [*self.ends.fds(), *([] if self.enter is None else [self.enter])]

    def close(self, cgroups: Cgroups) -> None:
        """Let go of all that was made for the run, which will never be a process."""
        for fd in self.fds():
            os.close(fd)
        _remove(self.spec.journal)
        if self.cell:
            cgroups.remove(self.cell)

    def child(self, pid: int, began: Began) -> Child:
        """Return the run as the keeper holds it, now that it is a process."""
        for fd in self.of_the_run():
            if fd != self.ends.pulse:
                os.close(fd)
        ticks = tree.start_ticks(pid)
        return Child(self.spec, pid, *began, ticks, self.mailbox, self.ends.pulse, self.cell, self.limits)


def handed(frame: Frame, fds: list[int]) -> tuple[RunSpec, Ends, int | None]:
    """Return what `told` and `of_the_run` come to for the one that is told: spec, ends, where to enter its cgroup."""
    ends, enter = (fds[:-1], fds[-1]) if frame["enter"] else (fds, None)
    return RunSpec.from_frame(frame["spec"]), Ends(*ends), enter


def prepare(request: int | None, spec: RunSpec, cgroups: Cgroups) -> Prepared:
    """Make the run's descriptors. Raise SpawnFailed when the system refuses."""
    opened: list[int] = []
    spec, cell, limits = cgroups.confine(spec)
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        opened += (ours.detach(), theirs.detach())
        opened.append(pulse.create())
        opened.append(_open_to_append(spec.journal, spec))
        opened += [_open_output(path, spec) for path in (spec.output, spec.errors) if path]
        enter = cell.open() if cell else None
    except OSError as error:
        for fd in opened:
            os.close(fd)
        _remove(spec.journal)
        if cell:
            cgroups.remove(cell)
        raise SpawnFailed(f"cannot start {spec.job!r}: {_reason(error)}") from error
    return Prepared(request, spec, Ends(*opened[1:]), opened[0], cell, enter, limits)


def fork(several: Iterable[Prepared], before: Pristine) -> list[tuple[int, Began] | SpawnFailed]:
    """Fork a run for each from this process. Return their pids and times, or why the system refused.

    After a fork, each page that the keeper writes to is copied, and the run holds on to the old one. So there is
    nothing in the loop that could as well be done before or after it.
    """
    forked: list[tuple[int, Began] | SpawnFailed] = []
    unmarked = tree.worn()
    with forking(before) as unsafe:
        for prepared in several:
            try:
                if unsafe:
                    raise unsafe
                tree.wear(prepared.spec.mark)  # the run is born with it: no signal to the run's tree can miss it
                began = Began.now()
                pid = os.fork()
            except Exception as error:  # a spec without sense must not end the keeper
                forked.append(SpawnFailed(f"cannot start {prepared.spec.job!r}: {_reason(error)}"))
                continue
            if pid == 0:
                try:
                    set_apart(before, prepared.of_the_run())
                    become(prepared.spec, prepared.ends, before, prepared.enter)
                finally:  # whatever a signal handler of the job's raises at its end: a run never goes on as a keeper
                    os._exit(1)
            forked.append((pid, began))
    tree.wear(unmarked)
    return forked


@contextmanager
def forking(before: Pristine) -> Iterator[OSError | None]:
    """Hold signals back, as the keeper's handlers must not run in what is forked. Yield what speaks against a fork."""
    signal.pthread_sigmask(signal.SIG_BLOCK, before.handlers)
    try:
        alone = os.stat("/proc/self/task").st_nlink == 2 + 1  # a directory for each thread
        why = "the keeper has more than one thread, a fork would be unsafe"
        yield None if alone else OSError(errno.EDEADLK, why)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, before.handlers)


def _open_to_append(path: str, spec: RunSpec) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if spec.uid is not None:
            os.fchown(fd, spec.uid, -1 if spec.gid is None else spec.gid)
    except OSError:
        os.close(fd)
        raise
    return fd


def _remove(path: str) -> None:
    with suppress(OSError):  # it was not made yet
        os.unlink(path)


def _open_output(path: str, spec: RunSpec) -> int:
    try:
        return _open_to_append(path, spec)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        say("error", "output is lost", job=spec.job, error=_reason(error))  # the run matters more
        return os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)


def set_apart(before: Pristine, keep: Iterable[int]) -> None:
    """Make this process, just forked, one of its own, with no descriptors but stdio and those to keep."""
    os.setsid()
    gc.freeze()  # what the keeper made since its start is left alone too, as a collection would copy its pages
    if before.own_fds:  # the others are the script's, for its job
        for fd in set(before.own_fds()).difference(keep):
            os.close(fd)
        return
    for low, high in pairwise([2, *sorted(keep), resource.getrlimit(resource.RLIMIT_NOFILE)[1]]):  # all of the keeper's
        os.closerange(low + 1, high)


def become(spec: RunSpec, ends: Ends, before: Pristine, enter: int | None) -> NoReturn:
    """Turn this process, which was set apart, into the run."""
    journal = None
    try:
        if enter is not None:
            os.write(enter, b"0")
            os.close(enter)
        ends = _place_fds(ends)
        journal = Journal(ends.journal, ends.pulse, spec.journal_max_bytes)
        _set_identity(spec, before)
        restore_signals(before)
        if spec.is_executed:
            _execute(spec, ends)
        _become_python(spec, before)
    except BaseException as error:  # this is still the keeper's copy: nothing may travel up its stack
        why = f"cannot start {spec.job!r}: {_reason(error)}"
        _say(f"harnessd: {why}")
        if journal:
            journal.error(why)
        missing = isinstance(error, FileNotFoundError) and error.filename != spec.cwd
        os._exit(_EXIT_NOT_FOUND if missing else EXIT_CANNOT_EXECUTE)
    conduct(spec, ends, journal, before.job)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or repr(error)


def _say(text: str) -> None:
    try:
        os.write(2, text.encode(errors="replace") + b"\n")
    except OSError:
        pass  # nobody reads the job's stderr; the journal has it too


def _place_fds(ends: Ends) -> Ends:
    if ends.output is not None:
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0, inheritable=True)
        os.dup2(ends.output, 1, inheritable=True)
        os.dup2(ends.output if ends.errors is None else ends.errors, 2, inheritable=True)
        for fd in {null, ends.output, ends.errors}:
            if fd is not None and fd > 2:
                os.close(fd)
    placed = [_lift(fd) for fd in (ends.mailbox, ends.pulse, ends.journal)]
    return Ends(*placed)


def _lift(fd: int) -> int:
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EMFILE):  # a lower limit than usual: it stays where it is
            raise
        return fd
    os.close(fd)
    return high


def _set_identity(spec: RunSpec, before: Pristine) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, before.nofile)
    for name, value in spec.limits.items():
        number = getattr(resource, f"RLIMIT_{name.upper()}")
        hard = resource.getrlimit(number)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (limit, limit))
    if spec.nice:
        os.nice(spec.nice)
    if spec.umask is not None:
        os.umask(spec.umask)
    if spec.gid is not None:
        os.setgroups(spec.groups)
        os.setgid(spec.gid)
    if spec.uid is not None:
        os.setuid(spec.uid)
    if spec.cwd:
        os.chdir(spec.cwd)
    die_with(before.keeper_pid)  # last, since a change of user clears it


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends (prctl(2), PR_SET_PDEATHSIG)."""
    if _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it ended before the call
        os._exit(1)


def restore_signals(before: Pristine) -> None:
    """Have this process handle signals as the keeper did at first, and let those come that were held back."""
    signal.set_wakeup_fd(-1)
    for number, handler in before.handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _execute(spec: RunSpec, ends: Ends) -> NoReturn:
    mailbox = ends.mailbox if spec.python else os.dup2(ends.mailbox, _COMMAND_MAILBOX)
    os.set_inheritable(mailbox, True)
    changes = {**spec.env, "HARNESS_JOURNAL": spec.journal, "HARNESS_MAILBOX": str(mailbox)}
    env = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    argv = [*spec.command, *spec.args]
    if spec.python:
        os.set_blocking(ends.mailbox, False)
        handed = os.memfd_create("harnessd-run", 0)
        os.write(
            handed, json.dumps({"spec": spec.to_frame(), "fds": [ends.mailbox, ends.pulse, ends.journal]}).encode()
        )
        for fd in (ends.pulse, ends.journal):
            os.set_inheritable(fd, True)
        argv = [spec.python, str(Path(__file__).with_name("bootstrap.py")), str(handed)]
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python itself, not by what is executed here
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(argv[0], argv, env)


def _become_python(spec: RunSpec, before: Pristine) -> None:
    if before.script:
        _forget_exit_functions()
        return
    set_title(f"harnessd: {spec.job}")
    for name, value in spec.env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "TZ" in spec.env:
        time.tzset()
    os.environ["HARNESS_JOURNAL"] = spec.journal
    usual = sys.__stdout__  # as the locale and $PYTHONIOENCODING have it: in the C locale any file name can be printed
    encoding, errors = (usual.encoding, usual.errors) if usual else (None, None)
    sys.stdin = open(0, encoding=encoding, errors=errors, closefd=False)
    sys.stdout = open(1, "w", buffering=1, encoding=encoding, errors=errors, closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding=encoding, errors="backslashreplace", closefd=False)
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
    sys.modules["__main__"] = ModuleType("__main__")


def set_title(title: str) -> None:
    """Have `ps` show this process so, if setproctitle is loaded: an import statement here would cost a run 80 pages."""
    if module := sys.modules.get("setproctitle"):
        module.setproctitle(title)


def _forget_exit_functions() -> None:
    """Leave out what the user's script registered for its own end, keep what belongs to libraries (as CPython's
    multiprocessing does since 3.13)."""
    atexit._clear()
    for finalizer in weakref.finalize._registry.values():  # type: ignore[attr-defined]
        finalizer.atexit = False
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]  # the run's own register anew
    if logging := sys.modules.get("logging"):
        atexit.register(logging.shutdown)
    if util := sys.modules.get("multiprocessing.util"):
        atexit.register(util._exit_function)
