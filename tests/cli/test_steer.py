"""start, stop, pause, resume, restart, kill, config: on one job, on several, and what their exit codes say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command import Command, Going
from helpers.daemon import Daemon
from helpers.waiting import until


@pytest.fixture(autouse=True)
def as_found(daemon: Daemon) -> None:
    """Every test finds the feeds running and `late` stopped."""
    for name in ("feed-a", "feed-b"):
        if daemon.hb(name)["state"] != "running":
            daemon.get(f"/jobs/{name}/restart")
    if daemon.hb("late")["pid"]:
        daemon.get("/jobs/late/kill")
    daemon.wait_all("running", ["feed-a", "feed-b"])


def test_a_verb_says_what_the_job_is_now(harnessd: Command, daemon: Daemon) -> None:
    assert harnessd.done("pause", "feed-a") == "feed-a: running, sent to the job\n"
    daemon.wait_state("feed-a", "paused")
    assert harnessd.done("resume", "feed-a", "--wait") == "feed-a: running, the job has read it\n"
    assert harnessd.done("pause", "feed-a", "--wait") == "feed-a: paused, the job has read it\n"


def test_stop_and_start_wait_until_it_is_so(harnessd: Command, daemon: Daemon) -> None:
    assert harnessd.done("stop", "feed-*", "--wait") == "feed-a: stopped\nfeed-b: stopped\n"
    assert daemon.hb("feed-b")["pid"] is None
    assert harnessd.done("start", "--tag", "x", "--wait") == "feed-a: running\nfeed-b: running\n"
    assert daemon.hb("feed-b")["pid"]


def test_restart_gives_a_new_process(harnessd: Command, daemon: Daemon) -> None:
    before = daemon.hb("feed-a")["pid"]
    assert harnessd.done("restart", "feed-a", "--wait") == "feed-a: running\n"
    assert daemon.hb("feed-a")["pid"] not in (None, before)


def test_kill_waits_until_nothing_is_left(harnessd: Command, daemon: Daemon) -> None:
    assert harnessd.done("kill", "feed-a") == "feed-a: killed: signal SIGTERM\n"
    assert daemon.hb("feed-a")["pid"] is None
    assert harnessd.done("kill", "feed-b", "--no-wait", "--grace", "0.5").startswith("feed-b: stop")
    daemon.wait_state("feed-b", "stopped")


def test_data_goes_with_a_command(harnessd: Command, daemon: Daemon) -> None:
    harnessd.done("pause", "feed-a", "--data", "{'why': 'lunch'}", "--wait")
    (event,) = daemon.get("/jobs/feed-a/events", kind="command", limit=1).json()["rows"]
    assert event["data"]["data"] == {"why": "lunch"}
    assert event["actor"].startswith("socket")


def test_config_is_shown_overridden_and_cleared(harnessd: Command, daemon: Daemon) -> None:
    shown = [line.split() for line in harnessd.done("config", "feed-a").splitlines()]
    assert shown == [
        ["JOB", "KEY", "FROM", "VALUE"],
        ["feed-a", "target_vol", "file", "4.0"],
        ["feed-a", "book", "file", "depth=5"],
    ]
    harnessd.done("config", "feed-a", "--set", "target_vol=4.2", "--set", "name=a=b", "--wait")
    assert daemon.get("/jobs/feed-a/config").json()["overrides"] == {"target_vol": 4.2, "name": "a=b"}
    assert "override" in harnessd.done("config", "feed-a")
    harnessd.done("config", "feed-a", "--data", "{'book': None}")
    assert daemon.get("/jobs/feed-a/config").json()["overrides"]["name"] == "a=b"
    cleared = json.loads(harnessd.done("config", "feed-a", "--clear", "--json"))
    assert cleared["overrides"] == {}


@pytest.mark.parametrize(
    "args",
    [
        ("config", "feed-a", "--set", "novalue"),
        ("config", "feed-a", "--set", "a=1", "--clear"),
        ("config", "feed-a", "--data", "{"),
        ("config", "feed-a", "--data", "[1]"),
        ("stop", "--all", "feed-a"),
        ("stop", "all"),
        ("start", "feed-a", "--timeout", "soon"),
        ("pause", "feed-a", "--wait", "--timeout", "inf"),
        ("kill", "feed-a", "--timeout", "1e300"),
        ("start", "feed-a", "--timeout", "nan"),
        ("ps", "-w", "--every", "inf"),
        ("ps", "-w", "--every", "1e12"),
        ("start", "feed-a", "--bogus"),
        ("strat", "feed-a"),
        ("events", "--since", "noon"),
        ("events", "-f", "--limit", "3"),
        ("logs", "-f", "feed-*"),
        ("history", "feed-*", "--cursor", "x"),
        ("top",),
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_is_exit_code_2(harnessd: Command, args: tuple[str, ...]) -> None:
    ran = harnessd(*args)
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    assert ran.stderr and "Traceback" not in ran.stderr


def test_what_the_state_does_not_allow_is_exit_code_5(harnessd: Command) -> None:
    ran = harnessd("pause", "late")
    assert (ran.returncode, ran.stdout) == (5, "")
    assert ran.stderr == "harnessd: cannot pause 'late': it is stopped\n"
    assert harnessd("config", "speaks", "--set", "a=1").returncode == 5


@pytest.mark.parametrize("timeout_s", ["0.2", "0", "0.00001"])
def test_a_job_that_does_not_read_is_exit_code_1(harnessd: Command, daemon: Daemon, timeout_s: str) -> None:
    daemon.job("deaf", "Deaf")
    daemon.reload()
    daemon.status("deaf")
    unread = harnessd("pause", "deaf", "--wait", "--timeout", timeout_s)
    assert (unread.returncode, unread.stdout) == (1, "")
    assert "still queued" in unread.stderr
    stopping = harnessd("stop", "deaf", "--wait", "--timeout", timeout_s)
    assert stopping.returncode == 1
    assert stopping.stderr == f"harnessd: deaf: still stopping after {float(timeout_s):g} s\n"
    harnessd.done("kill", "deaf", "--grace", "0.1")
    _forget(daemon, "deaf")


def test_a_timeout_longer_than_the_daemon_waits_is_one_all_the_same(harnessd: Command, daemon: Daemon) -> None:
    for verb in ("pause", "resume"):
        assert harnessd.done(verb, "feed-a", "--wait", "--timeout", "7200").endswith("the job has read it\n")


def test_a_timeout_of_nothing_is_none_for_the_answer(harnessd: Command, daemon: Daemon) -> None:
    assert harnessd.done("pause", "feed-a", "--timeout", "0") == "feed-a: running, sent to the job\n"
    assert harnessd.done("start", "late", "--timeout", "0").startswith("late: ")
    daemon.job("stays", ["sh", "-c", "trap '' TERM; echo; while :; do sleep 1; done"], kill_grace=1000)
    daemon.reload()
    until(lambda: daemon.get("/jobs/stays/logs").content, "it has its trap")
    killing = harnessd("kill", "stays", "--timeout", "0")
    assert (killing.returncode, killing.stdout) == (1, "")
    assert killing.stderr.startswith("harnessd: no answer from ")
    assert daemon.hb("stays")["state"] == "stopping"
    harnessd.done("kill", "stays", "--grace", "0")
    _forget(daemon, "stays")


def test_what_no_process_reads_is_not_said_to_be_read(harnessd: Command) -> None:
    harnessd.done("config", "late", "--set", "a=1", "--wait")
    ran = harnessd("config", "late", "--set", "a=1", "--wait", "--json")
    assert json.loads(ran.stdout)["read"] is None
    harnessd.done("config", "late", "--clear")


@pytest.mark.parametrize("verb", ["stop", "hb", "config"])
def test_a_tag_that_no_job_has_is_exit_code_3(harnessd: Command, verb: str) -> None:
    ran = harnessd(verb, "--tag", "prdo")
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr == "harnessd: cannot find a job with tag 'prdo': there is none\n"


def test_a_job_that_will_not_come_up_ends_the_wait(harnessd: Command, daemon: Daemon) -> None:
    daemon.job("broken", ["false"], autostart=False, max_failures=1)
    daemon.reload()
    ran = harnessd("start", "broken", "--wait", "--timeout", "3600")
    assert (ran.returncode, ran.stderr) == (1, "harnessd: broken: failed\n")
    assert "failed (1)" in harnessd.done("ps", "broken")
    _forget(daemon, "broken")


def test_several_jobs_have_each_their_line_and_the_code_of_what_failed(harnessd: Command, daemon: Daemon) -> None:
    ran = harnessd("pause", "feed-a", "late", "--wait")
    assert ran.returncode == 5
    assert ran.stdout == "feed-a: paused, the job has read it\n"
    assert ran.stderr == "harnessd: cannot pause 'late': it is stopped\n"
    assert harnessd("pause", "late", "nowhere").returncode == 1


def test_all_and_globs_spare_what_is_down_already_and_a_name_does_not(harnessd: Command, daemon: Daemon) -> None:
    assert harnessd("stop", "late").returncode == 5
    assert harnessd("stop", "late*").stdout == "late: stopped\n"
    harnessd.done("kill", "feed-b")
    assert harnessd.done("kill", "--tag", "x").splitlines() == ["feed-a: killed: signal SIGTERM", "feed-b: stopped"]


def test_json_of_a_verb_is_what_the_daemon_has_said(harnessd: Command, daemon: Daemon) -> None:
    said = json.loads(harnessd.done("pause", "feed-a", "--wait", "--json"))
    assert (said["job"], said["verb"], said["read"]) == ("feed-a", "pause", True)
    results = json.loads(harnessd.done("resume", "--tag", "x", "--json"))["results"]
    assert [(each["job"], each["status_code"]) for each in results] == [("feed-a", 202), ("feed-b", 202)]
    refused = harnessd("pause", "late", "--json")
    assert refused.returncode == 5
    assert json.loads(refused.stdout)["kind"] == "wrong-state"


def test_a_job_with_a_strange_name_is_no_other_route(harnessd: Command) -> None:
    for name in ("../healthz", "a/b", "feed-a%2Fhb", "\u212aa", "a b"):
        assert harnessd("hb", name).returncode in (1, 3), name


def _forget(daemon: Daemon, name: str) -> None:
    Path(daemon.config, "jobs", f"{name}.json").unlink()
    daemon.reload()


def test_one_of_several_that_takes_its_time_holds_up_no_other_and_an_interrupt_ends_the_wait(
    daemon: Daemon, harnessd: Command, going: Callable[..., Going]
) -> None:
    daemon.job("a-deaf", ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"], kill_grace=1000)
    daemon.reload()
    daemon.wait_all("running", ["a-deaf"])
    killing = going("kill", "a-deaf", "feed-a")
    daemon.wait_for(lambda: daemon.hb("feed-a")["pid"] is None, "the other has ended")
    assert killing.process.poll() is None
    assert killing.interrupt() == 130
    harnessd("kill", "a-deaf", "--grace", "0")
    _forget(daemon, "a-deaf")
