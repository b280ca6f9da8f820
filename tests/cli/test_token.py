"""`harnessd token`, with no daemon there."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Command

from harnessd.cli.outcome import Code, Failure
from harnessd.cli.where import Given, state_dir
from harnessd.server.tokens import Role, TokenReader, Tokens


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "harnessd.toml").write_text('state_dir = "../state"')
    return tmp_path / "state"


def listed(command: Command) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(command.done("token", "list", "--json"))["tokens"]
    return found


def test_the_secret_alone_goes_to_stdout_and_is_in_force(alone: Command, state: Path) -> None:
    ran = alone("token", "new", "ci", "--role", "operate", "--jobs", "feed-*", "--jobs", "etl", "--expires", "90d")
    assert (ran.returncode, ran.stdout.count("\n")) == (0, 1)
    secret = ran.stdout.strip()
    assert secret not in ran.stderr and "feed-* etl" in ran.stderr and "90d" in ran.stderr
    grant = TokenReader(state).grant(secret.encode())
    assert grant and (grant.name, grant.role, grant.jobs) == ("ci", Role.OPERATE, ("feed-*", "etl"))
    assert stat.S_IMODE((state / "tokens.json").stat().st_mode) == 0o600


def test_tokens_are_listed_without_what_gives_them_away_and_revoked(alone: Command, state: Path) -> None:
    tokens = Tokens(state)
    tokens.new("ci", "operate", ["feed-*"], "90d")
    tokens.new("ops", "admin")
    shown = alone.done("token", "list")
    assert [line.split()[:3] for line in shown.splitlines()] == [
        ["NAME", "ROLE", "JOBS"],
        ["ci", "operate", "feed-*"],
        ["ops", "admin", "*"],
    ]
    assert [token.keys() for token in listed(alone)] == [{"name", "role", "jobs", "created", "expires", "expired"}] * 2
    assert alone.done("token", "revoke", "ci") == ""
    assert [token["name"] for token in listed(alone)] == ["ops"]


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("new", "ops", "--role", "read"), Code.REFUSED, "there is one of that name"),
        (("new", "a b", "--role", "read"), Code.USAGE, "is no name"),
        (("new", "x", "--role", "king"), Code.USAGE, "--role"),
        (("new", "x"), Code.USAGE, "--role"),
        (("new", "x", "--role", "read", "--expires", "soon"), Code.USAGE, "length of time"),
        (("new", "x", "--role", "read", "--jobs", "a/b"), Code.USAGE, "glob"),
        (("revoke", "opps"), Code.FAILED, "did you mean 'ops'?"),
    ],
)
def test_what_cannot_be_done_is_said_and_has_its_exit_code(
    alone: Command, state: Path, args: tuple[str, ...], code: Code, told: str
) -> None:
    Tokens(state).new("ops", "admin")
    ran = alone("token", *args)
    assert (ran.returncode, ran.stdout) == (code, "")
    assert told in ran.stderr
    assert [token.name for token in Tokens(state).all()] == ["ops"]


def test_a_damaged_file_is_said_and_left_alone(alone: Command, state: Path) -> None:
    state.mkdir()
    (state / "tokens.json").write_text("{")
    for args in (("list",), ("new", "x", "--role", "read")):
        ran = alone("token", *args)
        assert ran.returncode == Code.FAILED
        assert ran.stderr.startswith("harnessd: cannot use ") and "tokens.json" in ran.stderr
    assert (state / "tokens.json").read_text() == "{"


def test_the_state_directory_is_that_of_the_daemon_that_is_meant(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert state_dir(Given(), {}) == state
    assert state_dir(Given(config=tmp_path / "config"), {}) == state
    assert state_dir(Given(socket=Path("elsewhere/harnessd.sock")), {}) == tmp_path / "elsewhere"
    with pytest.raises(Failure, match="on its host"):
        state_dir(Given(), {"HARNESSD_URL": "https://box:2222"})
    with pytest.raises(Failure, match="no directory"):
        state_dir(Given(config=Path("nowhere")), {})
    monkeypatch.chdir(tmp_path / "config")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert state_dir(Given(), {"XDG_STATE_HOME": "/x"}) == Path("/x/harnessd")
