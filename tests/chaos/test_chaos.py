"""A short course of chaos. `make chaos` takes as long as it is told to."""

from __future__ import annotations

import re
import subprocess

import pytest
from chaos.course import run
from chaos.plan import RATES, plan
from helpers.documents import ROOT, text, typed
from helpers.waiting import DEADLINE_S


def test_the_plan_follows_from_the_seed_alone() -> None:
    assert plan("a", 600) == plan("a", 600)
    assert plan("a", 600) != plan("b", 600)


def test_the_documented_faults_are_those_of_the_plan() -> None:
    rows = [line.split("|")[1] for line in text("docs/testing.md").splitlines() if line.startswith("|")]
    assert {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)} == set(RATES)


def test_the_documented_commands_are_there() -> None:
    for line in typed(text("docs/testing.md"))[0].splitlines():
        command = ["bash", "-c", f"{line} --dry-run"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=DEADLINE_S)


@pytest.mark.timeout(240)
def test_under_chaos_nothing_is_lost_doubled_left_or_unexplained() -> None:
    verdict = run("short", 12.0, pace=2.0)
    assert verdict.found == []
