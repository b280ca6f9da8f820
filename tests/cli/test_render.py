from __future__ import annotations

import os

import pytest
from helpers.command import Command

from harnessd.cli import render
from harnessd.cli.render import Cell, Grid


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (-0.2, "0.0s"), (0.44, "0.4s"), (59.9, "59s"), (61, "1m01s"), (3600, "1h00m"), (90_000, "1d01h")],
)
def test_an_age_has_at_most_two_units(seconds: float | None, text: str) -> None:
    assert render.age(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0B"),
        (1023, "1023B"),
        (1536, "1.5K"),
        (200 << 20, "200M"),
        (3 << 30, "3.0G"),
        (5 << 40, "5.0T"),
    ],
)
def test_a_size_has_a_binary_unit(count: int | None, text: str) -> None:
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (None, "-"),
        ("null", "-"),
        ("{}", "{}"),
        ('{"pnl": 1.5, "at": "x", "deep": {"a": [1, null]}}', 'pnl=1.5 at=x deep={"a":[1,null]}'),
        ('"a word"', "a word"),
        ("[1, 2]", "[1,2]"),
        ('{"cut": "in the mid', '{"cut": "in the mid…'),
    ],
)
def test_a_status_is_one_line(text: str | None, shown: str) -> None:
    assert render.status_short(text) == shown


def test_what_a_job_says_cannot_steer_the_terminal() -> None:
    assert render.value({"a": "\x1b[2J\n\r\u202e"}) == "a=�[2J���"
    assert "\x1b" not in render.value("\x1b]0;title\x07")


def test_a_plain_table_has_columns_and_nothing_at_the_ends_of_its_lines() -> None:
    grid = Grid(
        ("NAME", "N", "LAST"), [[Cell("a", "red"), Cell("10"), Cell("")], [Cell("long"), Cell("5"), Cell("x")]], ("N",)
    )
    assert grid.plain() == "NAME   N  LAST\na     10\nlong   5  x\n"


def test_a_state_says_in_what_the_last_run_ended_when_that_is_why() -> None:
    failed = {"signal": None, "code": 3, "reason": "crashed"}
    assert render.state("failed", failed) == Cell("failed (3)", "bold red")
    assert render.state("backoff", failed | {"signal": "SIGSEGV"}).text == "backoff (SIGSEGV)"
    assert render.state("failed", failed | {"code": None, "reason": "unstarted"}).text == "failed (unstarted)"
    assert render.state("running", failed).text == "running"
    assert render.state("new-one").text == "new-one"


PRINTING = [
    ("ps",),
    ("ps", "--json"),
    ("hb", "feed-a"),
    ("events",),
    ("logs", "-f", "speaks", "--since-offset", "0"),
    ("logs", "speaks", "--since-offset", "0"),
    ("history", "feed-a", "--format", "csv"),
    ("runs", "feed-a", "--json"),
    ("schema",),
]


@pytest.mark.parametrize("args", PRINTING, ids=" ".join)
def test_a_full_disk_under_stdout_is_one_line(harnessd: Command, args: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        ran = harnessd(*args, stdout=full)
    assert (ran.returncode, ran.stderr) == (1, "harnessd: cannot write to stdout: No space left on device\n")


@pytest.mark.parametrize("args", PRINTING, ids=" ".join)
def test_a_reader_of_stdout_that_has_gone_is_not_told_of(harnessd: Command, args: tuple[str, ...]) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as closed:
        ran = harnessd(*args, stdout=closed)
    assert (ran.returncode, ran.stderr) == (1, "")
