"""The checks, run for real against small servers and commands; the runs that they are about are made up."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.daemon import ended, free_port
from helpers.waiting import DEADLINE_S, until

from harnessd import tree
from harnessd.server import checks, policy
from harnessd.server.checks import Checks
from harnessd.server.jobspec import JobSpec
from harnessd.states import State
from harnessd.wire import RunSpec

MARK = tree.new_mark()


class Rig:
    """A job that is up, its checks, and what they said."""

    def __init__(self, folder: Path, **check: Any) -> None:
        file = folder / "a.toml"
        raw = {"name": "a", "file": file, "command": ["true"], "env": {"WHO": "job"}, "check": check}
        spec = JobSpec.parse(raw, "it")
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self.events: list[policy.Event] = []
        self.stopped = False
        self._now = 1000.0
        live = SimpleNamespace(
            run=1, ended=False, info=SimpleNamespace(mark=MARK, pid=os.getpid()), is_stopped=lambda: self.stopped
        )
        self.entry: Any = SimpleNamespace(
            name="a",
            live=live,
            checked=None,
            job=SimpleNamespace(state=State.RUNNING),
            definition=SimpleNamespace(spec=spec, run_spec=self._filled),
        )
        self._folder = folder
        self.checks = Checks(self._note, self._apply)

    def _apply(self, entry: Any, event: policy.Event, why: str) -> None:
        self.events.append(event)

    def _filled(self, blank: RunSpec) -> RunSpec:
        changes = {"env": {"WHO": "job", "HARNESSD_TOKEN": None}, "cwd": str(self._folder), "umask": 0o77}
        return RunSpec.from_frame(blank.to_frame() | changes)

    def _note(self, entry: Any, kind: str, actor: str | None, data: dict[str, Any]) -> None:
        self.notes.append((kind, data))

    async def check(self, times: int = 1) -> Any:
        """Run it so many times, one after the other. Return what is known then."""
        for _ in range(times):
            self.checks.look(self.entry, self._now)
            self._now += 86400
            self.checks.look(self.entry, self._now)
            async with asyncio.timeout(DEADLINE_S):
                while tasks := list(self.checks._under_way.values()):
                    await asyncio.wait(tasks)
                    await asyncio.sleep(0)
        return self.entry.checked


def checked(folder: Path, times: int = 1, **check: Any) -> tuple[Any, Rig]:
    async def done() -> tuple[Any, Rig]:
        rig = Rig(folder, **check)
        return await rig.check(times), rig

    return asyncio.run(done())


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


async def served(answers: bytes, body: Callable[[str], Awaitable[None]], hold: bool = False) -> None:
    """Run the body with the URL of a server that says this to everyone; with `hold` it says nothing."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if hold:
            await reader.read()
        writer.write(answers)
        writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        await body(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/health")


@pytest.mark.parametrize(("status", "error"), [(200, None), (302, None), (404, "answered 404"), (503, "answered 503")])
def test_http_is_well_with_2xx_and_3xx(tmp_path: Path, status: int, error: str | None) -> None:
    async def body(url: str) -> None:
        found = await Rig(tmp_path, http=url).check()
        assert (found.ok, found.last_error) == (error is None, error)

    asyncio.run(served(f"HTTP/1.1 {status} So\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n".encode(), body))


def test_http_that_does_not_answer_in_time_is_not_well(tmp_path: Path) -> None:
    async def body(url: str) -> None:
        found = await Rig(tmp_path, http=url, timeout=0.05).check()
        assert found.last_error == "no answer within 0.05 s"

    asyncio.run(served(b"", body, hold=True))


def test_http_where_nobody_listens_or_speaks_otherwise_is_not_well(tmp_path: Path) -> None:
    found, _ = checked(tmp_path, http=f"http://127.0.0.1:{free_port()}/")
    assert found.last_error.startswith("ConnectError: ")

    async def body(url: str) -> None:
        assert "Protocol" in (await Rig(tmp_path, http=url).check()).last_error

    asyncio.run(served(b"220 smtp.example ESMTP\r\n", body))


def test_a_client_that_could_not_be_made_is_made_for_the_next_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, fails = checks._make_client, [OSError("Too many open files")]

    def made() -> object:
        if fails:
            raise fails.pop()
        return make()

    async def body(url: str) -> None:
        rig = Rig(tmp_path, http=url)
        await rig.check()
        assert not fails
        assert (await rig.check()).ok is True

    monkeypatch.setattr(checks, "_make_client", made)
    asyncio.run(served(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", body))


def test_a_command_runs_as_the_job_does(tmp_path: Path) -> None:
    script = 'test "$WHO" = job && test -z "${HARNESSD_TOKEN+set}" && test "$PWD" = "$0" && test "$(umask)" = 0077'
    found, rig = checked(tmp_path, command=[*sh(script), str(tmp_path)])
    assert (found.ok, found.last_error, rig.notes) == (True, None, [])


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (sh("exit 3"), "exit code 3"),
        (sh("echo bad; echo worse >&2; exit 2"), "exit code 2: bad\nworse"),
        (sh("kill -SEGV $$"), "signal 11"),
        (["/nowhere/at/all"], "cannot run /nowhere/at/all: "),
    ],
)
def test_a_command_that_fails_is_told_with_its_output(tmp_path: Path, command: list[str], error: str) -> None:
    found, _ = checked(tmp_path, command=command)
    assert not found.ok and found.last_error.startswith(error)


def test_of_much_output_the_end_is_told(tmp_path: Path) -> None:
    found, _ = checked(tmp_path, command=sh("seq 100000; exit 1"))
    assert found.last_error.endswith("\n100000") and len(found.last_error) < 1100


def test_a_command_is_ended_with_all_it_started_when_its_time_is_over(tmp_path: Path) -> None:
    found, _ = checked(tmp_path, command=sh("sleep 1000 & echo $! > child; echo waits; wait"), timeout=0.3)
    assert found.last_error == "not done within 0.3 s: waits"
    until(lambda: ended(int((tmp_path / "child").read_text())), "it is ended")


def test_a_command_does_not_wait_for_what_it_left_behind(tmp_path: Path) -> None:
    found, _ = checked(tmp_path, command=sh("sleep 1000 & echo $! > child"), timeout=60)
    assert found.ok
    until(lambda: ended(int((tmp_path / "child").read_text())), "it is ended")


def test_a_command_wears_the_mark_of_the_run(tmp_path: Path) -> None:
    async def marked() -> list[int]:
        rig = Rig(tmp_path, command=sh("exec sleep 1000"), timeout=60)
        rig.checks.look(rig.entry, 0.0)
        rig.checks.look(rig.entry, 86400.0)
        async with asyncio.timeout(DEADLINE_S):
            while not (found := tree.members({MARK}).get(MARK)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return found

    (pid,) = asyncio.run(marked())
    until(lambda: ended(pid), "it is ended with the server")


def test_unhealthy_is_told_and_acted_upon_once_and_healthy_when_it_is_over(tmp_path: Path) -> None:
    found, rig = checked(tmp_path, 4, command=sh("test -e well || exit 7"), failures=2)
    assert rig.notes == [("unhealthy", {"failures": 2, "error": "exit code 7", "action": "restart"})]
    assert [type(event) for event in rig.events] == [policy.Hung] and found.failures == 4
    (tmp_path / "well").touch()
    asyncio.run(rig.check())
    assert rig.notes[1:] == [("healthy", {})]


def test_notify_only_tells(tmp_path: Path) -> None:
    _, rig = checked(tmp_path, 3, command=sh("exit 1"), failures=1, action="notify")
    assert [kind for kind, _ in rig.notes] == ["unhealthy"] and rig.events == []


@pytest.mark.parametrize("state", [State.PAUSED, State.STOPPING, State.STARTING])
def test_only_a_job_that_is_up_is_checked(tmp_path: Path, state: State) -> None:
    async def in_state() -> Any:
        rig = Rig(tmp_path, command=sh("touch asked"))
        rig.entry.job.state = state
        return await rig.check()

    assert asyncio.run(in_state()).ok is None
    assert not (tmp_path / "asked").exists()


def test_a_job_that_a_signal_has_stopped_is_not_checked(tmp_path: Path) -> None:
    async def stopped() -> Any:
        rig = Rig(tmp_path, command=sh("exit 1"))
        rig.stopped = True
        return await rig.check()

    assert asyncio.run(stopped()).ok is None


def test_the_first_check_comes_a_while_after_the_run_is_up(tmp_path: Path) -> None:
    async def early() -> Any:
        rig = Rig(tmp_path, command=sh("exit 1"), every=10)
        for now in (100.0, 109.9):
            rig.checks.look(rig.entry, now)
        return rig.checks._under_way

    assert asyncio.run(early()) == {}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as process:
        yield process
        process.send_signal(signal.SIGKILL)


def test_a_mark_can_be_put_on_another_process(sleeper: subprocess.Popen[bytes]) -> None:
    mark = tree.new_mark()
    tree.put_on(mark, sleeper.pid)
    assert tree.members({mark}) == {mark: [sleeper.pid]}
