"""harnessd run: one job without a script of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from helpers.command import Command, Going
from helpers.waiting import until

JOB = """
import sys
from harnessd import Cradle, Command
import beside

class Told(Cradle):
    def run(self, *args):
        self.set_status({"args": list(args), "argv": sys.argv[1:], "config": self.get_config(), "beside": beside.NAME})
        while not (msg := self.get_msg(timeout=None)) or msg["cmd"] != Command.STOP:
            pass
        return 7

class Outer:
    class Inner(Cradle):
        def run(self):
            print("inner ran")

def function():
    print("function ran", sys.argv[1:])
    return 3
"""
QUIET = '{"http": {"port": 0}}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "job.py").write_text(JOB)
    (tmp_path / "sub" / "beside.py").write_text("NAME = 'beside it'")
    return tmp_path


def test_a_class_is_run_steered_and_its_exit_code_returned(
    going: Callable[..., Going], alone: Command, folder: Path
) -> None:
    config = '{"name": "mine", "config": {"a": 1}, "http": {"port": 0}}'
    run = going("run", "sub/job.py:Told", "--symbol", "SPX", "-x", config, "--help", command=alone)
    found = until(lambda: re.search(r"mine listens on (\S+)", (folder / "stderr").read_text()), "it listens")
    url = found[1]
    status = until(lambda: httpx.get(f"{url}/status").json()["status"], "it reports")
    args = ["--symbol", "SPX", "--help"]
    assert status == {"args": args, "argv": args, "config": {"a": 1}, "beside": "beside it"}
    assert "mine" in alone.done("--url", url, "ps")
    assert alone.done("--url", url, "status").startswith("mine: ")
    alone.done("--url", url, "stop")
    assert until(lambda: run.process.poll() is not None, "it ends") and run.process.returncode == 7


def test_functions_inner_classes_and_modules_are_run_too(alone: Command, folder: Path) -> None:
    ran = alone("run", "sub/job.py:function", "-x", QUIET, "one")
    assert (ran.returncode, ran.stdout) == (3, "function ran ['one']\n")
    assert alone("run", "sub/job.py:Outer.Inner", f"-x={QUIET}").stdout == "inner ran\n"
    alone.folder = folder / "sub"
    assert alone("run", "job:Outer.Inner", "-x", QUIET).stdout == "inner ran\n"


@pytest.mark.parametrize(
    ("entrypoint", "why"),
    [
        ("sub/job.py", "FILE.py:CLASS"),
        ("nowhere.py:Job", "no such file"),
        ("nowhere.at.all:Job", "no such module"),
        ("sub/job.py:Nobody", "has no Nobody"),
        ("sub/job.py:JOBS.x", "has no JOBS"),
        ("sub/job.py:Outer", "does not extend Cradle"),
    ],
)
def test_what_cannot_be_run_is_named_with_exit_code_2(alone: Command, folder: Path, entrypoint: str, why: str) -> None:
    ran = alone("run", entrypoint, "-x", QUIET)
    assert ran.returncode == 2
    assert why in ran.stderr and "Traceback" not in ran.stderr


def test_a_file_that_does_not_import_shows_where(alone: Command, folder: Path) -> None:
    (folder / "broken.py").write_text("import nowhere_at_all\n")
    ran = alone("run", "broken.py:Job")
    assert ran.returncode == 1
    assert "broken.py" in ran.stderr and "nowhere_at_all" in ran.stderr
