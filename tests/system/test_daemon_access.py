"""Tokens of the installed command against a daemon that trusts nobody on TCP."""

from __future__ import annotations

import json
import os
import pwd

import httpx
import pytest
from helpers.command import Command
from helpers.daemon import Daemon
from helpers.documents import Shell, fenced, text, typed


@pytest.fixture
def harnessd(daemon: Daemon) -> Command:
    return Command(daemon.folder, HARNESSD_CONFIG=str(daemon.config))


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret.strip()}"}


def made(harnessd: Command, *args: str) -> str:
    ran = harnessd("token", "new", *args)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def guarded(daemon: Daemon) -> None:
    daemon.settings(http="trust_loopback = false")
    for name in ("feed-a", "etl"):
        daemon.job(name, "Idle")
    daemon.launch()
    daemon.wait_for(lambda: answers(daemon), "it answers")


def answers(daemon: Daemon) -> bool:
    try:
        return daemon.get("/healthz").status_code in (401, 403)
    except httpx.ConnectError:
        return False


def test_a_token_is_in_force_as_soon_as_it_is_made_and_until_it_is_revoked(daemon: Daemon, harnessd: Command) -> None:
    guarded(daemon)
    assert daemon.get("/jobs").status_code == 403  # nobody has made a token yet
    secret = made(harnessd, "ci", "--role", "operate", "--jobs", "feed-*")

    def ask(path: str, method: str = "GET") -> httpx.Response:
        return daemon.ask(method, path, headers=bearer(secret))

    assert [job["name"] for job in ask("/jobs").json()["jobs"]] == ["feed-a"]
    assert ask("/jobs/feed-a/pause").status_code == 202
    assert ask("/jobs/etl/pause").status_code == 404
    refused = ask("/reload", "POST")
    assert (refused.status_code, refused.headers["content-type"]) == (403, "application/problem+json")
    assert "role admin" in refused.json()["detail"]

    assert daemon.kept.get("/jobs", headers=bearer(secret)).status_code == 200
    harnessd.done("token", "revoke", "ci")
    assert daemon.kept.get("/jobs", headers=bearer(secret)).status_code == 401
    told = [daemon.get("/jobs"), ask("/jobs"), daemon.ask("GET", "/jobs", headers=bearer("hd_never"))]
    assert {(answer.status_code, answer.headers["www-authenticate"]) for answer in told} == {(401, "Bearer")}
    assert len({answer.text for answer in told}) == 1


def test_the_command_gets_in_by_the_socket_and_is_named(daemon: Daemon, harnessd: Command) -> None:
    guarded(daemon)
    secret = made(harnessd, "ops", "--role", "admin")
    assert "feed-a" in harnessd.done("ps")
    harnessd.done("pause", "feed-a", "--wait")
    user = pwd.getpwuid(os.geteuid()).pw_name
    rows = daemon.ask("GET", "/events?kind=command", headers=bearer(secret)).json()["rows"]
    assert rows[0]["actor"].startswith(f"socket:{user}/")
    assert (daemon.state / "harnessd.sock").stat().st_mode & 0o777 == 0o600
    told = harnessd.done("ps", HARNESSD_CONFIG="", HARNESSD_URL=daemon.url, HARNESSD_TOKEN=secret)
    assert "feed-a" in told


def test_the_commands_of_the_page_on_access_work(daemon: Daemon) -> None:
    page = text("docs/access.md")
    (settings,) = fenced(page, "toml")
    daemon.settings(http=settings.replace("[http]", ""))
    daemon.job("feed-a", "Idle")
    daemon.launch()
    daemon.wait_for(lambda: answers(daemon), "it answers")
    (block,) = typed(page)
    told = [Shell(daemon.folder, daemon.port)(line) for line in block.splitlines()]
    assert ["feed-a" in each for each in told] == [False, True, True, False, False]
    assert "deploy" in told[3]
    assert json.loads((daemon.state / "tokens.json").read_text())["tokens"] == []
    host = {"Host": "harnessd.example"}
    assert daemon.ask("GET", "/hb", headers=host).status_code == 401


def test_a_damaged_file_of_tokens_stops_nothing_and_is_said(daemon: Daemon, harnessd: Command) -> None:
    guarded(daemon)
    secret = made(harnessd, "ops", "--role", "admin")
    path = daemon.state / "tokens.json"
    good = path.read_text()
    path.write_text(good[:40])
    assert daemon.ask("GET", "/hb", headers=bearer(secret)).status_code == 401
    assert f"cannot use {path}" in daemon.log
    assert "feed-a" in harnessd.done("ps")
    old = daemon.process
    path.write_text(good)
    health = daemon.ask("GET", "/healthz", headers=bearer(secret)).json()
    assert health["status"] == health["tokens"] == "ok"
    assert old and old.poll() is None
