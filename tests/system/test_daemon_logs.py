"""What jobs write, through the whole daemon."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.daemon import Daemon

JOB = """
import sys
from harnessd import Cradle

class Both(Cradle):
    def run(self):
        print("to stdout")
        print("to stderr", file=sys.stderr)
        self.get_msg(timeout=None)
"""


@pytest.mark.parametrize("preload", ["[]", '["decimal"]'], ids=["keeper", "zygote"])
def test_stderr_goes_with_stdout_or_into_its_own_file(daemon: Daemon, tmp_path: Path, preload: str) -> None:
    (tmp_path / "both.py").write_text(JOB)
    daemon.settings(f"preload = {preload}")
    daemon.job("merged", f"{tmp_path}/both.py:Both")
    daemon.job("apart", f"{tmp_path}/both.py:Both", log={"merge": False})
    daemon.job("shell", ["sh", "-c", "echo to stdout; echo to stderr >&2; exec sleep 1000"], log={"merge": False})
    daemon.start()

    def says(job: str, stream: str, text: str) -> None:
        path = f"/jobs/{job}/logs"
        daemon.wait_for(lambda: daemon.get(path, stream=stream).text == text, f"{stream} of {job} is {text!r}")

    for stream in ("stdout", "stderr"):
        says("merged", stream, "to stdout\nto stderr\n")
        says("apart", stream, f"to {stream}\n")
        says("shell", stream, f"to {stream}\n")


def test_a_log_goes_on_over_rotations_runs_and_a_killed_server(daemon: Daemon) -> None:
    count = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo $0 line $i; done; exec sleep 1000"
    daemon.job("etl", ["sh", "-c", count], log={"max_bytes": 4096, "keep": 1000})
    daemon.start()
    text = "".join(f"sh line {number}\n" for number in range(1, 3001))

    def part(**query: object) -> str:
        return daemon.get("/jobs/etl/logs", **query).text

    runs = []
    for turn in range(1, 4):
        daemon.wait_for(lambda whole=text * turn: part(since_offset=0) == whole, "all is written")  # type: ignore[misc]
        runs.append(daemon.hb("etl")["run"])
        daemon.wait_for(lambda: len(list((daemon.state / "log").glob("etl.log.0*.gz"))) > 5, "the log is rotated")
        daemon.wait_new_server(daemon.kill_server())
        assert part(since_offset=0) == text * turn
        assert [part(run=run) for run in runs] == [text] * turn
        daemon.post("/jobs/etl/restart")
