"""What a new database is begun with when the old one is lost in mid-life: the jobs and the runs that matter now."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from harnessd.server.records import JobRow, JournalDone, Loaded, Record, RunEnded, RunStarted
from harnessd.wire import merged


def completed(row: JobRow, stored: JobRow) -> JobRow:
    """Return the row, made without having seen the stored one, with what that says beyond the job's present."""
    return replace(
        row,
        overrides=json.dumps(merged(json.loads(stored.overrides), json.loads(row.overrides))),
        restarts=stored.restarts + row.restarts,
        ever_up=row.ever_up or (stored.ever_up and stored.digest == row.digest),
    )


class Known:
    """Remembers the last row of each job, and of each run until its journal is done."""

    def __init__(self) -> None:
        self._jobs: dict[str, JobRow] = {}
        self._runs: dict[int, RunStarted] = {}
        self._ends: dict[int, RunEnded] = {}

    def learn(self, loaded: Loaded) -> None:
        """Take what a database knows, where nothing later was noted."""
        for job in loaded.jobs:
            self._jobs.setdefault(job.name, job)
        for run in (*loaded.runs, *loaded.unread):
            self._runs.setdefault(run.id, run)

    def note(self, record: Record) -> None:
        if isinstance(record, JobRow):
            self._jobs[record.name] = record
        elif isinstance(record, RunStarted):
            self._runs.setdefault(record.id, record)
        elif isinstance(record, RunEnded):
            self._ends[record.run] = record
        elif isinstance(record, JournalDone):
            self._runs.pop(record.run, None)
            self._ends.pop(record.run, None)

    def progressed(self, run: int, offset: int, lines: int) -> None:
        """The journal of the run is stored up to there, in a database that may be lost by now."""
        if run in self._runs:
            self._runs[run] = replace(self._runs[run], journal_offset=offset, journal_lines=lines)

    def records(self) -> Iterable[Record]:
        ends = [end for run, end in self._ends.items() if run in self._runs]
        return [*self._jobs.values(), *self._runs.values(), *ends]
