"""serve, reload, check, schema, version: the daemon and its files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from helpers.command import Command
from helpers.daemon import Daemon

from harnessd import __version__

VERBS = (
    "start",
    "stop",
    "pause",
    "resume",
    "restart",
    "kill",
    "config",
    "history",
    "runs",
    "events",
    "logs",
    "metrics",
)


def test_version_and_schema_need_no_daemon(alone: Command) -> None:
    assert alone.done("version") == f"harnessd {__version__}\n"
    assert json.loads(alone.done("schema")).keys() == {"harnessd.toml", "jobs/NAME.toml"}


def test_check_says_all_that_is_wrong(alone: Command, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.job("good", "Idle")
    assert alone.done("check", daemon.config) == f"{daemon.config}: 1 jobs, no problems\n"
    daemon.write("bad", "entrypiont = 'x:y'\n")
    ran = alone("check", daemon.config)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "did you mean 'entrypoint'?" in ran.stderr
    daemon.close()


def test_check_warns_of_a_directory_without_jobs(alone: Command, tmp_path: Path) -> None:
    (tmp_path / "harnessd.toml").touch()
    ran = alone("check", tmp_path)
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path}: 0 jobs, no problems\n")
    assert ran.stderr == f"warning: {tmp_path}: there is no jobs/ in it\n"


def test_a_backup_that_cannot_be_written_is_told_with_its_file(harnessd: Command, daemon: Daemon) -> None:
    ran = harnessd("db", "backup", daemon.config, "/nowhere/copy.db")
    why = f"cannot back up {daemon.state}/harnessd.db to /nowhere/copy.db: No such file or directory"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", f"harnessd: {why}\n")


def test_reload_tells_what_has_changed_and_what_is_refused(harnessd: Command, daemon: Daemon) -> None:
    daemon.job("new", "Idle", autostart=False)
    assert harnessd.done("reload") == "added: new\nunchanged: 4\n"
    path = daemon.write("new", "[", ".json")
    ran = harnessd("reload")
    assert (ran.returncode, ran.stdout) == (1, "unchanged: 4\n")
    assert "new.json" in ran.stderr
    path.unlink()
    assert json.loads(harnessd.done("reload", "--json"))["removed"] == ["new"]
    settings = daemon.config / "harnessd.toml"
    before = settings.read_text()
    settings.write_text(re.sub("(?m)^state_dir.*", 'state_dir = "/nowhere"', before))
    assert "in force when the daemon itself is ended and started anew: state_dir\n" in harnessd.done("reload")
    settings.write_text(before)
    harnessd.done("reload")


def test_serve_wants_a_directory_and_has_its_help(alone: Command) -> None:
    assert alone("serve").returncode == 2
    assert "Run every job of a config directory" in alone.done("serve", "--help")


def test_help_names_every_verb(alone: Command) -> None:
    shown = alone.done("--help")
    for verb in ("serve", "check", "schema", "ps", "hb", "status", "top", "reload", "version", "run", "db", *VERBS):
        assert f"│ {verb} " in shown
    assert "Exit codes: 0 done, 1 failed, 2 usage, 3 no such job" in shown
    assert alone().returncode == 2
