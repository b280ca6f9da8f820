"""The daemon's own log: one line an event, of the server and of the keeper."""

from __future__ import annotations

import json
import os
import re
import shlex
import time

import pytest
from helpers.daemon import COMMAND, Daemon
from helpers.documents import section, typed

PAIR = r'[a-z_]+=(?:"(?:[^"\\]|\\.)*"|[^\s"]+)'
LOGFMT = re.compile(rf"{PAIR}( {PAIR})*")


@pytest.mark.parametrize("format", ["text", "json"])
def test_every_line_is_of_the_format_asked_for(daemon: Daemon, format: str) -> None:
    daemon.job("crashing", ["sh", "-c", "exit 3"], restart="never")
    daemon.write("broken", "bogus = 1")
    daemon.start([*COMMAND, "--log-format", format])
    daemon.wait_state("crashing", "failed")
    daemon.wait_new_server(daemon.kill_server())
    assert daemon.stop() == 0
    lines = daemon.log.splitlines()
    if format == "json":
        told = [json.loads(line) for line in lines]
    else:
        assert [line for line in lines if not LOGFMT.fullmatch(line)] == []
        told = [dict(pair.split("=", 1) for pair in shlex.split(line)) for line in lines]
    assert all(list(line)[:3] == ["time", "level", "msg"] for line in told)
    states = [line["state"] for line in told if line["msg"] == "state" and line["job"] == "crashing"]
    assert states[:2] == ["starting", "failed"]
    ended = next(line for line in told if line["msg"] == "the server ended")
    assert (ended["level"], ended["how"]) == ("error", "signal SIGKILL")
    assert any("bogus" in line["msg"] and line["level"] == "error" for line in told)


def test_the_line_of_the_page_is_of_the_format() -> None:
    (line,) = typed(section("docs/service.md", "The daemon's log"))
    assert LOGFMT.fullmatch(line.strip())


def test_nothing_is_logged_while_nothing_happens(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    daemon.start()
    daemon.wait_state("idle", "running")
    before = daemon.log
    asked = time.monotonic()
    daemon.wait_for(lambda: daemon.health() and time.monotonic() > asked + 1.5, "requests, samples and ticks have been")
    assert daemon.log == before


def test_the_journal_gets_priorities_and_no_times(daemon: Daemon) -> None:
    path = daemon.folder / "daemon.log"
    path.touch()
    there = os.stat(path)
    daemon.job("idle", "Idle")
    daemon.start(JOURNAL_STREAM=f"{there.st_dev}:{there.st_ino}")
    assert all(line.startswith("<6>level=info msg=") for line in daemon.log.splitlines())
