"""Many jobs, and many starts, under one daemon."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import httpx
import pytest
from helpers.daemon import Daemon, children
from helpers.waiting import until

# All of a host's room is not there for tests: HARNESSD_TEST_JOBS=1000 runs the whole thousand.
JOBS = int(os.environ.get("HARNESSD_TEST_JOBS", "200"))
STARTS = int(os.environ.get("HARNESSD_TEST_STARTS", "1000"))


def _resources(daemon: Daemon) -> dict[str, int]:
    """Return what the daemon's two processes hold, by a name for each."""
    found = {}
    for name, pid in (("keeper", daemon.keeper_pid), ("server", daemon.server_pid())):
        found[f"{name} fds"] = len(os.listdir(f"/proc/{pid}/fd"))
        found[f"{name} threads"] = len(os.listdir(f"/proc/{pid}/task"))
    return found


def _hb_ms(client: httpx.Client, count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.monotonic()
        assert client.get("/jobs/healthy/hb").status_code == 200
        times.append((time.monotonic() - began) * 1000)
    return times


@pytest.mark.timeout(300)
def test_jobs_that_crash_in_a_loop_disturb_no_other_and_leave_nothing(daemon: Daemon) -> None:
    """Fifty of them; the daemon is looked at before and after a thousand starts and stops."""
    backoff: dict[str, Any] = {"first_s": 0.2, "factor": 1, "max_s": 0.2, "jitter": 0.5}
    crashing = [f"crashes-{index}" for index in range(50)]
    for name in crashing:
        daemon.job(name, "Ends", args=["1", "0"], start_seconds=3600, max_failures=1_000_000, backoff=backoff)
    daemon.job("healthy", "Idle")
    daemon.start()
    pid = daemon.wait_state("healthy", "running")["pid"]

    def restarts() -> int:
        return sum(job["restarts"] for job in daemon.jobs().values())

    daemon.wait_for(lambda: restarts() >= 100, "they crash in a loop")
    before, begun = _resources(daemon), restarts()
    quick = statistics.median(_hb_ms(daemon.kept, 50))
    assert quick < 1000  # some milliseconds; a loop that is held up takes seconds
    daemon.wait_for(lambda: restarts() >= begun + STARTS, "a thousand starts")
    daemon.wait_for(lambda: daemon.jobs(state="backoff"), "backoff is seen")
    for name in ("backoff", "starting"):
        assert {job["want"] for job in daemon.jobs(state=name).values()} <= {"up"}
    assert daemon.hb("healthy")["pid"] == pid
    results = daemon.get("/jobs/all/stop").json()["results"]
    assert {result["status_code"] for result in results} == {202}
    daemon.wait_all("stopped", crashing)
    until(lambda: "Z" not in children(daemon.keeper_pid).values(), "there are no zombies")
    daemon.wait_for(
        lambda: all(now <= before[name] + 2 for name, now in _resources(daemon).items()), f"no more than {before}"
    )
    waits = [
        (after - ended) / 1e6
        for (ended, after) in daemon.rows(
            "SELECT ended_us, lead(started_us) OVER (PARTITION BY job_id ORDER BY id) FROM run"
        )
        if ended and after
    ]
    assert min(waits) > 0.09  # 0.2 s, half of it more or less at random
    assert statistics.pstdev(waits) > 0.01


@pytest.mark.timeout(300)
def test_a_thousand_jobs_are_registered_started_listed_and_stopped(daemon: Daemon) -> None:
    """As many as HARNESSD_TEST_JOBS says."""
    for index in range(JOBS):
        daemon.job(f"job-{index:04}", "Idle", tags=["even" if index % 2 == 0 else "odd"], log={"max_bytes": 4096})
    daemon.start()
    jobs = daemon.wait_all("running")
    assert len(jobs) == JOBS
    assert len({job["pid"] for job in jobs.values()}) == JOBS
    assert len(daemon.jobs(tag="even")) == JOBS // 2
    answer = daemon.get("/jobs/all/stop", tag="odd", wait=30)
    assert answer.status_code == 207
    assert {result["status_code"] for result in answer.json()["results"]} == {200}
    odd = [name for index, name in enumerate(sorted(jobs)) if index % 2]
    stopped = daemon.wait_all("stopped", odd)
    assert {job["last_exit"]["code"] for job in stopped.values()} == {0}
    old = daemon.kill_server()
    daemon.wait_new_server(old)
    after = daemon.jobs()
    assert {name: job["pid"] for name, job in after.items() if job["pid"]} == {
        name: job["pid"] for name, job in jobs.items() if name not in odd
    }
    assert daemon.stop() == 0
    assert daemon.rows("SELECT count(*) FROM run WHERE ended_us IS NULL") == [(0,)]
