"""history, runs, events, metrics, logs: what has happened, and what happens now."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

from helpers.command import Command, Going
from helpers.daemon import Daemon
from helpers.waiting import until


def test_history_shows_the_stored_statuses(harnessd: Command, daemon: Daemon) -> None:
    pid = daemon.hb("feed-a")["pid"]
    lines = harnessd.done("history", "feed-a").splitlines()
    assert lines[0].split() == ["AT", "JOB", "RUN", "SEQ", "STATUS"]
    assert f"pid={pid}" in lines[1]
    assert f"pid={pid}" in harnessd.done("history")
    one_field = harnessd.done("history", "feed-a", "--fields", "pid", "--limit", "1").splitlines()[1:]
    assert [line.split()[-1] for line in one_field] == [f"pid={pid}"]
    assert harnessd.done("history", "feed-a", "--until", "-1d").split() == ["AT"]
    assert "MEAN" in harnessd.done("history", "feed-a", "--every", "60s", "--fields", "pid")


def test_rows_as_csv_ndjson_and_json_are_the_daemons(harnessd: Command, daemon: Daemon) -> None:
    query = {"limit": 2, "order": "asc"}
    for wanted in ("csv", "ndjson"):
        expected = daemon.get("/jobs/feed-a/history", format=wanted, **query).text
        assert harnessd.done("history", "feed-a", "--format", wanted, "-n", 2, "--order", "asc") == expected
    page = daemon.get("/jobs/feed-a/runs").json()
    assert [row["run"] for row in json.loads(harnessd.done("runs", "feed-a", "--json"))["rows"]] == [
        row["run"] for row in page["rows"]
    ]


def test_a_page_names_the_one_behind_it(harnessd: Command, daemon: Daemon) -> None:
    first = harnessd("events", "-n", 1, "--order", "asc")
    assert first.returncode == 0
    cursor = first.stderr.removeprefix("more: --cursor ").strip()
    second = harnessd("events", "-n", 1, "--order", "asc", "--cursor", cursor)
    assert len(second.stdout.splitlines()) == 2
    assert second.stdout != first.stdout


def test_runs_events_and_metrics_of_several_jobs_are_one_table(harnessd: Command, daemon: Daemon) -> None:
    runs = harnessd.done("runs", "feed-*").splitlines()
    assert runs[0].split()[:3] == ["RUN", "JOB", "PID"]
    assert {line.split()[1] for line in runs[1:]} == {"feed-a", "feed-b"}
    tagged = harnessd.done("events", "--tag", "y", "--kind", "state").splitlines()[1:]
    assert {line.split()[3] for line in tagged} == {"feed-b"}
    until(lambda: len(harnessd.done("metrics", "feed-a").splitlines()) > 1, "a sample was taken")
    assert harnessd.done("metrics", "feed-a").split()[:6] == ["AT", "JOB", "RUN", "CPU%", "RSS", "THREADS"]


def test_logs_are_the_output_byte_for_byte(harnessd: Command, daemon: Daemon) -> None:
    assert harnessd.done("logs", "speaks", "--since-offset", "0").startswith("first\nsecond\nline 1\n")
    assert len(harnessd.done("logs", "speaks", "--tail", "1").splitlines()) == 1
    run = daemon.hb("speaks")["run"]
    assert harnessd.done("logs", "speaks", "--run", run).startswith("first\n")
    assert harnessd.done("logs", "feed-*") == "==> feed-a <==\n==> feed-b <==\n"
    assert harnessd("logs", "speaks", "--stream", "video").returncode == 2


def lines_of(going: Going) -> list[int]:
    """Return the numbers of the whole lines that `speaks` has written."""
    whole = going.seen().rpartition("\n")[0]
    return [int(line.split()[1]) for line in whole.splitlines() if line.startswith("line ")]


def test_following_a_log_misses_and_doubles_nothing_when_the_server_dies(
    going: Callable[..., Going], daemon: Daemon
) -> None:
    follows = going("logs", "-f", "speaks", "--since-offset", "0")
    follows.until_seen("line 1\n")
    daemon.wait_new_server(daemon.kill_server())
    seen = len(lines_of(follows))
    until(lambda: len(lines_of(follows)) > seen + 20, "it goes on")
    numbers = lines_of(follows)
    assert numbers == list(range(1, len(numbers) + 1))
    assert follows.interrupt() == 130


def test_following_the_log_of_a_run_ends_with_the_run(going: Callable[..., Going], daemon: Daemon) -> None:
    run = daemon.hb("speaks")["run"]
    follows = going("logs", "-f", "speaks", "--run", str(run), "--tail", "1")
    follows.until_seen("line ")
    daemon.get("/jobs/speaks/restart")
    assert until(lambda: follows.process.poll() is not None, "it ends") and follows.process.returncode == 0
    daemon.wait_state("speaks", "running")


def test_following_events_shows_them_as_they_happen_also_across_a_new_server(
    going: Callable[..., Going], harnessd: Command, daemon: Daemon
) -> None:
    follows = going("events", "-f", "--kind", "config-cleared,server-start", "--cursor", "1")
    named = going("events", "-f", "feed-b", "late", "--kind", "config-cleared", "--cursor", "1", "--json")
    for name in ("feed-a", "feed-b"):
        harnessd.done("config", name, "--clear")
    follows.until_seen("feed-b  config-cleared")
    daemon.wait_new_server(daemon.kill_server())
    follows.until_seen("server-start")
    harnessd.done("config", "late", "--clear")
    follows.until_seen("late  config-cleared")
    named.until_seen('"late"')
    assert follows.seen().count("feed-a  config-cleared") == 1
    rows = [json.loads(line) for line in named.seen().splitlines()]
    assert [(row["job"], row["kind"]) for row in rows] == [("feed-b", "config-cleared"), ("late", "config-cleared")]
    assert follows.interrupt() == named.interrupt() == 130


def test_a_name_that_is_no_jobs_is_told_when_several_are_followed(harnessd: Command) -> None:
    ran = harnessd("events", "-f", "feed-a", "fed-b")
    assert (ran.returncode, ran.stdout) == (3, "")
    assert "'fed-b'" in ran.stderr


def test_what_follows_ends_when_nobody_reads_it(going: Callable[..., Going], harnessd: Command) -> None:
    follows = going("logs", "-f", "speaks")
    follows.until_seen("line ")
    os.close(follows._ours)
    follows._ours = os.open(os.devnull, os.O_RDONLY)
    until(lambda: follows.process.poll() is not None, "it ends")
    assert follows.process.returncode in (1, -signal.SIGPIPE)
    assert "Traceback" not in (harnessd.folder / "stderr").read_text()
