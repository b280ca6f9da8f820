"""ps, hb, status: what a person and a program see."""

from __future__ import annotations

import json

from helpers.command import Command
from helpers.daemon import Daemon

from harnessd.cli.listing import TITLES


def names(table: str) -> list[str]:
    """Return the first column of a table, without its title."""
    return [line.split()[0] for line in table.splitlines()[1:]]


def test_ps_lists_every_job_with_what_it_uses_and_says(harnessd: Command, daemon: Daemon) -> None:
    lines = harnessd.done("ps").splitlines()
    assert tuple(lines[0].split()) == TITLES
    assert names("\n".join(lines)) == ["feed-a", "feed-b", "late", "speaks"]
    feed = lines[1].split()
    assert feed[1:3] == ["running", str(daemon.hb("feed-a")["pid"])]
    assert feed[5].endswith("M") and feed[6] == "0"
    assert f"pid={feed[2]}" in lines[1]
    assert lines[3].split() == ["late", "stopped", *["-"] * 4, "0", "-", "-"]


def test_ps_takes_names_globs_tags_and_states(harnessd: Command, daemon: Daemon) -> None:
    assert names(harnessd.done("ps", "late", "speaks")) == ["late", "speaks"]
    assert names(harnessd.done("ps", "feed-*")) == ["feed-a", "feed-b"]
    assert names(harnessd.done("ps", "--tag", "y")) == ["feed-b"]
    assert names(harnessd.done("ps", "feed-?", "--tag", "y")) == ["feed-b"]
    assert names(harnessd.done("ps", "--state", "stopped")) == ["late"]
    assert harnessd.done("ps", "--state", "failed").split() == list(TITLES)


def test_nothing_but_text_goes_into_a_pipe(harnessd: Command, daemon: Daemon) -> None:
    for verb in (["ps"], ["hb", "feed-a"], ["status", "feed-a"], ["events"], ["config", "feed-a"], ["--help"]):
        assert "\x1b" not in harnessd.done(*verb, FORCE_COLOR="")


def test_ps_does_not_cut_what_goes_into_a_pipe(harnessd: Command, daemon: Daemon) -> None:
    assert "args=[]" in harnessd.done("ps", "feed-a", COLUMNS="40")


def test_json_is_what_the_daemon_has_said(harnessd: Command, daemon: Daemon) -> None:
    assert set(json.loads(harnessd.done("ps", "--json"))["jobs"][0]) >= {"name", "cpu_percent", "status_text"}
    assert [job["name"] for job in json.loads(harnessd.done("ps", "feed-*", "--json"))["jobs"]] == ["feed-a", "feed-b"]
    assert json.loads(harnessd.done("hb", "feed-a", "--json"))["pid"] == daemon.hb("feed-a")["pid"]
    assert harnessd.done("status", "feed-a", "--json") == daemon.get("/jobs/feed-a/status").text
    assert harnessd.done("config", "feed-a", "--json") == daemon.get("/jobs/feed-a/config").text
    several = harnessd.done("status", "feed-*", "--json").splitlines()
    assert [json.loads(line)["job"] for line in several] == ["feed-a", "feed-b"]
    assert len(json.loads(harnessd.done("status", "--all", "--json"))["results"]) == 4


def test_hb_tells_by_its_exit_code_whether_the_job_has_a_process(harnessd: Command, daemon: Daemon) -> None:
    alive = harnessd.done("hb", "feed-a")
    assert f"pid         {daemon.hb('feed-a')['pid']}\n" in alive
    assert "state       running (wanted: up)\n" in alive
    dead = harnessd("hb", "late")
    assert dead.returncode == 1
    assert "state       stopped (wanted: down)\n" in dead.stdout and dead.stderr == ""
    assert harnessd("hb", "--all").returncode == 1
    assert harnessd("hb", "--tag", "x").returncode == 0


def test_status_shows_each_field_of_the_last_one(harnessd: Command, daemon: Daemon) -> None:
    shown = harnessd.done("status", "feed-a")
    assert shown.startswith("feed-a: ")
    assert f"  pid     {daemon.hb('feed-a')['pid']}\n" in shown
    assert harnessd.done("status", "late") == "late: it has said nothing\n\n"


def test_status_as_of_a_moment(harnessd: Command, daemon: Daemon) -> None:
    assert "it has said nothing" in harnessd.done("status", "feed-a", "--at", "-1d")
    refused = harnessd("status", "feed-a", "feed-b", "--at", "noon")
    assert refused.returncode == 2
    assert "cannot" in refused.stdout + refused.stderr and "Traceback" not in refused.stderr


def test_a_job_that_is_none_is_told_with_the_nearest(harnessd: Command, daemon: Daemon) -> None:
    for verb in ("ps", "hb", "status", "runs", "history", "events", "metrics", "logs", "config", "stop", "kill"):
        ran = harnessd(verb, "feed-c")
        assert (ran.returncode, ran.stdout) == (3, ""), verb
        assert "'feed-c': no such job; did you mean 'feed-" in ran.stderr
        assert harnessd(verb, "zz*").returncode == 3


def test_without_a_name_the_daemon_takes_its_default_or_names_the_choice(harnessd: Command, daemon: Daemon) -> None:
    ran = harnessd("status")
    assert ran.returncode == 5
    assert "/jobs/feed-a" in ran.stderr


def test_ps_loads_only_what_it_needs(harnessd: Command, daemon: Daemon) -> None:
    loaded = harnessd("ps", PYTHONPROFILEIMPORTTIME="1")
    assert loaded.returncode == 0
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in loaded.stderr.splitlines()}
    assert "typer" in names
    assert not names & {"httpx", "rich", "pydantic", "sqlalchemy", "starlette", "uvicorn", "asyncio", "psutil"}
