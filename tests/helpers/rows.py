"""A job, a run and lines of it, as tests put them into a store."""

from __future__ import annotations

from harnessd.server.records import JobRow, RunStarted
from harnessd.server.tape import Line

RUN = 1_700_000_000_000


def job_row(name: str = "etl", **changes: object) -> JobRow:
    row = {"spec": "{}", "digest": "d1", "want": "up", "state": "running", "changed_us": 5} | changes
    return JobRow(name, **row)  # type: ignore[arg-type]


def run_started(run: int = RUN, job: str = "etl", **changes: object) -> RunStarted:
    row = {"pid": 42, "start_ticks": 99, "mark": 3, "spec_digest": "d1", "started_us": 10, "journal": "/j/1"} | changes
    return RunStarted(run, job, **row)  # type: ignore[arg-type]


def status_lines(first: int, last: int, run: int = RUN) -> list[Line]:
    return [Line(run, seq, seq * 1000, "status", f'{{"n":{seq}}}') for seq in range(first, last + 1)]
