"""A job's run from its import to its exit code, in a process that was made for it."""

from __future__ import annotations

import asyncio
import atexit
import gc
import importlib
import importlib.util
import inspect
import io
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from harnessd.errors import NotAJob
from harnessd.job import pulse
from harnessd.job.cradle import Cradle, Mailbox
from harnessd.job.journal import Journal
from harnessd.wire import RunSpec

_FLUSH_S = 2.0
_FLUSH_ALL_S = 4.0
_FLUSH_LATE_S = 0.05  # for each file after that
_BUFFERED = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)


@dataclass(frozen=True, slots=True)
class Ends:
    """The descriptors of a run."""

    mailbox: int
    pulse: int
    journal: int
    output: int | None = None
    errors: int | None = None

    def fds(self) -> list[int]:
        """Return those that there are, in the order in which they are handed on."""
        every = (self.mailbox, self.pulse, self.journal, self.output, self.errors)
        return [fd for fd in every if fd is not None]


def conduct(spec: RunSpec, ends: Ends, journal: Journal, job: object | None) -> NoReturn:
    """Run the job in this process and end with its exit code."""
    code = 1
    try:
        os.set_blocking(ends.mailbox, False)
        mailbox = Mailbox(ends.mailbox, pulse.attach(ends.pulse), journal, dict(spec.config))
        Cradle._harness = mailbox  # of the class, so that a job keeps its own attributes and can be pickled
        if job is not None:
            gc.unfreeze()  # the files that the script has opened for it are to be flushed at its end
        cradle = as_cradle(job if job is not None else _load(spec))
        code = _exit_code(_call(cradle.run, spec.args))
    except SystemExit as error:
        code = _system_exit_code(error.code)
    except KeyboardInterrupt:
        _attempt(sys.excepthook, *sys.exc_info())
        leave(signal_number=signal.SIGINT)
    except BaseException as error:
        journal.error("".join(traceback.format_exception_only(error)).strip())
        _attempt(sys.excepthook, *sys.exc_info())
    leave(code)


def _call(run: Callable[..., Any], args: list[str]) -> Any:
    result = run(*args) if args and _takes(run) else run()
    return asyncio.run(_awaited(result)) if isinstance(result, Awaitable) else result


async def _awaited(result: Any) -> Any:
    return await result


def _takes(run: Callable[..., Any]) -> float:
    """Return how many positional arguments it takes at the most."""
    kinds = inspect.Parameter
    counts: dict[Any, float] = {
        kinds.POSITIONAL_ONLY: 1,
        kinds.POSITIONAL_OR_KEYWORD: 1,
        kinds.VAR_POSITIONAL: math.inf,
    }
    return sum(counts.get(parameter.kind, 0) for parameter in inspect.signature(run).parameters.values())


def _exit_code(result: Any) -> int:
    """Return what `run` returned as an exit code; what is no int is success, as no error was raised."""
    if not isinstance(result, int):
        return 0
    return result & 0xFF or (1 if result else 0)  # 256 must not become success


def _system_exit_code(code: Any) -> int:
    if code is None or isinstance(code, int):
        return _exit_code(code)
    _attempt(print, code, file=sys.stderr)
    return 1


def leave(code: int = 0, signal_number: int | None = None) -> NoReturn:
    """End the process as the interpreter would: join threads, run exit functions, flush what is open."""
    _attempt(threading._shutdown)  # type: ignore[attr-defined]
    _attempt(atexit._run_exitfuncs)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not getattr(stream, "closed", False) and not _attempt(stream.flush):
            code = code or 120  # as Python says that it could not flush
    rest = iter(_open_files())
    until = time.monotonic() + _FLUSH_ALL_S
    flushing = None
    while flushing is None or flushing.is_alive():  # whoever writes to a full pipe holds it for ever
        flushing = threading.Thread(target=_flush, args=(rest,), daemon=True)
        if not _attempt(flushing.start):
            _flush(rest)
            break
        flushing.join(min(_FLUSH_S, max(_FLUSH_LATE_S, until - time.monotonic())))
    if signal_number is not None:
        signal.signal(signal_number, signal.SIG_DFL)
        os.kill(os.getpid(), signal_number)
    os._exit(code)


def flush_files() -> None:
    """Flush what is open for writing. Frozen objects are not looked at."""
    _flush(_open_files())


def _open_files() -> list[Any]:
    """Return what has buffers, texts before what they write to."""
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, _BUFFERED)}
    files: list[Any] = [each for each in objects if type(each) in kinds]
    return sorted(files, key=lambda file: not issubclass(type(file), io.TextIOWrapper))


def _flush(files: Iterable[Any]) -> None:
    for file in files:
        if _is_open(file):
            _attempt(file.flush)


def _is_open(file: Any) -> bool:
    try:
        return not file.closed
    except Exception:  # its buffer was detached, or is the job's own code
        return False


def _attempt(step: Callable[..., Any], *args: Any, **named: Any) -> bool:
    """Take a step of the end. What the job's own code raises in it is told, and no later step is left out."""
    try:
        step(*args, **named)
    except BaseException:
        with suppress(BaseException):  # its stderr may be what fails
            traceback.print_exc()
        return False
    return True


def _load(spec: RunSpec) -> object:
    """Import the job and return what the entrypoint names."""
    place, _, attribute = spec.entrypoint.rpartition(":")
    sys.argv = [place, *spec.args]
    if place.endswith(".py"):
        _set_first_path(os.path.dirname(place) or ".")
        found: object = _import_file(place)
    else:
        _set_first_path(os.getcwd())
        found = importlib.import_module(place)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found


def _set_first_path(folder: str) -> None:
    if sys.flags.safe_path:
        sys.path.insert(0, folder)
    else:
        sys.path[0] = folder


def _import_file(path: str) -> ModuleType:
    """Import the file. What is used here, every run has pages of its own for: pathlib takes 40."""
    name = os.path.basename(path).removesuffix(".py")
    if name in sys.stdlib_module_names:
        name = f"job_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise NotAJob(f"cannot load {path}: it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def as_cradle(job: object) -> Cradle:
    """Return the job as a Cradle: an instance as it is, a Cradle class instantiated, any other callable wrapped."""
    if isinstance(job, Cradle):
        return job
    if isinstance(job, type):
        if issubclass(job, Cradle):
            return job()
        raise NotAJob(f"cannot run {job.__qualname__}: it does not extend Cradle")
    if callable(job):
        return _Function(job)
    raise NotAJob(f"cannot run {job!r}: a Cradle or a callable is wanted")


class _Function(Cradle):
    """A callable as a job. One that takes a positional argument is handed the Cradle, and `args` if it takes more."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)  # the job's, unless the config has one

    def run(self, *args: str) -> Any:
        if (takes := _takes(self._function)) > 1:
            return self._function(self, *args)
        return self._function(self) if takes else self._function()
