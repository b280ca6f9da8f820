"""What there is to compare: the facts that jobs, clients and driver noted, and what harnessd has kept."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from chaos.witness import now

Fact = dict[str, Any]
_RUN = re.compile(r"run (\d+)$")
SERVER_ENDS = ("server-kill", "fork-cut", "keeper-kill", "down")
_BECOMES_S = 3.0
_STORAGE = ("disk-full", "database-lock", "server-stop", "descriptors-out")
SETTLE_S = 8.0  # after its end a fault may still be felt: the longest wait until the database is tried again, and more


@dataclass(frozen=True, slots=True)
class Run:
    """A run as harnessd has it. Times are the boot clock's."""

    id: int
    job: str
    pid: int
    mark: int
    asked: float  # its number is the time at which it was
    started: float
    ended: float | None
    code: int | None
    signal: int | None
    reason: str | None
    journal_done: bool


@dataclass(frozen=True, slots=True)
class Event:
    id: int
    job: str | None
    run: int | None
    at: float
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    kind: str
    since: float
    until: float


@dataclass
class Story:
    """Read when the daemon has ended."""

    facts_folder: Path
    database: Path
    log: Path
    wall_offset: float = field(default_factory=lambda: time.time() - now())

    def facts(self, name: str) -> list[Fact]:
        """Return what a job, the driver or a client has noted, by its time."""
        path = self.facts_folder / f"{name}.facts"
        if not path.exists():
            return []
        with open(path) as file:
            return sorted(map(json.loads, file), key=lambda fact: fact["t"])

    @cached_property
    def jobs(self) -> list[str]:
        return [name for (name,) in self.rows("SELECT name FROM job ORDER BY name")]

    @cached_property
    def answers(self) -> list[Fact]:
        return [fact for path in self.facts_folder.glob("client-*.facts") for fact in self.facts(path.stem)]

    @cached_property
    def driver(self) -> list[Fact]:
        return self.facts("driver")

    # harnessd

    def damage(self) -> list[str]:
        """Return what SQLite finds wrong with the database; nothing if it is whole."""
        try:
            found = [str(row[0]) for row in self.rows("PRAGMA integrity_check(20)")]
        except sqlite3.DatabaseError as error:
            return [str(error)]
        return [] if found == ["ok"] else found

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.database)) as db:
            return db.execute(query, values).fetchall()

    @cached_property
    def runs(self) -> dict[int, Run]:
        query = (
            "SELECT run.id, name, pid, mark, started_us, ended_us, exit_code, signal, reason, journal_done "
            "FROM run JOIN job ON job.id = job_id ORDER BY run.id"
        )
        rows = self.rows(query)
        found = {}
        for row in rows:
            times = (self._boot(row[0] * 1000), self._boot(row[4]), row[5] and self._boot(row[5]))
            found[row[0]] = Run(*row[:4], *times, *row[6:])
        return found

    @cached_property
    def events(self) -> list[Event]:
        query = (
            "SELECT event.id, name, run_id, at_us, kind, data FROM event LEFT JOIN job ON job.id = job_id "
            "ORDER BY event.id"
        )
        return [Event(*row[:3], self._boot(row[3]), row[4], json.loads(row[5])) for row in self.rows(query)]

    def events_of(self, job: str) -> list[Event]:
        """Return the events of the job and the starts of servers, in their order."""
        return self._events_by_job[job]

    @cached_property
    def _events_by_job(self) -> dict[str, list[Event]]:
        found: dict[str, list[Event]] = {name: [] for name in self.jobs}
        for event in self.events:
            if event.kind == "server-start":
                for events in found.values():
                    events.append(event)
            elif event.job:
                found[event.job].append(event)
        return found

    def statuses(self, job: str) -> Iterator[tuple[int, Any]]:
        """Yield run and status, in the order of their numbers."""
        query = (
            "SELECT run_id, status FROM status JOIN job ON job.id = status.job_id WHERE name = ? ORDER BY run_id, seq"
        )
        for run, status in self.rows(query, job):
            yield run, json.loads(status)

    def _boot(self, at_us: int) -> float:
        return at_us / 1e6 - self.wall_offset

    # faults

    @cached_property
    def spans(self) -> list[Span]:
        """Return what was wrong from when to when; the keeper was down until a server served again."""
        healed = {fact["number"]: fact["t"] for fact in self.driver if fact["f"] == "healed"}
        serving = sorted(fact["t"] for fact in self.driver if fact["f"] == "serving")
        found = []
        for fact in self.driver:
            if fact["f"] == "fault":
                until = healed.get(fact["number"], fact["t"]) if fact["lasts"] else fact["t"]
                found.append(Span(fact["kind"], fact["since"], until))
            if fact["f"] in ("daemon-started", "daemon-ended") or fact.get("kind") == "keeper-kill":
                later = serving[bisect_right(serving, fact["t"]) :]
                found.append(Span("down", fact.get("since", fact["t"]), later[0] if later else float("inf")))
        return found

    def was(self, kinds: Iterable[str], since: float, until: float, after_s: float = 0.0) -> bool:
        """Return whether one of these faults was on between the times, or had ended up to `after_s` before."""
        spans = (span for kind in kinds for span in self._spans_by_kind.get(kind, ()))
        return any(span.since <= until and span.until + after_s >= since for span in spans)

    @cached_property
    def _spans_by_kind(self) -> dict[str, list[Span]]:
        found: dict[str, list[Span]] = {}
        for span in self.spans:
            found.setdefault(span.kind, []).append(span)
        return found

    def server_died(self, since: float, until: float) -> bool:
        """Return whether a server ended in that time, or was replaced."""
        return self.was(SERVER_ENDS, since, until) or any(since <= at <= until for at in self._server_starts)

    @cached_property
    def _server_starts(self) -> list[float]:
        return [event.at for event in self.events if event.kind == "server-start"]

    def storage_failed(self, since: float, until: float) -> bool:
        """Return whether what happened then may not have been stored at once."""
        return self.was(_STORAGE, since, until, after_s=SETTLE_S)

    def stored_by(self, at: float) -> float:
        """Return when what happened then must be stored: soon after the last of faults one upon the other."""
        for span in sorted(self.spans, key=lambda span: span.since):
            if span.kind in _STORAGE and span.since <= at <= span.until + SETTLE_S:
                at = span.until + SETTLE_S
        return at

    @cached_property
    def hits(self) -> dict[int, list[float]]:
        """Return when processes of each run were signalled by the driver."""
        return self._hits("")

    @cached_property
    def kills(self) -> dict[int, list[float]]:
        """Return when processes of each run were killed by the driver."""
        return self._hits("SIGKILL")

    def _hits(self, signal: str) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for fact in self.driver:
            if fact["f"] != "fault" or not fact["what"].startswith(signal):
                continue
            if run := _RUN.search(fact["what"]):
                found.setdefault(int(run[1]), []).append(fact["t"])
            elif fact["kind"].startswith("spare"):  # it may have been about to become a run
                pid = int(fact["what"].split()[2])
                for one in self.runs.values():
                    if one.pid == pid and abs(one.started - fact["t"]) < _BECOMES_S:
                        found.setdefault(one.id, []).append(fact["t"])
        return found
