"""What the shell completes."""

from __future__ import annotations

import pytest
from helpers.command import Command
from helpers.daemon import Daemon


def completed(command: Command, line: str) -> list[str]:
    """Return what bash is offered for the last word of the line."""
    words = line.split(" ")
    env = {"_HARNESSD_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return command.done(**env).split()


@pytest.mark.parametrize("verb", ["stop", "ps", "logs", "config", "history"])
def test_names_of_jobs_are_completed(harnessd: Command, daemon: Daemon, verb: str) -> None:
    assert completed(harnessd, f"harnessd {verb} fe") == ["feed-a", "feed-b"]
    assert completed(harnessd, f"harnessd {verb} late sp") == ["speaks"]


def test_names_are_those_of_the_daemon_that_the_line_means(alone: Command, daemon: Daemon) -> None:
    assert completed(alone, f"harnessd --config {daemon.config} stop la") == ["late"]


def test_verbs_are_completed(alone: Command) -> None:
    assert completed(alone, "harnessd re") == ["resume", "restart", "reload"]


def test_without_a_daemon_no_name_is_offered(alone: Command) -> None:
    assert completed(alone, "harnessd --socket nowhere stop fe") == []
