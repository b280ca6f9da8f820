"""What a new server recalls from the database of what it does not hear from the keeper: the last words of each job."""

from __future__ import annotations

import json
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, text

from harnessd.server.entry import Exit, Queued, Recalled
from harnessd.server.tape import Line
from harnessd.states import Command, ExitReason

_MOST_COMMANDS = 4000  # of a job: more than a mailbox and an outbox hold, as a run reads them in their order
_STATUSES = """
SELECT job.name, status.run_id, status.seq, status.at_us, status.status
FROM job JOIN status ON status.id = (
    SELECT s.id FROM status s WHERE s.run_id = (
        SELECT max(run.id) FROM run WHERE run.job_id = job.id AND run.status_rows > 0
    ) ORDER BY s.seq DESC LIMIT 1
) WHERE job.removed_us IS NULL
"""
_EXITS = """
SELECT job.name, run.id, run.exit_code, run.signal, run.reason, run.ended_us, (
    SELECT e.data FROM event e WHERE e.run_id = run.id AND e.kind = 'error' ORDER BY e.at_us DESC LIMIT 1
)
FROM job JOIN run ON run.id = (
    SELECT max(r.id) FROM run r WHERE r.job_id = job.id AND r.ended_us IS NOT NULL
) WHERE job.removed_us IS NULL
"""
_COMMANDS = f"""
SELECT event.id, job.name, event.run_id, event.kind, event.data FROM job JOIN event ON event.id IN (
    SELECT e.id FROM event e WHERE e.job_id = job.id AND e.kind = :kind AND e.at_us >= :since_us
    ORDER BY e.at_us DESC LIMIT {_MOST_COMMANDS}
)
"""


def recall(connection: Connection, since_us: int) -> Recalled:
    """Return the last status and exit of each job, and the commands queued since then that were not read."""
    found = Recalled()
    for name, run, seq, at_us, status in connection.execute(text(_STATUSES)):
        found.statuses[name] = Line(run, seq, at_us, "status", status)
    for name, run, code, signal, reason, ended_us, error in connection.execute(text(_EXITS)):
        why = str(json.loads(error)["text"]) if error else None
        found.exits[name] = Exit(run, code, signal, ExitReason(reason), ended_us / 1e6, why)
    told = [
        row
        for kind in ("command", "read", "unread")
        for row in connection.execute(text(_COMMANDS), {"kind": kind, "since_us": since_us})
    ]
    for _, name, run, kind, data in sorted(told, key=itemgetter(0)):
        _note(found.unread.setdefault(name, {}), run, kind, json.loads(data))
    return found


def _note(unread: dict[int, Queued], run: int | None, kind: str, data: dict[str, Any]) -> None:
    number = int(data["id"])
    if kind != "command":
        unread.pop(number, None)
    elif data["queued"]:
        unread[number] = Queued(Command(data["verb"].upper()), data["data"], run)
