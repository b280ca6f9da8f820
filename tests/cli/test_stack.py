"""stack: where the threads of jobs are, for a person and a program."""

from __future__ import annotations

import json

from helpers.command import Command
from helpers.daemon import Daemon


def test_stack_shows_each_thread_with_its_calls(harnessd: Command, daemon: Daemon) -> None:
    hb = daemon.hb("feed-a")
    shown = harnessd.done("stack", "feed-a")
    assert shown.startswith(f"feed-a: run {hb['run']}, process {hb['pid']}\n  MainThread ({hb['pid']})")
    assert "jobs.py:" in shown
    assert harnessd.done("stack", "feed-a", "--subprocesses").startswith("feed-a: ")


def test_json_is_what_the_daemon_has_said(harnessd: Command, daemon: Daemon) -> None:
    said = json.loads(harnessd.done("stack", "feed-a", "--json"))
    assert said["processes"][0]["pid"] == daemon.hb("feed-a")["pid"]


def test_a_job_without_a_process_or_without_python_is_refused(harnessd: Command, daemon: Daemon) -> None:
    for name, why in (("late", "it has no process"), ("speaks", "is not Python")):
        ran = harnessd("stack", name)
        assert (ran.returncode, ran.stdout) == (5, "") and why in ran.stderr


def test_of_several_jobs_each_is_told(harnessd: Command, daemon: Daemon) -> None:
    ran = harnessd("stack", "--all")
    assert ran.returncode == 5
    assert "feed-b: run " in ran.stdout and "'late': it has no process" in ran.stdout
