"""What a server that starts makes of what it finds: pure.

A server knows nothing by itself. The database says what was wanted, the keeper what lives and what has ended since, the
config directory what the jobs are. With a keeper that is new, too, nothing lives, and autostart decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from harnessd.server import policy
from harnessd.server.definition import Definition
from harnessd.server.host import EndNote, LiveRun
from harnessd.server.records import JobRow, Loaded, RunStarted
from harnessd.states import ExitReason, State, Want
from harnessd.wire import ExitRecord


@dataclass(frozen=True, slots=True)
class Adopted:
    """A job with its run, live or ended unseen."""

    name: str
    job: policy.Job
    run: LiveRun | ExitRecord
    outdated: bool  # the job was changed since the run began
    missed: policy.Event | None = None  # what was asked of it while it was being forked, and did not reach it
    owed: bool = False  # commands that waited for it to be a process may not have been sent


class Passed(NamedTuple):
    """A run that ended unseen, of which nothing is left to do but to store that, and why it ended."""

    record: ExitRecord
    reason: ExitReason


@dataclass(slots=True)
class Plan:
    """What to do, in this order."""

    lost: list[RunStarted] = field(default_factory=list)  # their keeper died with them
    strays: list[LiveRun] = field(default_factory=list)  # of jobs that no file defines any more, to be ended
    passed: dict[int, Passed] = field(default_factory=dict)  # that changed their jobs already, or have none any more
    adopted: list[Adopted] = field(default_factory=list)
    idle: dict[str, policy.Job] = field(default_factory=dict)  # jobs without a run, as they were
    launch: dict[str, str] = field(default_factory=dict)  # of these, those to start, and why


def plan(
    definitions: Mapping[str, Definition],
    known: Loaded,
    live: Iterable[LiveRun],
    exits: Iterable[ExitRecord],
    *,
    cold: bool,
    now: float,
) -> Plan:
    """Return what to do. `cold`: no server of this keeper has served yet."""
    result = Plan()
    rows = {row.name: row for row in known.jobs}
    digests = {run.id: run.spec_digest for run in known.runs}
    held: set[int] = set()
    with_run: set[str] = set()
    found: list[LiveRun | ExitRecord] = sorted([*live, *exits], key=lambda run: run.run, reverse=True)
    for run in found:
        held.add(run.run)
        definition = definitions.get(run.job)
        if isinstance(run, ExitRecord) and (definition is None or run.run in known.ended or run.job in with_run):
            result.passed[run.run] = Passed(run, _passed_reason(rows.get(run.job), run, stored=run.run in digests))
            continue
        if definition is None:
            assert isinstance(run, LiveRun)
            result.strays.append(run)
            continue
        with_run.add(run.job)
        outdated = digests.get(run.run, definition.digest) != definition.digest
        row, stored = rows.get(run.job), run.run in digests
        job = _job_with_run(row, run, definition, now, stored=stored)
        missed = None if stored or row is None or known.error else _missed(row, run)
        owed = isinstance(run, LiveRun) and not (stored or known.error or missed or run.end_note)
        result.adopted.append(Adopted(run.job, job, run, outdated, missed, owed))
    result.lost = [run for run in known.runs if run.id not in held]
    for name, definition in definitions.items():
        if name in with_run:
            continue
        row = rows.get(name)
        result.idle[name] = _idle_job(row, definition, cold, now)
        if why := _why_to_start(row, definition, cold):
            result.launch[name] = why
    return result


def _job_with_run(
    row: JobRow | None, run: LiveRun | ExitRecord, definition: Definition, now: float, *, stored: bool
) -> policy.Job:
    """Return the job as it is. The row may be of the run before, if this one is not `stored`."""
    since = now - run.mono_s if isinstance(run, ExitRecord) else now - run.uptime_s()
    note = EndNote.of(run)
    want = Want.UP  # it runs, so it was wanted, whatever was not stored any more when the last server died
    life: policy.Life = policy.Running(since)
    if note:
        want = note.want
        life = policy.Stopping(since, note.reason, forced=True)
    elif row is None:  # the database was lost
        pass
    elif row.state == State.STOPPING and (stored or (isinstance(run, ExitRecord) and _is_newer(row, run))):
        want = Want(row.want)
        life = policy.Stopping(since, ExitReason.STOPPED, forced=not definition.rules.messages)
    elif stored and row.state == State.PAUSED:
        life = policy.Paused(since)
    elif not row.ever_up and now - since < definition.rules.start_seconds:
        life = policy.Starting(since)
    if row is None:
        return policy.Job(want, life, proven=True)
    return policy.Job(want, life, row.failures, row.restarts, row.ever_up)


def _passed_reason(row: JobRow | None, run: ExitRecord, *, stored: bool) -> ExitReason:
    """Return why the run ended: by force, if the last that is stored of the job is that it was to end."""
    if row and row.state == State.STOPPING and (stored or _is_newer(row, run)) and not run.end_note:
        return ExitReason.STOPPED
    return unseen_reason(run)


def unseen_reason(run: ExitRecord) -> ExitReason:
    """Return why the run ended, by what its host tells alone."""
    note = EndNote.of(run)
    return note.reason if note else policy.reason(policy.Job(), policy.Ended(run.code, run.signal, oom=run.oom))


def _missed(row: JobRow, run: LiveRun | ExitRecord) -> policy.Event | None:
    """Return the verb that the row tells of, if it came when the run had its number and was not told of yet."""
    if isinstance(run, ExitRecord) or run.end_note or not _is_newer(row, run):
        return None
    if row.state == State.STOPPING:
        return policy.StopAsked() if row.want == Want.DOWN else policy.RestartAsked()
    return policy.PauseAsked() if row.state == State.PAUSED else None


def _is_newer(row: JobRow, run: LiveRun | ExitRecord) -> bool:
    """Return whether the job has changed since the run was asked for: a run's number is its time in milliseconds."""
    return row.changed_us // 1000 > run.run


def _idle_job(row: JobRow | None, definition: Definition, cold: bool, now: float) -> policy.Job:
    if row is None:
        return policy.Job()
    proven = row.ever_up and row.digest == definition.digest
    if cold:
        return policy.Job(restarts=row.restarts, proven=proven)
    life: policy.Life = policy.Stopped()
    if row.state == State.BACKOFF:
        life = policy.Backoff(now + policy.delay_s(max(1, row.failures), 0.0, definition.rules))
    elif row.state == State.FAILED:
        life = policy.Failed()
    elif row.state == State.EXITED:
        life = policy.Exited()
    return policy.Job(Want(row.want), life, row.failures, row.restarts, proven)


def _why_to_start(row: JobRow | None, definition: Definition, cold: bool) -> str:
    """A warm start goes on where the last server was, which may have died between deciding to start and starting."""
    if cold or row is None:
        return _STARTED[cold] if definition.autostart else ""
    if row.removed_us is not None:
        return "its file was added" if definition.autostart else ""
    return _STARTED[cold] if row.want == Want.UP and row.state in policy.LIVE else ""


_STARTED = {True: "the daemon has started", False: "the server was restarted"}
