"""Clients that misbehave, against a real daemon: it stays small, and serves the others meanwhile."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
from helpers.daemon import COMMAND, Daemon

GET = b"GET /jobs/job/hb HTTP/1.1\r\nHost: localhost\r\n\r\n"
ROOM_BYTES = 64 << 20  # far less than what is sent
ADDRESSES = [f"127.0.0.{number}" for number in range(2, 42)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("served"))
    daemon.job("job", "Idle")
    daemon.start()
    daemon.wait_state("job", "running")
    yield daemon
    daemon.close()


@contextmanager
def stays_small(daemon: Daemon) -> Iterator[None]:
    """What happens meanwhile costs the server little memory and few descriptors, then and afterwards."""
    server = daemon.server_pid()
    before_bytes, before_fds = rss_bytes(server), fds(server)
    yield
    assert daemon.hb("job")["state"] == "running"
    assert daemon.server_pid() == server
    assert rss_bytes(server) - before_bytes < ROOM_BYTES
    assert fds(server) - before_fds < 2100  # max_connections


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def connect(daemon: Daemon, address: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", daemon.port), timeout=40, source_address=(address, 0))


@contextmanager
def many(daemon: Daemon, wanted: int) -> Iterator[list[socket.socket]]:
    """Connections from many addresses; no more than this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        count = min(wanted, hard - len(os.listdir("/proc/self/fd")) - 100)
        yield [opened.enter_context(connect(daemon, ADDRESSES[each % len(ADDRESSES)])) for each in range(count)]


def test_ten_thousand_idle_connections_keep_nobody_out(served: Daemon) -> None:
    with stays_small(served), many(served, 10_000) as idle:
        print(f"{len(idle)} connections")
        for _ in range(20):
            assert served.hb("job")["state"] == "running"
        with closing(socket.socket(socket.AF_UNIX)) as local:
            local.connect(str(served.state / "harnessd.sock"))
            local.sendall(GET)
            assert local.recv(12) == b"HTTP/1.1 200"
        idle[-1].sendall(GET)
        assert idle[-1].recv(12) == b"HTTP/1.1 200"
    # They have gone, and with them what they took.
    server = served.server_pid()
    served.wait_for(lambda: fds(server) < 200, "the descriptors are given back")


def test_headers_that_drip_keep_nobody_out(served: Daemon) -> None:
    with stays_small(served), many(served, 3000) as dripping:
        for part in (b"GET /hb HTTP/1.1\r\nX: ", b"a", b"b"):
            for connection in dripping:
                with suppress(OSError):  # it had to make room
                    connection.sendall(part)
            assert served.hb("job")["state"] == "running"


def test_what_has_no_end_is_refused_before_it_costs_anything(served: Daemon) -> None:
    post = b"POST /jobs/job/config HTTP/1.1\r\nHost: localhost\r\n"
    chunked = post + b"Transfer-Encoding: chunked\r\n\r\n"
    blank = b"\r\n" * 30_000
    endless = [
        (post + b"Content-Length: 1000000000\r\n\r\n", bytes(60_000)),
        (chunked, b"EA60\r\n" + bytes(60_000) + b"\r\n"),
        (chunked + b"40000000\r\n", bytes(60_000)),
        (GET[:-2] + b"Content-Length: 1000000000\r\n\r\n", bytes(60_000)),
        (
            b"GET /jobs/job/events?follow=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n",
            bytes(60_000),
        ),
        (b"GET /", b"a" * 60_000),
        (b"GET / HTTP/1.1\r\nX: ", b"a" * 60_000),
        (b"GET / HTTP/1.1\r\n", b"X: 1\r\n" * 10_000),
        (chunked + b"5;", b"a" * 60_000),
        (chunked + b"0\r\n", b"X: 1\r\n" * 10_000),
        (blank, blank),
    ]
    with stays_small(served):
        for head, piece in endless:
            with connect(served) as connection:
                sent = 0
                with suppress(ConnectionError):
                    connection.sendall(head)
                    while sent < 1_000_000_000:
                        sent += connection.send(piece)
                assert sent < 100_000_000, head[:60]


def test_requests_without_end_from_one_that_reads_no_answer_are_held_back(served: Daemon) -> None:
    with stays_small(served), ExitStack() as opened:
        for _ in range(20):
            connection = opened.enter_context(connect(served))
            connection.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    connection.send(GET * 1000)
        for _ in range(5):
            assert served.hb("job")["state"] == "running"


def test_a_log_that_is_followed_and_not_read_is_held_back(served: Daemon) -> None:
    served.job("loud", ["sh", "-c", "yes $(head -c 500 /dev/zero | tr '\\0' x) | head -c 50000000; sleep 3600"])
    served.reload()
    with stays_small(served), ExitStack() as opened:
        for _ in range(10):
            connection = opened.enter_context(connect(served))
            connection.sendall(b"GET /jobs/loud/logs?follow=1&tail=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        path = served.state / "log" / "loud.log"
        served.wait_for(lambda: path.exists() and any(path.parent.glob("loud.log.*.gz")), "much was written")


def test_a_full_house_answers_its_owner_and_tells_others(daemon: Daemon) -> None:
    daemon.settings(http="max_connections = 5")
    daemon.job("job", "Idle")
    daemon.start()
    with ExitStack() as opened:
        for _ in range(5):
            connection = opened.enter_context(connect(daemon))
            connection.sendall(b"GET /jobs/job/logs?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
        with connect(daemon) as newcomer:
            assert newcomer.recv(12) == b"HTTP/1.1 503"
        with closing(socket.socket(socket.AF_UNIX)) as local:
            local.connect(str(daemon.state / "harnessd.sock"))
            local.sendall(GET)
            assert local.recv(12) == b"HTTP/1.1 200"
    daemon.wait_for(lambda: daemon.get("/jobs/job/hb").status_code == 200, "there is room again")


def test_jobs_for_which_descriptors_do_not_suffice_are_refused_and_the_api_answers(daemon: Daemon) -> None:
    for number in range(8):
        daemon.job(f"job-{number}", "Idle", backoff={"first_s": 0.1, "max_s": 0.1}, max_failures=1000)
    daemon.start(["prlimit", "--nofile=90:90", *COMMAND])  # 19 for runs, three each
    daemon.wait_for(lambda: len(daemon.jobs(state="running")) == 6, "as many as can be run")
    refused = next(iter(daemon.jobs(state="backoff")))
    assert "there are 6 runs, and 90 file descriptors are enough for 6; raise the limit" in daemon.log
    assert "file descriptors" in daemon.get(f"/jobs/{refused}").json()["last_exit"]["error"]
    os.kill(daemon.server_pid(), signal.SIGKILL)
    daemon.wait_for(lambda: len(daemon.jobs(state="running")) == 6, "the next server has room for them")
    killed = next(iter(daemon.jobs(state="running")))
    daemon.post(f"/jobs/{killed}/kill")
    daemon.wait_for(lambda: len(set(daemon.jobs(state="running")) - {killed}) == 6, "another has its place")
