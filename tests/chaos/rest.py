"""When all faults are healed: every job can be brought up and down, and HTTP tells what the database has."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import Any

from chaos.daemon_oracle import IDLE_FDS, left_behind
from chaos.fleet import may_rest, specs
from chaos.ground import Ground, answer, until
from chaos.oracle import Verdict
from chaos.processes import Table
from chaos.witness import now

_DEADLINE_S = 40.0
_IDLE_S = 1.5
_LIVE = ("starting", "running", "paused", "stopping")
_UP = (*_LIVE, "backoff")


def _has_ended(job: dict[str, Any], since: datetime) -> bool:
    return bool(job["last_exit"]) and datetime.fromisoformat(job["last_exit"]["at"]) > since


def _how(job: dict[str, Any]) -> str:
    return str((job["last_exit"] or {}).get("reason"))


class Rest:
    """Brings the daemon to rest and judges how it gets there."""

    def __init__(self, ground: Ground, table: Table, verdict: Verdict) -> None:
        self._ground = ground
        self._table = table
        self._verdict = verdict

    def come(self) -> None:
        """Leave nothing of the daemon running."""
        if not until(self._is_sound, _DEADLINE_S):
            self._verdict.wrong(f"the daemon does not recover: {self._ask('/healthz')}")
            return
        if refused := self._ask("/reload", "POST").get("refused"):
            self._verdict.wrong(f"a mended configuration is refused: {refused}")
        self._all_are_as_wanted()
        self._all_come_up()
        self._all_go_down()
        self._compare()
        self._ask("/jobs/all/start", "POST")
        self._stop()

    def _is_sound(self) -> bool:
        health = self._ask("/healthz")
        stored = health.get("storage", {})
        return bool(stored.get("ok") and not stored["queue"] and not stored["lines_waiting"])

    def _all_are_as_wanted(self) -> None:
        """What is to be up lives or is started again, unless its own rules leave it as it has ended."""
        rules = specs()

        def astray() -> list[dict[str, Any]]:
            down = [job for job in self._jobs().values() if job["want"] == "up" and job["state"] not in _UP]
            return [job for job in down if not may_rest(rules[job["name"]], job["state"], _how(job))]

        if not until(lambda: not astray(), _DEADLINE_S):
            self._verdict.wrong(f"jobs that are to be up are not: {astray()}")

    def _all_come_up(self) -> None:
        """A run that was started since, or one that lives or has lived since, shows that a job is not stuck."""
        since, wall = now(), datetime.now(UTC)
        self._ask("/jobs/all/start", "POST")

        def missing() -> list[str]:
            names = [name for name, job in self._jobs().items() if not job["pid"] and not _has_ended(job, wall)]
            return [name for name in names if not self._has_started(name, since)]

        if not until(lambda: len(self._jobs()) == len(self._ground.fleet.names) and not missing(), _DEADLINE_S):
            stuck = {name: job for name, job in self._jobs().items() if name in missing()}
            self._verdict.wrong(f"jobs do not come up: {stuck or sorted(self._jobs())}")

    def _has_started(self, name: str, since: float) -> bool:
        path = self._ground.facts / f"{name}.facts"
        if not path.exists():
            return False
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            facts = [json.loads(line) for line in file.read().splitlines()[1:]]
        return any(fact["f"] == "start" and fact["t"] > since for fact in facts)

    def _all_go_down(self) -> None:
        self._ask("/jobs/all/kill?grace=0.3", "POST")
        if not until(lambda: not any(job["state"] in _UP for job in self._jobs().values()), _DEADLINE_S):
            self._verdict.wrong(f"killed jobs are up: {[job for job in self._jobs().values() if job['pid']]}")
        if not until(lambda: not self._table.by_job(), 5):
            self._verdict.wrong(f"processes of killed jobs are left: {self._table.by_job()}")

    # HTTP and SQL

    def _compare(self) -> None:
        self._note_idle()
        until(self._is_sound, _DEADLINE_S)
        with closing(sqlite3.connect(f"file:{self._ground.database}?mode=ro", uri=True, timeout=10)) as db:
            for name in self._ground.fleet.names:
                for what, told, stored in self._both(db, name):
                    self._verdict.looked_at["comparisons of HTTP with SQL"] += 1
                    if told != stored:
                        self._verdict.wrong(f"HTTP and SQL differ: {what} of {name}: {told} and {stored}")

    def _both(self, db: sqlite3.Connection, name: str) -> Iterator[tuple[str, Any, Any]]:
        ((job, state),) = db.execute("SELECT id, state FROM job WHERE name = ?", (name,)).fetchall()
        yield "state", self._jobs()[name]["state"], state
        query = "SELECT id, exit_code, reason FROM run WHERE job_id = ? ORDER BY id DESC"
        runs = db.execute(query, (job,)).fetchall()
        told = self._lines(f"/jobs/{name}/runs?format=ndjson")
        yield "runs", [(run["run"], run["exit_code"], run["reason"]) for run in told][:5000], runs[:5000]
        query = "SELECT run_id, seq FROM status WHERE job_id = ? AND run_id = ? ORDER BY seq DESC LIMIT 1000"
        for run in [row[0] for row in runs[:20]]:
            last = db.execute(query, (job, run)).fetchall()
            page = self._ask(f"/jobs/{name}/history?run={run}&limit=1000").get("rows", [])
            yield f"statuses of run {run}", sorted(row["seq"] for row in page), sorted(seq for _, seq in last)
        newest = "SELECT run_id, max(seq) FROM status WHERE job_id = ? AND run_id = (SELECT max(run_id) FROM status "
        found = db.execute(f"{newest} WHERE job_id = ?)", (job, job)).fetchone()
        status = self._ask(f"/jobs/{name}/status")
        yield "last status", (status.get("run"), status.get("seq")), found
        end = self._ask(f"/jobs/{name}/hb").get("last_exit") or {}
        was_process = not end or end["code"] is not None or end["signal"] or end["reason"] == "lost"
        if was_process:  # or there is no row of it
            yield "last exit", (end.get("run"), end.get("code"), end.get("reason")), runs[0] if runs else (None,) * 3

    def _note_idle(self) -> None:
        server = self._table.server()
        for role, pid in (("keeper", self._ground.init.pid), ("server", server.pid if server else None)):
            with suppress(OSError):  # connections that were kept open end, and files of ended runs are closed
                until(lambda pid=pid, most=IDLE_FDS[role]: _descriptors(pid) <= most, _IDLE_S)
                fds = _descriptors(pid)
                self._ground.driver.note("idle", role=role, pid=pid, fds=fds)
                self._verdict.notes.append(f"{role} with no run: {fds} descriptors")

    # the end

    def _stop(self) -> None:
        until(lambda: any(job["pid"] for job in self._jobs().values()), 5)
        code = self._ground.init.stop(_DEADLINE_S)
        if code != 0:
            self._verdict.wrong(f"the daemon ended with {code}")
        gone = until(lambda: not left_behind(str(self._ground.facts), self._ground.brand.members()), 5)
        if not gone:
            left = left_behind(str(self._ground.facts), self._ground.brand.members())
            self._verdict.wrong(f"processes are left at the end: {left}")

    def _jobs(self) -> dict[str, dict[str, Any]]:
        return {job["name"]: job for job in self._ask("/jobs").get("jobs", [])}

    def _ask(self, path: str, method: str = "GET") -> dict[str, Any]:
        lines = self._lines(path, method)
        return lines[0] if lines else {}

    def _lines(self, path: str, method: str = "GET") -> list[dict[str, Any]]:
        with suppress(OSError):
            return [json.loads(line) for line in answer(self._ground.port, method, path, _DEADLINE_S)[1].splitlines()]
        return []


def _descriptors(pid: int | None) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
