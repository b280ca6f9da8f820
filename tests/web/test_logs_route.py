from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from harnessd.server.definition import from_file
from harnessd.server.jobspec import JobSpec
from harnessd.server.logs import Logs
from harnessd.server.settings import History
from harnessd.server.supervisor import Folders, Supervisor
from harnessd.web.app import make_app
from harnessd.web.call import Context
from harnessd.web.guard import GuardPolicy
from harnessd.web.listening import bind
from harnessd.web.serving import HttpServer

BLOCK = 4096
DEADLINE_S = 30


class NoHost:
    on_exit: Any = None


class Site:
    """The application served for real, with a job `etl` that has no run; the test writes its output."""

    def __init__(self, folder: Path, **log: Any) -> None:
        self.outputs = Logs(folder)
        self.log = folder / "etl.log"
        self.supervisor = Supervisor(NoHost(), Folders(folder, 1 << 20, self.outputs), lambda _: None)  # type: ignore[arg-type]
        spec = JobSpec.parse({"name": "etl", "file": folder / "etl.toml", "command": ["true"], "log": log}, "etl")
        self.supervisor.add(from_file(spec, History()))
        self.context = Context(self.supervisor, dict, 1000)
        self.listening = bind("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        self.server = HttpServer(make_app(self.context, GuardPolicy()), [self.listening])

    def append(self, data: bytes) -> None:
        with self.log.open("ab") as file:
            file.write(data)

    def rotate(self, keep: int = 1000, max_bytes: int = 2 * BLOCK) -> None:
        log = self.outputs.log(str(self.log))
        log.rotate(max_bytes, keep)
        for start in log.to_compress()[::2]:
            log.compress(start)


@asynccontextmanager
async def serving(folder: Path, **log: Any) -> AsyncIterator[tuple[Site, httpx.AsyncClient]]:
    site = Site(folder, **log)
    await site.server.start()
    url = f"http://127.0.0.1:{site.port}/jobs/etl"
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, trust_env=False) as client:
        try:
            yield site, client
        finally:
            site.context.stopping.set()
            await client.aclose()
            await site.server.stop()
            await site.outputs.close()
            site.listening.close()


def served(folder: Path, test: Callable[[Site, httpx.AsyncClient], Coroutine[Any, Any, None]], **log: Any) -> None:
    async def run() -> None:
        async with serving(folder, **log) as (site, client), asyncio.timeout(2 * DEADLINE_S):
            await test(site, client)

    asyncio.run(run())


def ask(folder: Path, output: bytes, **query: Any) -> httpx.Response:
    """Return the answer for a job that wrote that, with the log rotated on the way."""
    answers = []

    async def asked(site: Site, client: httpx.AsyncClient) -> None:
        for begin in range(0, len(output), 5 * BLOCK):
            site.append(output[begin : begin + 5 * BLOCK])
            site.rotate()
        answers.append(await client.get("/logs", params=query))

    served(folder, asked)
    return answers[0]


async def receive(chunks: AsyncIterator[bytes], size: int) -> bytes:
    found = b""
    async with asyncio.timeout(DEADLINE_S):
        while len(found) < size:
            found += await anext(chunks)
    return found


LINES = b"".join(b"line %d\n" % number for number in range(5000))


def test_without_a_query_it_is_the_last_200_lines(tmp_path: Path) -> None:
    answer = ask(tmp_path, LINES)
    assert answer.content.splitlines() == LINES.splitlines()[-200:]
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert int(answer.headers["x-log-offset"]) == len(LINES)
    assert int(answer.headers["x-log-start"]) == len(LINES) - len(answer.content)


def test_since_offset_reads_on_where_the_last_answer_ended(tmp_path: Path) -> None:
    async def read_on(site: Site, client: httpx.AsyncClient) -> None:
        found, offset = b"", 0
        for begin in range(0, len(LINES), 7000):
            site.append(LINES[begin : begin + 7000])
            answer = await client.get("/logs", params={"since_offset": offset})
            found, offset = found + answer.content, int(answer.headers["x-log-offset"])
            site.rotate()
        assert found == LINES

    served(tmp_path, read_on)


def test_an_offset_that_is_no_longer_kept_starts_with_what_is(tmp_path: Path) -> None:
    async def read(site: Site, client: httpx.AsyncClient) -> None:
        site.append(LINES)
        site.rotate(keep=2)
        answer = await client.get("/logs", params={"since_offset": 5})
        assert 5 < int(answer.headers["x-log-start"]) == len(LINES) - len(answer.content)
        assert LINES.endswith(answer.content)

    served(tmp_path, read)


def test_an_offset_behind_the_end_is_an_empty_answer(tmp_path: Path) -> None:
    answer = ask(tmp_path, b"one\n", since_offset=1000)
    assert (answer.status_code, answer.content, answer.headers["x-log-offset"]) == (200, b"", "4")


def test_tail_0_is_nothing_and_a_huge_tail_everything(tmp_path: Path) -> None:
    assert ask(tmp_path, LINES, tail=0).content == b""
    assert ask(tmp_path / "..", LINES, tail=10**18).content == LINES


def test_bytes_come_as_they_were_written(tmp_path: Path) -> None:
    output = bytes(range(256)) * 100
    assert ask(tmp_path, output, since_offset=0).content == output


def test_a_job_that_never_ran_has_no_output(tmp_path: Path) -> None:
    answer = ask(tmp_path, b"")
    assert (answer.status_code, answer.content, answer.headers["x-log-offset"]) == (200, b"", "0")


def test_stderr_apart_has_its_own(tmp_path: Path) -> None:
    async def read(site: Site, client: httpx.AsyncClient) -> None:
        site.append(b"out\n")
        (tmp_path / "etl.err").write_bytes(b"err\n")
        assert (await client.get("/logs")).content == b"out\n"
        assert (await client.get("/logs", params={"stream": "stderr"})).content == b"err\n"

    served(tmp_path, read, merge=False)


def test_stderr_with_stdout_is_the_same_log(tmp_path: Path) -> None:
    assert ask(tmp_path, b"both\n", stream="stderr").content == b"both\n"


@pytest.mark.parametrize("merge", [True, False])
def test_stderr_of_a_run_is_where_it_began_whatever_the_settings_say_now(tmp_path: Path, merge: bool) -> None:
    async def read(site: Site, client: httpx.AsyncClient) -> None:
        entry, texts = site.supervisor.find("etl"), {5: b"apart", 6: b"merged"}
        for run, text in texts.items():
            site.outputs.begin("etl", run, merge=text == b"merged")
            (site.log if text == b"merged" else tmp_path / "etl.err").write_bytes(text)
        for run, text in texts.items():
            assert (await client.get("/logs", params={"stream": "stderr", "run": run})).content == text
            entry.live = SimpleNamespace(run=run)  # type: ignore[assignment]
            assert (await client.get("/logs", params={"stream": "stderr"})).content == text

    served(tmp_path, read, merge=merge)


def test_a_run_has_its_own_part(tmp_path: Path) -> None:
    async def read(site: Site, client: httpx.AsyncClient) -> None:
        for run in (1, 2, 3):
            site.outputs.begin("etl", run, merge=True)
            site.append(b"run %d\n" % run * 2000)
            site.rotate()
        for run in (1, 2, 3):
            assert (await client.get("/logs", params={"run": run})).content == b"run %d\n" % run * 2000
        assert (await client.get("/logs", params={"run": 2, "tail": 1})).content == b"run 2\n"
        answer = await client.get("/logs", params={"run": 4})
        assert (answer.status_code, answer.json()["kind"]) == (404, "no-such-run")

    served(tmp_path, read)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stream", "both"), ("follow", "yes"), ("tail", "-1"), ("tail", "x"), ("since_offset", "²"), ("run", "9" * 30)],
)
def test_a_value_that_means_nothing_is_a_bad_request(tmp_path: Path, name: str, value: str) -> None:
    answer = ask(tmp_path, b"", **{name: value})
    assert (answer.status_code, answer.json()["kind"]) == (400, "bad-request")
    assert name in answer.json()["detail"]


def test_head_says_how_long_it_is_and_follows_nothing(tmp_path: Path) -> None:
    async def look(site: Site, client: httpx.AsyncClient) -> None:
        site.append(b"one\n")
        assert (await client.head("/logs")).headers["content-length"] == "4"
        assert (await client.head("/logs", params={"follow": 1})).status_code == 200

    served(tmp_path, look)


def test_all_jobs_at_once_is_refused(tmp_path: Path) -> None:
    async def look(site: Site, client: httpx.AsyncClient) -> None:
        answer = await client.get(f"http://127.0.0.1:{site.port}/jobs/all/logs")
        assert [result["status_code"] for result in answer.json()["results"]] == [400]

    served(tmp_path, look)


def test_a_script_s_own_output_is_not_shown(tmp_path: Path) -> None:
    async def look(site: Site, client: httpx.AsyncClient) -> None:
        site.supervisor.logs = None
        answer = await client.get("/logs")
        assert (answer.status_code, answer.json()["kind"]) == (409, "wrong-state")

    served(tmp_path, look)


# following


async def following(
    site: Site, client: httpx.AsyncClient, read: Callable[[AsyncIterator[bytes]], Awaitable[None]], **query: Any
) -> None:
    async with client.stream("GET", "/logs", params={"follow": 1, **query}) as answer:
        assert answer.status_code == 200
        await read(answer.aiter_raw())


def test_a_follower_gets_what_was_and_what_comes(tmp_path: Path) -> None:
    async def follow(site: Site, client: httpx.AsyncClient) -> None:
        site.append(b"one\ntwo\n")

        async def read(chunks: AsyncIterator[bytes]) -> None:
            assert await receive(chunks, 4) == b"two\n"
            for number in range(5):
                site.append(b"more %d\n" % number)
                assert await receive(chunks, 7) == b"more %d\n" % number

        await following(site, client, read, tail=1)

    served(tmp_path, follow)


def test_a_follower_can_come_before_the_log(tmp_path: Path) -> None:
    async def follow(site: Site, client: httpx.AsyncClient) -> None:
        async def read(chunks: AsyncIterator[bytes]) -> None:
            first = asyncio.ensure_future(receive(chunks, 4))
            site.append(b"one\n")
            assert await first == b"one\n"

        await following(site, client, read)

    served(tmp_path, follow)


def test_followers_get_every_byte_through_rotations(tmp_path: Path) -> None:
    async def follow(site: Site, client: httpx.AsyncClient) -> None:
        async def write() -> None:
            for begin in range(0, len(LINES), 9000):
                site.append(LINES[begin : begin + 9000])
                await asyncio.to_thread(site.rotate)

        async def read(chunks: AsyncIterator[bytes]) -> None:
            assert await receive(chunks, len(LINES)) == LINES

        await asyncio.gather(write(), *(following(site, client, read, since_offset=0) for _ in range(5)))

    served(tmp_path, follow)


def test_a_follower_of_a_run_that_is_over_gets_its_end(tmp_path: Path) -> None:
    async def follow(site: Site, client: httpx.AsyncClient) -> None:
        for run in (1, 2):
            site.outputs.begin("etl", run, merge=True)
            site.append(b"run %d\n" % run)
        for run in (1, 2):
            assert (await client.get("/logs", params={"follow": 1, "run": run})).content == b"run %d\n" % run

    served(tmp_path, follow)


def test_a_server_that_stops_ends_its_followers(tmp_path: Path) -> None:
    async def follow(site: Site, client: httpx.AsyncClient) -> None:
        async def read(chunks: AsyncIterator[bytes]) -> None:
            site.append(b"one\n")
            await receive(chunks, 4)
            site.context.stopping.set()
            assert [chunk async for chunk in chunks] == []

        await following(site, client, read)
        async with asyncio.timeout(DEADLINE_S):
            await site.server.stop()

    served(tmp_path, follow)


def test_a_client_that_goes_leaves_nothing_behind(tmp_path: Path) -> None:
    async def follow(site: Site, client: httpx.AsyncClient) -> None:
        site.append(b"one\n")
        before = len(asyncio.all_tasks())

        async def read(chunks: AsyncIterator[bytes]) -> None:
            await receive(chunks, 4)

        for _ in range(5):
            await following(site, client, read)
        async with asyncio.timeout(DEADLINE_S):
            while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert not any(site.outputs.changes._waiting.values())

    served(tmp_path, follow)


def test_a_client_that_does_not_read_holds_up_nobody_and_no_memory(tmp_path: Path) -> None:
    """Also one that is overtaken by the rotation: it is cut off, and does not get a text with a hole."""

    async def follow(site: Site, client: httpx.AsyncClient) -> None:
        def write() -> None:
            for number in range(60):
                site.append(b"%09d\n" % number * 40_000)
                site.rotate(keep=2, max_bytes=64 * BLOCK)

        with socket.create_connection(("127.0.0.1", site.port)) as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.sendall(b"GET /logs?follow=1&since_offset=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            start = await asyncio.to_thread(stuck.recv, 100)
            await asyncio.to_thread(write)
            assert (await client.get("/logs", params={"tail": 1})).content == b"000000059\n"
            stuck.settimeout(DEADLINE_S)
            got = start + await asyncio.to_thread(_until_closed, stuck)
        assert len(got) < 60 * 400_000
        assert not got.endswith(b"0\r\n\r\n")

    served(tmp_path, follow)


def _until_closed(connection: socket.socket) -> bytes:
    got = b""
    deadline = time.monotonic() + DEADLINE_S
    with suppress(ConnectionResetError):
        while data := connection.recv(1 << 20):
            got += data
            assert time.monotonic() < deadline
    return got
