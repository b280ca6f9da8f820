"""Asks the jobs that have a check whether they are well: by HTTP, or with a command that is run as the job is.

A command wears the mark of the run that it checks: whatever becomes of the server, it ends with the run at the latest.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from harnessd import tree
from harnessd.server import policy, watchdog
from harnessd.server.entry import Entry, Live
from harnessd.server.hangs import Apply, Note
from harnessd.states import ExitReason, State
from harnessd.wire import RunSpec

if TYPE_CHECKING:
    import httpx

    from harnessd.server.jobspec import Check

_AT_ONCE = 16  # checks
_OUTPUT_BYTES = 1000  # of a command's output that is told, its last ones
_CHUNK_BYTES = 1 << 16


class Checks:
    """Runs the checks when they are due, and says what they find."""

    def __init__(self, note: Note, apply: Apply) -> None:
        self._note = note
        self._apply = apply
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._client: asyncio.Task[httpx.AsyncClient] | None = None

    def look(self, entry: Entry, now: float) -> None:
        """Begin the job's check if it is due; to be called every second, with the monotonic time."""
        spec, live = entry.definition.spec, entry.live
        check = spec.check if spec else None
        if check is None:
            entry.checked = None
        if check is None or live is None:
            return
        checked = watchdog.of_run(entry.checked, live.run)
        if not _may_be_asked(entry, live):
            entry.checked = replace(checked, due=None)
            return
        entry.checked = checked
        if checked.due is not None and now < checked.due:
            return
        entry.checked = replace(checked, due=now + check.every)
        if checked.due is not None and entry.name not in self._under_way and not live.is_stopped():
            task = asyncio.get_running_loop().create_task(self._check(entry, live, check))
            self._under_way[entry.name] = task
            task.add_done_callback(lambda _: self._under_way.pop(entry.name, None))

    async def _check(self, entry: Entry, live: Live, check: Check) -> None:
        async with self._places:
            error = await (self._ask(check) if check.http else _run(entry, live, check))
        spec = entry.definition.spec
        same = entry.live is live and spec is not None and spec.check == check
        if same and _may_be_asked(entry, live) and not live.is_stopped():
            self._heard(entry, check, error)

    def _heard(self, entry: Entry, check: Check, error: str | None) -> None:
        before = entry.checked
        assert before
        entry.checked = now = watchdog.heard(before, error, check.failures, time.time())
        if before.ill and not now.ill:
            self._note(entry, "healthy", None, {})
        if now.told and not before.told:
            data = {"failures": now.failures, "error": error, "action": check.action}
            self._note(entry, "unhealthy", None, data)
            if check.action == "restart":
                self._apply(entry, policy.Hung(ExitReason.UNHEALTHY), f"unhealthy: {error}"[:200])

    async def _ask(self, check: Check) -> str | None:
        """Return why the URL does not say that all is well; None if it does."""
        assert check.http
        if self._client is None or (self._client.done() and self._client.exception()):  # once is not for ever
            self._client = asyncio.create_task(asyncio.to_thread(_make_client))
        client = await asyncio.shield(self._client)
        import httpx

        try:
            async with asyncio.timeout(check.timeout), client.stream("GET", check.http) as response:
                client.cookies.clear()
                status = response.status_code
        except TimeoutError:
            return f"no answer within {check.timeout:g} s"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"[:_OUTPUT_BYTES]
        return None if 200 <= status < 400 else f"answered {status}"


def _may_be_asked(entry: Entry, live: Live) -> bool:
    return entry.job.state is State.RUNNING and not live.ended


def _make_client() -> httpx.AsyncClient:
    """Return a client that opens a connection for each check; for a thread, as certificates take time to load."""
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log each request
    return httpx.AsyncClient(trust_env=False, timeout=None, limits=httpx.Limits(max_keepalive_connections=0))


async def _run(entry: Entry, live: Live, check: Check) -> str | None:
    """Return why the command does not say that all is well; None if it does."""
    assert check.command
    blank = RunSpec(run=live.run, job=entry.name, mark=live.info.mark, journal="")
    try:
        spec = entry.definition.run_spec(blank)
        process = await asyncio.to_thread(_spawn, check.command, spec)
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:  # KeyError: the job's user is gone
        return f"cannot run {check.command[0]}: {error}"[:_OUTPUT_BYTES]
    output = bytearray()
    try:
        async with asyncio.timeout(check.timeout):
            await _over(process, output)
    except TimeoutError:
        return _told(f"not done within {check.timeout:g} s", output)
    finally:
        _end(process)
    code = process.returncode
    return None if code == 0 else _told(f"exit code {code}" if code >= 0 else f"signal {-code}", output)


def _spawn(command: list[str], spec: RunSpec) -> subprocess.Popen[bytes]:
    env = {name: value for name, value in {**os.environ, **spec.env}.items() if value is not None}
    process = subprocess.Popen(
        command,
        cwd=spec.cwd or None,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        user=spec.uid,
        group=spec.gid,
        extra_groups=None if spec.uid is None else spec.groups,
        umask=-1 if spec.umask is None else spec.umask,
    )
    tree.put_on(spec.mark, process.pid)
    return process


async def _over(process: subprocess.Popen[bytes], output: bytearray) -> None:
    """Wait for its end, and keep the last of what it writes until then."""
    assert process.stdout
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    pipe, pidfd = process.stdout.fileno(), os.pidfd_open(process.pid)
    os.set_blocking(pipe, False)

    def read() -> None:
        with suppress(BlockingIOError):
            chunk = os.read(pipe, _CHUNK_BYTES)
            output.extend(chunk)
            del output[:-_OUTPUT_BYTES]
            if not chunk:
                loop.remove_reader(pipe)

    loop.add_reader(pipe, read)
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
        read()
    finally:
        loop.remove_reader(pipe)
        loop.remove_reader(pidfd)
        os.close(pidfd)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of its session; what it has started may still hold the pipe."""
    with suppress(ProcessLookupError, PermissionError):  # its leader is not reaped yet: the number is still its own
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one that the kernel cannot end yet is reaped later
        process.wait(1.0)
    assert process.stdout
    process.stdout.close()


def _told(what: str, output: bytearray) -> str:
    text = output.decode(errors="replace").strip()
    return f"{what}: {text}" if text else what
