"""How the daemon is reached: its socket, a URL, a token; and what is said when it is not there."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import httpx
import pytest
from helpers.command import Command
from helpers.daemon import Daemon, free_port


@pytest.fixture
def own(tmp_path: Path) -> Daemon:
    return Daemon(tmp_path)


def test_the_socket_is_its_owners_alone(daemon: Daemon) -> None:
    found = (daemon.state / "harnessd.sock").stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_uid == os.geteuid()


def test_the_socket_stays_when_the_server_is_replaced(harnessd: Command, daemon: Daemon) -> None:
    path = daemon.state / "harnessd.sock"
    before = path.stat().st_ino
    daemon.wait_new_server(daemon.kill_server())
    assert path.stat().st_ino == before
    assert harnessd.done("ps")
    path.unlink()
    daemon.wait_new_server(daemon.kill_server())
    assert harnessd.done("--socket", path, "ps")


def test_whoever_asks_by_the_socket_needs_no_token_and_no_known_host(daemon: Daemon) -> None:
    transport = httpx.HTTPTransport(uds=str(daemon.state / "harnessd.sock"))
    with httpx.Client(transport=transport) as client:
        assert client.get("http://any.example/jobs").status_code == 200
    assert daemon.get("/jobs", full=2).status_code == 400


@pytest.mark.parametrize("by", ["--url", "--socket", "--config", "HARNESSD_URL", "HARNESSD_SOCKET", "HARNESSD_CONFIG"])
def test_the_daemon_is_found_by_each_of_them(alone: Command, daemon: Daemon, by: str) -> None:
    places = {"URL": daemon.url + "/", "SOCKET": daemon.state / "harnessd.sock", "CONFIG": daemon.config}
    place = str(places[by.strip("-").removeprefix("HARNESSD_").upper()])
    found = alone.done(by, place, "ps") if by.startswith("--") else alone.done("ps", **{by: place})
    assert "feed-a" in found


def test_the_daemon_is_found_by_the_config_directory_here(alone: Command, daemon: Daemon) -> None:
    alone.folder = daemon.folder
    assert "feed-a" in alone.done("ps")


@pytest.mark.skipif(os.geteuid() == 0, reason="root's state directory is one for all")
def test_the_daemon_is_found_in_the_usual_state_directory(alone: Command, daemon: Daemon) -> None:
    home = alone.folder / "home"
    home.mkdir()
    (home / "harnessd").symlink_to(daemon.state)
    assert "feed-a" in alone.done("ps", XDG_STATE_HOME=str(home))


def test_a_state_directory_with_a_long_path_is_reached(tmp_path: Path) -> None:
    folder = tmp_path / ("long-" * 15) / ("longer-" * 10)
    folder.mkdir(parents=True)
    daemon = Daemon(folder)
    try:
        daemon.start()
        assert len(str(daemon.state)) > 108
        command = Command(tmp_path, HARNESSD_SOCKET=str(daemon.state / "harnessd.sock"))
        assert command.done("ps")
        assert daemon.stop() == 0
        assert not (daemon.state / "harnessd.sock").exists()
        gone = command("ps")
        assert gone.returncode == 4
        assert "there is no such socket" in gone.stderr
    finally:
        daemon.close()


def test_a_socket_without_a_daemon_is_called_stale_and_replaced_by_the_next(tmp_path: Path, own: Daemon) -> None:
    own.state.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(own.state / "harnessd.sock"))
    command = Command(tmp_path, HARNESSD_CONFIG=str(own.config))
    ran = command("stop", "feed-a")
    assert (ran.returncode, ran.stdout) == (4, "")
    lines = ran.stderr.splitlines()
    assert lines[0] == "harnessd: cannot reach the daemon; tried"
    assert lines[1].startswith(f"  {own.state}/harnessd.sock: the socket is stale")
    assert lines[2] == f"  {own.url}: Connection refused"
    try:
        own.start()
        assert command.done("ps")
    finally:
        own.close()


def test_a_url_where_nobody_listens_is_exit_code_4(alone: Command) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    ran = alone("--url", url, "ps")
    assert ran.returncode == 4
    assert url in ran.stderr


@pytest.mark.parametrize("url", ["ftp://box", "box:2222", "http://", "http://box:port"])
def test_a_url_that_is_none_is_exit_code_2(alone: Command, url: str) -> None:
    ran = alone("ps", HARNESSD_URL=url)
    assert ran.returncode == 2
    assert "a URL such as" in ran.stderr


def test_settings_that_make_no_url_are_named(alone: Command) -> None:
    folder = alone.folder / "config"
    folder.mkdir()
    (folder / "harnessd.toml").write_text('state_dir = "nowhere"\n[http]\nport = "x"\n')
    ran = alone("ps")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "'http://127.0.0.1:x' of http.host and http.port in config/harnessd.toml: a URL such as" in ran.stderr


@contextmanager
def answering(answer: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Give the URL of something that answers so once, and what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            peer, _ = server.accept()
            with peer:
                asked.append(peer.recv(65536))
                peer.sendall(answer)

        thread = Thread(target=speak)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        thread.join()


def test_something_else_on_the_port_is_no_harnessd(alone: Command) -> None:
    with answering(b"HTTP/1.0 200 OK\r\n\r\n<html>") as (url, _):
        ran = alone("--url", url, "ps")
    assert ran.returncode == 1
    assert "is that a harnessd?" in ran.stderr


@pytest.mark.parametrize("status", [401, 403])
def test_whoever_may_not_is_told_with_exit_code_5(alone: Command, status: int) -> None:
    body = b'{"kind": "unauthorized", "detail": "cannot serve this request: it needs a token"}'
    with answering(b"HTTP/1.0 %d No\r\n\r\n%s" % (status, body)) as (url, asked):
        ran = alone("stop", "feed-a", HARNESSD_URL=url, HARNESSD_TOKEN="secret")
    assert (ran.returncode, ran.stderr) == (5, "harnessd: cannot serve this request: it needs a token\n")
    assert asked[0].startswith(b"POST /jobs/feed-a/stop HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer secret\r\n" in asked[0]


def test_a_verb_that_breaks_off_is_not_sent_again(alone: Command) -> None:
    with answering(b"") as (url, asked):
        ran = alone("--url", url, "stop", "feed-a")
    assert ran.returncode == 4
    assert "may have been done all the same" in ran.stderr
    assert len(asked) == 1


@pytest.mark.parametrize(
    "how", [b"Content-Length: 100\r\n\r\nat,job\n", b"Transfer-Encoding: chunked\r\n\r\n7\r\nat,job\n\r\n"]
)
@pytest.mark.parametrize("what", [("history", "feed-a", "--format", "csv"), ("logs", "feed-a")])
def test_an_answer_that_breaks_off_is_exit_code_4(alone: Command, what: tuple[str, ...], how: bytes) -> None:
    with answering(b"HTTP/1.1 200 OK\r\nX-Log-Start: 0\r\nConnection: close\r\n" + how) as (url, _):
        ran = alone("--url", url, *what)
    assert (ran.returncode, ran.stdout) == (4, "at,job\n")
    assert ran.stderr.startswith("harnessd: the answer broke off")


def test_what_cannot_be_sent_is_said_and_no_secret_is_shown(harnessd: Command, daemon: Daemon) -> None:
    assert harnessd("hb", "\udcff").returncode == 3
    assert harnessd("hb", "--tag", "\udcff").returncode == 2
    url = f"http://127.0.0.1:{daemon.port}"
    refused = harnessd("--url", url, "hb", HARNESSD_TOKEN="hd_secret\r")
    assert refused.returncode == 2
    assert "HARNESSD_TOKEN" in refused.stderr and "hd_secret" not in refused.stderr


def test_to_follow_the_jobs_of_a_tag_that_none_has_is_to_follow_none(harnessd: Command) -> None:
    assert harnessd("events", "-f", "--tag", "typo").returncode == 3
