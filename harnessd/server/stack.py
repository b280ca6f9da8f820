"""Where every thread of a Python process is right now, as py-spy reads it from outside.

The process is never paused: py-spy reads its memory while it runs (`--nonblocking`), and when a frame changed under its
eyes it is asked again. What hangs holds still anyway.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from harnessd import tree
from harnessd.errors import NotPython, Unavailable, WrongState
from harnessd.server.entry import Entry
from harnessd.server.shapes import Frame, Spied, Stack, Thread

TIMEOUT_S = 3.0  # for one process
_TRIES = 3
_MOST_PROCESSES = 50
_EVENT_THREADS, _EVENT_FRAMES = 20, 30  # what an event keeps
_NO_PYTHON = ("Failed to find python version", "Failed to find a python interpreter")
_FOR_PERMISSION = (
    "py-spy may not read the process: run harnessd as root or with CAP_SYS_PTRACE, "
    "or allow it with `sysctl kernel.yama.ptrace_scope=0`"
)
_pool = ThreadPoolExecutor(4, "stack")


async def of(entry: Entry, *, whole: bool = False) -> Stack:
    """Return where the threads of the run's first process are; with `whole`, those of all its Python processes.

    Raises WrongState when there is no run, NotPython, and Unavailable when py-spy is not there or may not look.
    """
    live = entry.live
    if live is None or live.ended:
        raise WrongState(
            f"cannot show the stack of {entry.name!r}: it has no process", job=entry.name, state=entry.job.state
        )
    pid, mark, run = live.info.pid, live.info.mark, live.run
    loop = asyncio.get_running_loop()
    try:
        processes = await loop.run_in_executor(_pool, _all_of if whole else _first_of, pid, mark)
    except (NotPython, Unavailable, WrongState) as error:
        raise type(error)(
            f"cannot show the stack of {entry.name!r}: {error}", job=entry.name, state=entry.job.state
        ) from None
    return {"job": entry.name, "run": run, "processes": processes}


async def for_event(pid: int) -> dict[str, Any]:
    """Return what a `hung` event keeps of the process: `stack`, or None and `stack_error`. Never waits for long."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            threads = await asyncio.get_running_loop().run_in_executor(_pool, dump, pid)
    except TimeoutError:
        return {"stack": None, "stack_error": f"not read within {TIMEOUT_S:g} s"}
    except (NotPython, Unavailable, WrongState) as error:
        return {"stack": None, "stack_error": str(error)}
    return {"stack": [{**each, "frames": each["frames"][:_EVENT_FRAMES]} for each in threads[:_EVENT_THREADS]]}


def dump(pid: int) -> list[Thread]:
    """Return the threads of the process, the main one first. Blocks, at most for some seconds."""
    program = _program()
    said = ""
    for _ in range(_TRIES):
        try:
            done = subprocess.run(
                [program, "dump", "--json", "--nonblocking", "--full-filenames", "--pid", str(pid)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TIMEOUT_S,
                env={**os.environ, "RUST_BACKTRACE": "0"},
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"py-spy did not read it within {TIMEOUT_S:g} s") from None
        said = done.stderr.decode(errors="replace").strip()
        if done.returncode == 0:
            return _threads(pid, json.loads(done.stdout))
        _raise_if_certain(pid, said)
    raise Unavailable(f"py-spy could not read it: {said.partition(chr(10))[0].removeprefix('Error: ')[:300]}")


def _program() -> str:
    found = shutil.which("py-spy", path=sysconfig.get_path("scripts")) or shutil.which("py-spy")
    if found is None:
        raise Unavailable("py-spy is not installed: pip install 'harnessd[stack]'")
    return found


def _raise_if_certain(pid: int, said: str) -> None:
    """Raise for what another try does not change."""
    if "ermission" in said or "EPERM" in said:
        raise Unavailable(_FOR_PERMISSION)
    if not os.path.exists(f"/proc/{pid}/exe"):
        raise WrongState("its process has ended")
    if any(phrase in said for phrase in _NO_PYTHON):
        raise NotPython(f"process {pid} is not Python")


def _first_of(pid: int, mark: int) -> list[Spied]:
    return [{"pid": pid, "threads": dump(pid)}]


def _all_of(pid: int, mark: int) -> list[Spied]:
    """Return those of the run that are Python, the first process first."""
    found: list[Spied] = []
    for member in sorted(tree.members({mark}).get(mark, []), key=lambda each: (each != pid, each))[:_MOST_PROCESSES]:
        try:
            found.append({"pid": member, "threads": dump(member)})
        except (NotPython, WrongState):  # another program, or it has ended meanwhile
            continue
    if not found:
        raise NotPython("none of its processes is Python")
    return found


def _threads(pid: int, dumped: list[dict[str, Any]]) -> list[Thread]:
    threads = sorted(dumped, key=lambda thread: (thread["os_thread_id"] != pid, thread["os_thread_id"] or 0))
    return [
        {
            "id": thread["os_thread_id"],
            "name": thread["thread_name"],
            "active": thread["active"],
            "gil": thread["owns_gil"],
            "frames": [_frame(frame) for frame in thread["frames"]],
        }
        for thread in threads
    ]


def _frame(frame: dict[str, Any]) -> Frame:
    return {"function": frame["name"], "file": frame["filename"], "line": frame["line"]}
