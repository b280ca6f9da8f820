from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harnessd import examples

SCRIPT = Path(examples.__file__).parent / "disk_report.sh"
DEADLINE_SECONDS = 20


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "run.journal"


@pytest.fixture
def process(journal: Path) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, "HARNESS_JOURNAL": str(journal), "DISK_REPORT_SECONDS": "1"}
    with subprocess.Popen(["sh", str(SCRIPT)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        yield process
        if process.poll() is None:
            process.kill()


def statuses(journal: Path, at_least: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        if len(lines) >= at_least and lines[-1].endswith(b"\n"):
            return [json.loads(line)["status"] for line in lines]
        time.sleep(0.02)
    raise AssertionError(f"fewer than {at_least} lines in {journal} after {DEADLINE_SECONDS} s")


def test_reports_the_figures_of_the_root_filesystem(process: subprocess.Popen[bytes], journal: Path) -> None:
    status = statuses(journal, at_least=1)[0]
    assert status["path"] == "/"
    assert status["total_bytes"] == pytest.approx(shutil.disk_usage("/").total, abs=1024)
    assert 0 < status["used_bytes"] <= status["total_bytes"]
    assert 0 <= status["used_percent"] <= 100
    assert set(status) == {"path", "total_bytes", "used_bytes", "free_bytes", "used_percent"}


def test_goes_on_reporting(process: subprocess.Popen[bytes], journal: Path) -> None:
    assert len(statuses(journal, at_least=2)) >= 2


def test_ends_with_0_on_sigterm_and_leaves_no_child(process: subprocess.Popen[bytes], journal: Path) -> None:
    statuses(journal, at_least=1)
    process.terminate()
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)  # ends when the last holder of stdout has ended
    assert (process.returncode, output) == (0, b"")


def test_is_executable_and_reports_on_stdout_without_a_harness() -> None:
    env = {name: value for name, value in os.environ.items() if name != "HARNESS_JOURNAL"}
    with subprocess.Popen([SCRIPT], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["status"]["path"] == "/"
        process.terminate()
        process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0
