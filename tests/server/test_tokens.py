from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import until

from harnessd.errors import BadRequest, HarnessError, WrongState
from harnessd.server import tokens as module
from harnessd.server.tokens import FILE_NAME, Grant, Role, TokenReader, Tokens, matches


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def content(state: Path) -> Any:
    return json.loads((state / FILE_NAME).read_text())


def test_a_token_gives_its_role_and_its_jobs(state: Path) -> None:
    tokens = Tokens(state)
    reader = TokenReader(state)
    ci, ops = tokens.new("ci", "operate", ["feed-*", "etl"], "90d"), tokens.new("ops", "admin")
    assert reader.grant(ci.encode()) == Grant("ci", Role.OPERATE, ("feed-*", "etl"))
    assert reader.grant(ops.encode()) == Grant("ops", Role.ADMIN, None)
    assert reader.grant(ci.upper().encode()) is reader.grant(b"") is None


def test_the_secret_has_256_bits_and_is_not_stored(state: Path) -> None:
    secret = Tokens(state).new("ci", "read")
    assert secret.startswith("hd_") and len(secret) == len("hd_") + 43
    (stored,) = content(state)["tokens"]
    assert secret not in (state / FILE_NAME).read_text()
    assert stored["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert stored["sha256"] not in repr(Tokens(state).all())


def test_the_file_is_its_owners_alone_and_nothing_else_is_left(state: Path) -> None:
    Tokens(state).new("ci", "read")
    assert stat.S_IMODE((state / FILE_NAME).stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert os.listdir(state) == [FILE_NAME]


def test_what_is_made_and_revoked_is_in_force_at_once(state: Path) -> None:
    tokens, reader = Tokens(state), TokenReader(state)
    assert not reader.is_there
    secret = tokens.new("ci", "read").encode()
    assert reader.grant(secret) and reader.is_there
    tokens.revoke("ci")
    assert reader.grant(secret) is None and reader.is_there
    assert tokens.new("ci", "read").encode() != secret
    assert reader.grant(secret) is None


def test_a_token_expires(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, reader = Tokens(state), TokenReader(state)
    secret = tokens.new("ci", "read", expires="1h").encode()
    assert reader.grant(secret)
    (token,) = tokens.all()
    assert token.expires
    monkeypatch.setattr(module.time, "time", token.expires.timestamp)
    assert reader.grant(secret) is None
    assert token.has_expired(module.time.time())


def test_a_length_of_time_beyond_the_calendar_is_its_end(state: Path) -> None:
    Tokens(state).new("ci", "read", expires="999999999999w")
    (token,) = Tokens(state).all()
    assert token.expires and token.expires.year == 9999


@pytest.mark.parametrize(
    ("name", "jobs", "expires"),
    [
        ("", [], None),
        ("a b", [], None),
        ("all", [], None),
        ("settings", [], None),
        ("../x", [], None),
        ("ci", [""], None),
        ("ci", ["a b"], None),
        ("ci", ["feed-*", "a/b"], None),
        ("ci", [], "soon"),
        ("ci", [], "0d"),
        ("ci", [], "-1d"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_writes_nothing(
    state: Path, name: str, jobs: list[str], expires: str | None
) -> None:
    with pytest.raises(BadRequest, match=r"^cannot "):
        Tokens(state).new(name, "read", jobs, expires)
    assert not (state / FILE_NAME).exists()


def test_a_name_that_is_taken_is_refused(state: Path) -> None:
    tokens = Tokens(state)
    secret = tokens.new("ci", "read")
    with pytest.raises(WrongState, match="one of that name"):
        tokens.new("ci", "admin")
    grant = TokenReader(state).grant(secret.encode())
    assert grant and grant.role is Role.READ


def test_a_name_that_no_token_has_cannot_be_revoked(state: Path) -> None:
    tokens = Tokens(state)
    tokens.new("deploy", "read")
    with pytest.raises(HarnessError, match="did you mean 'deploy'"):
        tokens.revoke("deplyo")
    assert [token.name for token in tokens.all()] == ["deploy"]


def test_there_is_a_limit_to_their_number(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TOKENS", 2)
    tokens = Tokens(state)
    tokens.new("a", "read")
    tokens.new("b", "read")
    with pytest.raises(WrongState):
        tokens.new("c", "read")


def test_those_who_write_at_once_lose_nothing(state: Path) -> None:
    names = [f"t{number}" for number in range(12)]
    threads = [threading.Thread(target=Tokens(state).new, args=(name, "read")) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [token.name for token in Tokens(state).all()] == sorted(names)


def test_a_write_that_fails_leaves_the_file_as_it_was(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = Tokens(state).new("ci", "read")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(HarnessError, match=r"cannot write .*tokens\.json: No space left"):
        Tokens(state).new("more", "read")
    monkeypatch.undo()
    assert TokenReader(state).grant(secret.encode())
    Tokens(state).new("more", "read")


ENTRY = {"name": "a", "role": "admin", "sha256": "0" * 64, "created": "2026-01-01T00:00:00Z"}
DAMAGED = {
    "empty": "",
    "torn": '{"version": 1, "tokens": [{"na',
    "no object": "[]",
    "binary": "\x00\x01",
    "later": '{"version": 2, "tokens": []}',
    "no hash": json.dumps({"version": 1, "tokens": [ENTRY | {"sha256": "x"}]}),
    "no role": json.dumps({"version": 1, "tokens": [ENTRY | {"role": "root"}]}),
    "jobs that are none": json.dumps({"version": 1, "tokens": [ENTRY | {"jobs": []}]}),
    "jobs that are a word": json.dumps({"version": 1, "tokens": [ENTRY | {"jobs": "feed"}]}),
    "a key too many": json.dumps({"version": 1, "tokens": [ENTRY | {"job": ["feed"]}]}),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_lets_nobody_in_until_it_is_mended(
    state: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = Tokens(state).new("ci", "admin").encode()
    path, reader = state / FILE_NAME, TokenReader(state)
    assert reader.grant(secret) and reader.problem is None
    good = path.read_text()
    path.write_text(text)
    assert reader.grant(secret) is None
    assert reader.grant(secret) is None
    assert reader.problem and str(path) in reader.problem
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    with pytest.raises(HarnessError, match=r"tokens\.json"):
        Tokens(state).new("other", "read")
    assert path.read_text() == text
    path.write_text(good)
    assert reader.grant(secret) and reader.problem is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_lets_nobody_in(state: Path, mode: int) -> None:
    secret = Tokens(state).new("ci", "admin").encode()
    reader = TokenReader(state)
    (state / FILE_NAME).chmod(mode)
    assert reader.grant(secret) is None
    assert "others" in (reader.problem or "") or "other users" in (reader.problem or "")


def test_a_pipe_in_its_place_holds_nobody_up(state: Path) -> None:
    state.mkdir()
    os.mkfifo(state / FILE_NAME)
    assert "no file of tokens" in (TokenReader(state).problem or "")


def test_a_file_that_cannot_be_read_is_tried_again(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = Tokens(state).new("ci", "admin").encode()

    def exhausted(_: Path) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(module, "_read", exhausted)
        reader = TokenReader(state)
        assert reader.grant(secret) is None and reader.problem
    until(lambda: reader.grant(secret), "it is read again")
    assert reader.problem is None


@pytest.mark.parametrize(
    ("job", "globs", "expected"),
    [
        ("feed-a", None, True),
        ("feed-a", ("feed-*",), True),
        ("Feed-a", ("feed-*",), False),
        ("etl", ("feed-*",), False),
        ("etl", ("feed-*", "e?l"), True),
        ("etl2", ("etl",), False),
        ("a", ("[ab]",), True),
    ],
)
def test_globs_match_whole_names_and_case(job: str, globs: tuple[str, ...] | None, expected: bool) -> None:
    assert matches(job, globs) is expected


def test_each_role_may_what_those_before_it_may() -> None:
    assert Role.READ < Role.OPERATE < Role.ADMIN
    assert [str(role) for role in Role] == ["read", "operate", "admin"]
