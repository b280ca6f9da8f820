"""Turns records and lines into rows, a batch in one transaction.

Rows go in as statements of many rows. sqlite3 lets go of the GIL for every statement, and a thread that has to win it
back for each row beside a busy one stores some hundred rows a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, delete, not_, select, update
from sqlalchemy.exc import SQLAlchemyError

from harnessd.errors import Misplaced, StoreError
from harnessd.server import desired, schema
from harnessd.server.records import (
    Event,
    EventKind,
    JobRow,
    JournalDone,
    Loaded,
    Notice,
    NoticesDone,
    Record,
    RunEnded,
    RunStarted,
    Sample,
    TroublesOver,
)
from harnessd.server.tape import Line

_MOST_VALUES = 32_766  # in a statement: what SQLite takes as it is usually built, and less than PostgreSQL does


@dataclass(frozen=True, slots=True, eq=False)
class Lines:
    """What was read of a journal from `since` on, and where its reader is behind it."""

    run: int
    lines: Sequence[Line]
    since: int | None  # None: the caller sees to it that nothing is left out before
    offset: int
    count: int
    dropped: int
    stored: Future[None]

    @property
    def bytes(self) -> int:
        """Return how long they are in the journal."""
        return max(0, self.offset - (self.offset if self.since is None else self.since))


Item = Record | Lines


@dataclass(frozen=True, slots=True)
class Written:
    events: Sequence[Event]
    from_lines: int  # so many of them, the last ones
    refused: Mapping[Lines, StoreError]


class Writer:
    """Writes on one connection. After an error it is of no more use: what it remembers may have been rolled back."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._statements: dict[tuple[_Template, int], str] = {}
        self._records: dict[type[Any], Callable[[Any], None]] = {
            RunEnded: self._run_ended,
            JournalDone: self._journal_done,
            Event: lambda event: self._events.append(event),
            Sample: lambda sample: self._samples.append(sample),
            NoticesDone: lambda done: self._settle(done.ids, waiting=False),
            TroublesOver: lambda over: self._settle(over.ids, lasting=False),
        }
        with connection.begin():
            self._jobs: dict[str, int] = {
                row.name: row.id for row in connection.execute(select(schema.job.c.name, schema.job.c.id))
            }
        self._runs: dict[int, _Run] = {}
        self._events: list[Event] = []
        self._samples: list[Sample] = []

    def load(self) -> Loaded:
        """Return what the database knows of jobs and runs."""
        with self.connection.begin():
            return desired.read(self.connection.exec_driver_sql)

    def write(self, items: Collection[Item], last_event: int) -> Written:
        """Commit the items. Events that stand for lines are numbered after `last_event`, the others have ids."""
        self._events, self._samples, tapes = [], [], list[Lines]()
        with self.connection.begin():
            # Those that others name go first. Of a job the last row counts.
            self._store_jobs({item.name: item for item in items if isinstance(item, JobRow)}.values())
            self._store_runs([item for item in items if isinstance(item, RunStarted)])
            self._many(_NOTICE, _flat(_NOTICE, (item for item in items if isinstance(item, Notice))))
            for item in items:
                if isinstance(item, Lines):
                    tapes.append(item)
                elif not isinstance(item, _IN_ONE):
                    self._records[type(item)](item)
            told = len(self._events)
            refused = self._store_lines(tapes)
            self._store_samples()
            said = [replace(event, id=last_event + number) for number, event in enumerate(self._events[told:], 1)]
            events = self._events[:told] + said
            self._store_events(events)
        return Written(events, len(said), refused)

    def close(self) -> None:
        """Let go of the connection, whatever state it is in."""
        try:
            self.connection.close()
        except SQLAlchemyError:
            self.connection.invalidate()  # a rollback is of no use to a database that is gone

    def _store_jobs(self, rows: Collection[JobRow]) -> None:
        self._many(_JOB, _flat(_JOB, rows))
        if new := [row.name for row in rows if row.name not in self._jobs]:
            columns = schema.job.c
            found = self.connection.execute(select(columns.name, columns.id).where(columns.name.in_(new)))
            self._jobs.update((row.name, row.id) for row in found)

    def _job_id(self, name: str, at_us: int) -> int:
        """Return the id of the job, of which there is a removed row at least when this is done."""
        if name not in self._jobs:
            self._store_jobs([JobRow(name, "{}", "", "down", "stopped", at_us, removed_us=at_us)])
        return self._jobs[name]

    def _store_runs(self, runs: Sequence[RunStarted]) -> None:
        values: list[Any] = []
        for run in runs:
            values += (self._job_id(run.job, run.started_us), *_RUN_FIELDS(run), False, 0, 0)
        self._many(_RUN, values)

    def _run_ended(self, end: RunEnded) -> None:
        """Store how the run ended, unless that is stored already."""
        values = asdict(end)
        del values["run"]
        run = schema.run.c
        self.connection.execute(update(schema.run).where(run.id == end.run, run.ended_us.is_(None)).values(values))

    def _journal_done(self, done: JournalDone) -> None:
        self.connection.execute(update(schema.run).where(schema.run.c.id == done.run).values(journal_done=True))
        self._runs.pop(done.run, None)

    def _settle(self, ids: Sequence[int], **values: bool) -> None:
        """Note it of these notices, and forget those that nothing more is to become of."""
        columns, which = schema.outbox.c, schema.outbox.c.id.in_(ids)
        self.connection.execute(update(schema.outbox).where(which).values(values))
        self.connection.execute(delete(schema.outbox).where(which, not_(columns.waiting), not_(columns.lasting)))

    def _run(self, run: int) -> _Run | None:
        if run not in self._runs:
            columns = schema.run.c
            query = select(schema.job.c.name, columns.journal_offset, columns.journal_lines).join(schema.run)
            if (row := self.connection.execute(query.where(columns.id == run)).first()) is None:
                return None
            self._runs[run] = _Run(*row)
        return self._runs[run]

    def _store_lines(self, tapes: Sequence[Lines]) -> Mapping[Lines, StoreError]:
        """Store what follows on what is stored; return the rest, with reasons."""
        refused: dict[Lines, StoreError] = {}
        statuses: list[Any] = []
        progress: dict[int, tuple[Any, ...]] = {}  # one row a run: of two, UPDATE FROM would take any
        for tape in tapes:
            run = self._run(tape.run)
            if run is None:
                refused[tape] = StoreError(f"cannot store the lines of run {tape.run}: no such run")
                continue
            since = run.offset if tape.since is None else tape.since
            if since != run.offset:
                refused[tape] = Misplaced(tape.run, since, run.offset, run.lines)
                continue
            self._runs[tape.run] = run._replace(offset=tape.offset, lines=tape.count)
            job, job_id, before = run.job, self._jobs[run.job], len(statuses)
            for line in tape.lines:
                run_id, seq, at_us, kind, text = line
                if kind == "status":
                    statuses += (job_id, run_id, seq, at_us, text)
                else:
                    self._events.append(_said(line, job))
            rows = (len(statuses) - before) // len(_STATUS.columns)
            *_, rows_before, dropped_before = progress.get(tape.run, (0, 0))
            counts = (rows_before + rows, dropped_before + tape.dropped)
            progress[tape.run] = (tape.run, tape.offset, tape.count, *counts)
        self._many(_STATUS, statuses)
        self._many(_PROGRESS, list(chain.from_iterable(progress.values())))
        return refused

    def _store_samples(self) -> None:
        values: list[Any] = []
        for s in self._samples:
            job_id = self._job_id(s.job, s.at_us)
            values += (job_id, s.at_us, s.run, s.cpu_percent, s.rss_bytes, s.threads, s.fds)
        self._many(_SAMPLE, values)

    def _store_events(self, events: Iterable[Event]) -> None:
        values: list[Any] = []
        for e in events:
            job_id = None if e.job is None else self._job_id(e.job, e.at_us)
            data = json.dumps(e.data, separators=(",", ":"), default=repr)
            values += (e.id, job_id, e.run, e.at_us, e.kind, e.actor, data)
        self._many(_EVENT, values)

    def _many(self, template: _Template, values: Sequence[Any]) -> None:
        """Run the statement with all the rows, whose values come one after another."""
        width = len(template.columns)
        done, rows = 0, 1 << (_MOST_VALUES // width).bit_length() - 1
        while done < len(values):
            while rows * width > len(values) - done:
                rows //= 2  # few different statements, so that the driver has them prepared
            end = done + rows * width
            self.connection.exec_driver_sql(self._statement(template, rows), tuple(values[done:end]))
            done = end

    def _statement(self, template: _Template, rows: int) -> str:
        if (template, rows) not in self._statements:
            mark = "?" if self.connection.dialect.paramstyle == "qmark" else "%s"
            row = f"({', '.join([mark] * len(template.columns))})"
            text = template.text.format(columns=", ".join(template.columns), rows=", ".join([row] * rows))
            self._statements[template, rows] = text
        return self._statements[template, rows]


class _Run(NamedTuple):
    job: str
    offset: int
    lines: int


class _Template(NamedTuple):
    columns: tuple[str, ...]
    text: str


def _inserting(table: Table, *columns: str) -> _Template:
    """What is stored already, by its key, is not stored again."""
    return _Template(columns, f"INSERT INTO {table.name} ({{columns}}) VALUES {{rows}} ON CONFLICT DO NOTHING")


def _flat(template: _Template, records: Iterable[Any]) -> list[Any]:
    """Return the values of all records, one after another, whose fields are named as the columns."""
    return list(chain.from_iterable(map(attrgetter(*template.columns), records)))


_IN_ONE = (JobRow, RunStarted, Notice)  # all of a batch in one statement each
_JOB_COLUMNS = tuple(field.name for field in fields(JobRow))
_RUN_COLUMNS = tuple(field.name for field in fields(RunStarted) if field.name != "job")
_RUN_FIELDS = attrgetter(*_RUN_COLUMNS)
_JOB = _Template(
    _JOB_COLUMNS,
    "INSERT INTO job ({columns}) VALUES {rows} ON CONFLICT (name) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _JOB_COLUMNS if name != "name"),
)
_RUN = _inserting(schema.run, "job_id", *_RUN_COLUMNS, "journal_done", "status_rows", "thinned")
_NOTICE = _inserting(schema.outbox, *(field.name for field in fields(Notice)))
_STATUS = _inserting(schema.status, "job_id", "run_id", "seq", "at_us", "status")
_EVENT = _inserting(schema.event, "id", "job_id", "run_id", "at_us", "kind", "actor", "data")
_SAMPLE = _inserting(schema.sample, "job_id", "at_us", "run_id", "cpu_percent", "rss_bytes", "threads", "fds")
_PROGRESS = _Template(
    ("run_id", "read", "count", "stored", "dropped"),
    "WITH tape ({columns}) AS (VALUES {rows}) UPDATE run SET journal_offset = read, journal_lines = count, "
    "status_rows = status_rows + stored, thinned = thinned + dropped FROM tape WHERE run.id = tape.run_id",
)


def _said(line: Line, job: str) -> Event:
    """Return the event that stands for a line which is no status."""
    if line.kind == "ack":
        data: dict[str, Any] = {"id": int(line.text)}
    elif line.kind == "gap":
        data = json.loads(line.text)
    else:
        data = {"text": line.text if line.kind == "torn" else json.loads(line.text)}
    return Event(_KINDS[line.kind], line.at_us, job, line.run, data=data)


_KINDS: dict[str, EventKind] = {"ack": "read", "error": "error", "torn": "torn", "gap": "gap"}
