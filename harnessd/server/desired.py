"""What was wanted of the jobs, read before SQLAlchemy is imported: the runs are asked for while it loads."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from harnessd.errors import NewerSchema
from harnessd.server.records import JobRow, Loaded, RunStarted

BUSY_MS = 1000  # a database locked for longer counts as failing
HEAD = "0002"  # the revision of this code's tables

Execute = Callable[[str], Iterable[Sequence[Any]]]

_JOB = [field.name for field in fields(JobRow)]
_RUN = [field.name for field in fields(RunStarted)]
_JOBS = f"SELECT {', '.join(_JOB)} FROM job ORDER BY name"
_RUNS = (
    f"SELECT ended_us, {', '.join('job.name' if name == 'job' else f'run.{name}' for name in _RUN)} "
    "FROM run JOIN job ON job.id = run.job_id WHERE NOT run.journal_done ORDER BY run.id"
)

_ENDED = "SELECT id FROM run WHERE ended_us IS NOT NULL ORDER BY id DESC LIMIT 10000"  # far more than wait for an ack


def load_fast(path: str | os.PathLike[str]) -> Loaded:
    """Return what the SQLite database says; `error` is set, and all else empty, when it cannot be read."""
    if not os.path.exists(path):
        return Loaded()
    where = Path(path)
    try:
        return _load(where, "mode=rw")
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return Loaded()  # just made, nothing in it
        return _load_unwritable(where, error)
    except sqlite3.Error as error:
        return Loaded(error=str(error))


def read(execute: Execute) -> Loaded:
    """Return what the database behind `execute` says."""
    rows = [(row[0], RunStarted(*row[1:])) for row in execute(_RUNS)]
    return Loaded(
        jobs=tuple(_job(row) for row in execute(_JOBS)),
        runs=tuple(run for ended, run in rows if ended is None),
        unread=tuple(run for ended, run in rows if ended is not None),
        ended=frozenset(row[0] for row in execute(_ENDED)),
        last_run=_one(execute("SELECT max(id) FROM run")),
        last_event=_one(execute("SELECT max(id) FROM event")),
    )


def _load_unwritable(path: Path, cause: sqlite3.Error) -> Loaded:
    """Read where there is no room for the WAL's index: a full disk, or a filesystem that is read-only.

    What is in the WAL is read as well, or what had ended would be taken for live; if that cannot be, only what was
    wanted of the jobs counts, and the error stands.
    """
    with suppress(sqlite3.Error):
        return _load(path, "mode=rw", "PRAGMA locking_mode = exclusive")  # the index is in memory then
    try:
        found = _load(path, "immutable=1")  # without the WAL
    except sqlite3.Error:
        return Loaded(error=str(cause))
    wal = path.with_name(f"{path.name}-wal")
    if not wal.exists() or not wal.stat().st_size:
        return found
    jobs = (replace(job, overrides="{}", restarts=0) for job in found.jobs)  # later these are merged, and added up
    return Loaded(jobs=tuple(jobs), error=str(cause))


def _load(path: Path, how: str, *pragmas: str) -> Loaded:
    uri = f"{path.absolute().as_uri()}?{how}"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_MS / 1000, isolation_level=None)) as connection:
        for pragma in pragmas:
            connection.execute(pragma)
        connection.execute("BEGIN")
        refuse_newer(connection.execute("SELECT max(version_num) FROM alembic_version").fetchone()[0])
        return read(connection.execute)


def refuse_newer(version: str | None) -> None:
    """Raise NewerSchema for the revision of a later harnessd, of whose tables this one knows nothing."""
    if version is not None and version > HEAD:
        raise NewerSchema(
            f"cannot use the database: its schema {version} is newer than this harnessd knows ({HEAD}); "
            "run the later harnessd, or restore a backup"
        )


def _job(row: Sequence[Any]) -> JobRow:
    job = dict(zip(_JOB, row, strict=True))
    return JobRow(**{**job, "ever_up": bool(job["ever_up"])})


def _one(rows: Iterable[Sequence[Any]]) -> int:
    return next(iter(rows))[0] or 0
