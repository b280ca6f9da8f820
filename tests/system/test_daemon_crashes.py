"""What becomes of the jobs when a process of the daemon dies, or the clock or a pid is not what it was."""

from __future__ import annotations

import calendar
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from helpers.brand import is_alive
from helpers.daemon import Daemon, children, ended, pids_of, spares
from helpers.waiting import DEADLINE_S, until

from harnessd import tree

KILLS = int(os.environ.get("HARNESSD_TEST_KILLS", "20"))

# A server that dies again and again is waited for longer and longer; here each one counts as the first.
_QUICK = (
    sys.executable,
    "-c",
    (
        "import sys; from harnessd.keeper import respawn; respawn._STEADY_S = 0; respawn.MAX_DELAY_S = 0.1;"
        "from harnessd.root import serve; sys.exit(serve(sys.argv[1:]))"
    ),
)


class Poller:
    """A client that asks again and again, each time over a new connection."""

    def __init__(self, daemon: Daemon) -> None:
        self.answers = 0
        self.refused: list[str] = []
        self._url = f"{daemon.url}/jobs"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> Poller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(DEADLINE_S)

    def _poll(self) -> None:
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(limits=limits, timeout=DEADLINE_S, trust_env=False, verify=False) as client:
            while not self._done.is_set():
                try:
                    client.get(self._url).raise_for_status()
                    self.answers += 1
                except httpx.ConnectError as error:
                    self.refused.append(repr(error))
                except (httpx.ReadError, httpx.RemoteProtocolError):
                    pass  # the server died while it answered
                time.sleep(0.002)


@pytest.mark.timeout(240)
def test_the_server_killed_again_and_again_loses_no_job_no_connection_no_exit_and_no_config(
    daemon: Daemon, tmp_path: Path
) -> None:
    steady = [f"steady-{index}" for index in range(12)]
    brief = [f"brief-{index}" for index in range(8)]
    for name in steady:
        daemon.job(name, "Idle", config={"a": 0, "b": 0})
    for index, name in enumerate(brief):
        backoff = {"first_s": 0.05, "max_s": 0.3}
        args = [f"{tmp_path}/{name}", str(0.05 + index / 10)]
        daemon.job(name, "Notes", args=args, restart="always", backoff=backoff, start_seconds=0.01)
    daemon.start(_QUICK)
    pids = pids_of(daemon.wait_all("running", steady))
    for index, name in enumerate(steady):
        assert daemon.post(f"/jobs/{name}/config", {"a": index}, wait=30).status_code == 200
    chance = random.Random(1)
    with Poller(daemon) as poller:
        for _ in range(KILLS):
            time.sleep(chance.random() * 0.3)
            daemon.wait_new_server(daemon.wait_for(daemon.kill_server, "a server serves"))
            assert {name: job["pid"] for name, job in daemon.jobs().items() if name in pids} == pids
    assert poller.refused == []
    assert poller.answers > 0
    assert daemon.health()["server_starts"] == KILLS + 1
    for index, name in enumerate(steady):
        daemon.wait_status(name, pid=pids[name], config={"a": index, "b": 0})
        assert daemon.get(f"/jobs/{name}/config").json()["effective"] == {"a": index, "b": 0}
        assert daemon.jobs()[name]["restarts"] == 0
    daemon.get("/jobs/all/kill")
    assert daemon.stop() == 0
    for name in brief:
        noted = [int(line) for line in (tmp_path / name).read_text().split()]
        query = "SELECT pid, exit_code, reason FROM run JOIN job ON job.id = run.job_id WHERE name = ?"
        rows = daemon.rows(f"{query} AND signal IS NULL ORDER BY run.id", name)
        assert len(noted) > 3
        recorded = Counter(pid for pid, _, _ in rows)
        if recorded != Counter(noted):  # the kill at the end may have come between the last one's note and its exit
            (last,) = (Counter(noted) - recorded).elements()
            assert last == noted[-1]
            assert daemon.rows("SELECT reason FROM run WHERE pid = ? AND signal > 0", last) == [("killed",)]
            recorded[noted.pop()] += 1
            assert recorded == Counter([*noted, last])
        assert {code for _, code, _ in rows} == {pid % 100 + 1 for pid in noted}
        assert {reason for _, _, reason in rows} <= {"crashed", "killed"}  # the last may end just as it is killed


def test_commands_that_were_not_read_are_read_after_the_server_died(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    daemon.start()
    pid = daemon.wait_state("idle", "running")["pid"]
    os.kill(pid, signal.SIGSTOP)
    for number in range(3):
        assert daemon.post("/jobs/idle/config", {"n": number}).status_code == 202
    daemon.wait_new_server(daemon.kill_server())
    assert daemon.hb("idle")["mailbox"]["waiting"] == 3
    os.kill(pid, signal.SIGCONT)
    daemon.wait_status("idle", pid=pid, config={"n": 2})
    daemon.wait_for(lambda: daemon.hb("idle")["mailbox"]["waiting"] == 0, "all are read")


def test_commands_for_a_run_that_was_being_forked_when_the_server_died_reach_it_once(daemon: Daemon) -> None:
    daemon.job("idle", "Idle", autostart=False)
    daemon.start()
    server = daemon.server_pid()
    os.kill(daemon.keeper_pid, signal.SIGSTOP)
    try:
        verbs = (("start", None), ("pause", None), ("config", {"n": 7}))
        sent = [daemon.post(f"/jobs/idle/{verb}", data) for verb, data in verbs]
        assert all(answer.status_code == 202 and answer.json()["queued"] for answer in sent)
        os.kill(server, signal.SIGKILL)
    finally:
        os.kill(daemon.keeper_pid, signal.SIGCONT)
    daemon.wait_new_server(server)
    daemon.wait_status("idle", told=["START", "PAUSE", "CONFIG"])
    assert daemon.status("idle")["config"]["n"] == 7
    daemon.wait_new_server(daemon.kill_server())
    daemon.post("/jobs/idle/resume")
    daemon.wait_status("idle", told=["START", "PAUSE", "CONFIG", "RESUME"])
    read = [number for (number,) in daemon.rows("SELECT data ->> 'id' FROM event WHERE kind = 'read' ORDER BY id")]
    assert read[:3] == [answer.json()["id"] for answer in sent]


def test_what_the_run_before_has_read_is_not_sent_again_when_that_was_never_stored(
    daemon: Daemon, tmp_path: Path
) -> None:
    daemon.job("late", "Late", args=[f"{tmp_path}/go"], autostart=False)
    daemon.start()
    assert daemon.post("/jobs/late/start").status_code == 202
    pid = daemon.wait_state("late", "starting", "running")["pid"]
    with closing(sqlite3.connect(daemon.state / "harnessd.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        (tmp_path / "go").touch()
        daemon.wait_status("late", pid=pid, told=["START"])
        os.kill(pid, signal.SIGKILL)
        daemon.wait_for(lambda: daemon.status("late")["pid"] != pid, "the next run")
        server = daemon.kill_server()
        other.execute("ROLLBACK")
    daemon.wait_new_server(server)
    assert daemon.post("/jobs/late/pause", wait=30).status_code == 200
    daemon.wait_status("late", told=["PAUSE"])


def test_states_and_wants_survive_the_server(daemon: Daemon) -> None:
    for name in ("runs", "paused", "stopped", "killed", "stopping"):
        daemon.job(name, "Deaf" if name == "stopping" else "Idle")
    daemon.job("frozen", ["sleep", "3600"])
    daemon.job("exited", "Ends", args=["0", "0.2"])
    daemon.job("failed", "Ends", args=["1", "0"], max_failures=1, start_seconds=60)
    daemon.job("backoff", "Ends", args=["1", "0"], backoff={"first_s": 3600, "max_s": 3600}, start_seconds=60)
    daemon.start()
    daemon.wait_all("running", ["runs", "paused", "stopped", "killed", "stopping", "frozen"])
    assert daemon.get("/jobs/paused/pause", wait=30).status_code == 200
    assert daemon.get("/jobs/frozen/pause").status_code == 202
    daemon.get("/jobs/stopped/stop", wait=30)
    daemon.get("/jobs/killed/kill")
    daemon.get("/jobs/stopping/stop")
    expected = {
        "runs": ("running", "up"),
        "paused": ("paused", "up"),
        "frozen": ("paused", "up"),
        "stopped": ("stopped", "down"),
        "killed": ("stopped", "down"),
        "stopping": ("stopping", "down"),
        "exited": ("exited", "up"),
        "failed": ("failed", "up"),
        "backoff": ("backoff", "up"),
    }

    def states() -> dict[str, tuple[str, str]]:
        return {name: (job["state"], job["want"]) for name, job in daemon.jobs().items()}

    daemon.wait_for(lambda: states() == expected, "all are in their states")
    before = daemon.jobs()
    daemon.wait_new_server(daemon.kill_server())
    assert states() == expected
    after = daemon.jobs()
    assert pids_of(after) == pids_of(before)
    assert {name: job["last_exit"] for name, job in after.items()} == {
        name: job["last_exit"] and job["last_exit"] | {"error": None} for name, job in before.items()
    }
    daemon.get("/jobs/frozen/resume")
    daemon.get("/jobs/paused/resume", wait=30)
    daemon.wait_all("running", ["frozen", "paused"])


def test_an_exit_that_no_server_saw_is_recorded_with_its_true_time(daemon: Daemon, tmp_path: Path) -> None:
    daemon.job("waits", "Waits", args=[f"{tmp_path}/go", "7"], restart="never")
    daemon.start()
    pid = daemon.status("waits")["pid"]
    server = daemon.server_pid()
    os.kill(server, signal.SIGSTOP)
    (tmp_path / "go").touch()
    until(lambda: ended(pid), "the job has ended")
    at = time.time()
    time.sleep(0.3)  # so that a time of the server's own would be seen to be another
    os.kill(server, signal.SIGKILL)
    hb = daemon.wait_state("waits", "failed")
    assert (hb["last_exit"]["code"], hb["last_exit"]["reason"]) == (7, "crashed")
    query = "SELECT ended_us FROM run WHERE ended_us NOTNULL"
    ((ended_us,),) = daemon.wait_for(lambda: daemon.rows(query), "it is recorded")
    assert ended_us / 1e6 <= at + 0.2  # the keeper and this test have looked one after the other


def test_sigusr2_replaces_the_server_and_nothing_else(daemon: Daemon) -> None:
    for name in ("one", "two"):
        daemon.job(name, "Idle")
    daemon.start()
    pids = pids_of(daemon.wait_all("running"))
    with Poller(daemon) as poller:
        for _ in range(3):
            server = daemon.server_pid()
            daemon.tell(signal.SIGUSR2)
            daemon.wait_new_server(server)
            assert not is_alive(server)
            assert pids_of(daemon.jobs()) == pids
    assert poller.refused == []
    health = daemon.health()
    assert (health["keeper_pid"], health["server_starts"]) == (daemon.keeper_pid, 4)
    assert "the server ended" not in daemon.log


def test_who_waits_for_a_kill_is_told_503_when_the_server_leaves(daemon: Daemon) -> None:
    daemon.job("stubborn", "Stubborn", kill_grace=0.3)
    daemon.start()
    pid = daemon.status("stubborn")["pid"]
    with ThreadPoolExecutor(1) as waiting:
        answer = waiting.submit(daemon.kept.get, "/jobs/stubborn/kill", params={"grace": 3600})
        daemon.wait_state("stubborn", "stopping")
        server = daemon.server_pid()
        daemon.tell(signal.SIGUSR2)
        told = answer.result(DEADLINE_S)
    assert told.status_code == 503, told.text
    assert "the server is leaving; ask again" in told.json()["detail"]
    daemon.wait_new_server(server)
    assert daemon.hb("stubborn")["pid"] == pid
    assert daemon.get("/jobs/stubborn/kill", grace=0).status_code == 200


@pytest.mark.parametrize("broken", ["settings", "job"])
def test_a_server_that_starts_while_a_file_is_broken_keeps_the_jobs(daemon: Daemon, broken: str) -> None:
    daemon.job("one", "Idle", config={"a": 1})
    daemon.job("two", "Idle")
    daemon.start()
    pids = pids_of(daemon.wait_all("running"))
    if broken == "settings":
        (daemon.config / "harnessd.toml").write_text("state_dir = [")
    else:
        daemon.job("one", "Idle", bogus=True)
    daemon.wait_new_server(daemon.kill_server())
    assert pids_of(daemon.jobs()) == pids
    assert daemon.get("/jobs/one/config").json()["file"] == {"a": 1}
    assert ("bogus" if broken == "job" else "harnessd.toml") in daemon.log


def test_a_server_that_is_killed_while_it_starts_is_started_again(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    daemon.start(_QUICK)
    pid = daemon.wait_state("idle", "running")["pid"]
    until(lambda: spares(daemon.keeper_pid), "a spare, which is no server")
    daemon.kill_server()
    for _ in range(3):
        known = set(children(daemon.keeper_pid))
        until(lambda known=known: set(children(daemon.keeper_pid)) - known, "a server is started")
        for child in set(children(daemon.keeper_pid)) - known:
            os.kill(child, signal.SIGKILL)
    daemon.wait_for(lambda: daemon.health()["status"] == "ok", "a server serves")
    assert daemon.hb("idle")["pid"] == pid


@pytest.mark.parametrize("processes", [1, 2], ids=["at once", "when it has started a job"])
def test_the_first_server_killed_before_it_serves_is_followed_by_one_that_does(daemon: Daemon, processes: int) -> None:
    daemon.job("one", "Idle")
    daemon.start()
    assert daemon.post("/jobs/one/stop", wait=30).is_success
    daemon.stop()
    daemon.launch(_QUICK)
    daemon.wait_for(lambda: len(children(daemon.keeper_pid)) >= processes, "it has a server, and maybe a run")
    os.kill(min(children(daemon.keeper_pid)), signal.SIGKILL)
    daemon.wait_serving()
    daemon.wait_state("one", "running")
    assert daemon.health()["server_starts"] == 2
    daemon.wait_for(lambda: daemon.rows("SELECT id FROM run WHERE ended_us IS NULL"), "its run is stored")
    assert len(daemon.rows("SELECT id FROM run WHERE ended_us IS NULL")) == 1


# the keeper


def _kill_keeper(daemon: Daemon) -> None:
    daemon.tell(signal.SIGKILL)
    daemon.wait()


def _has_open(pids: Iterable[int], path: Path) -> bool:
    found = [fd for pid in pids for fd in Path(f"/proc/{pid}/fd").glob("*")]
    with suppress(FileNotFoundError):
        return path in [fd.readlink() for fd in found]
    return False


def test_the_keeper_killed_leaves_nothing_of_any_run_and_the_next_serve_starts_clean(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    daemon.job("stubborn", "Stubborn", kill_grace=0.3)
    daemon.job("forks", "Forks", args=["stay"], kill_grace=0.3)
    daemon.job("shell", ["sh", "-c", "setsid sleep 3600 & (sleep 3600 &) ; exec sleep 3600"])
    daemon.start()
    daemon.wait_all("running")
    daemon.post("/jobs/idle/config", {"kept": True}, wait=30)
    daemon.get("/jobs/stubborn/kill", grace=0)
    daemon.get("/jobs/stubborn/start")
    for name in ("idle", "stubborn", "forks"):
        daemon.status(name)
    runs = daemon.wait_for(lambda: daemon.rows("SELECT id, mark FROM run WHERE ended_us IS NULL"), "runs are stored")
    assert len(runs) == 4
    assert len(daemon.wearing_a_mark()) >= 9
    _kill_keeper(daemon)
    until(lambda: not daemon.left(), "nothing is left")
    daemon.start()
    jobs = daemon.wait_all("running")
    assert {name: job["restarts"] for name, job in jobs.items()} == dict.fromkeys(jobs, 0)
    assert daemon.health()["server_starts"] == 1
    query = "SELECT id FROM run WHERE reason = 'lost' ORDER BY id"
    daemon.wait_for(lambda: daemon.rows(query) == sorted((run,) for run, _ in runs), "they are recorded as lost")
    assert daemon.get("/jobs/idle/config").json()["overrides"] == {"kept": True}
    daemon.wait_status("idle", config={"kept": True})


@pytest.mark.parametrize("readable", [True, False])
def test_keeper_and_server_killed_at_once_leave_nothing_to_the_next_serve(
    daemon: Daemon, tmp_path: Path, readable: bool
) -> None:
    daemon.job("forks", "Forks", args=["stay"], kill_grace=0.3)
    daemon.start()
    escaped = daemon.status("forks")["pids"]
    os.kill(daemon.server_pid(), signal.SIGSTOP)
    server = next(pid for pid in children(daemon.keeper_pid) if pid not in daemon.wearing_a_mark())
    _kill_keeper(daemon)
    os.kill(server, signal.SIGKILL)
    assert any(is_alive(pid) for pid in escaped)
    if not readable:
        (daemon.state / "harnessd.db").rename(tmp_path / "aside.db")
        (daemon.state / "harnessd.db").mkdir()
    daemon.launch()
    daemon.wait_for(lambda: daemon.log.count("serving 1 jobs") == 2, "it serves again")
    assert not any(is_alive(pid) for pid in escaped)
    daemon.wait_for(lambda: daemon.status("forks")["pids"] != escaped, "a new run reports")


@pytest.mark.parametrize("stored", [True, False])
def test_a_kill_that_was_answered_is_not_undone_by_the_death_of_the_server(
    daemon: Daemon, tmp_path: Path, stored: bool
) -> None:
    daemon.job("stubborn", "Stubborn", restart="always", kill_grace=5)
    daemon.start()
    daemon.wait_state("stubborn", "running")
    server = daemon.server_pid()
    with closing(sqlite3.connect(tmp_path / "state" / "harnessd.db", isolation_level=None)) as other:
        if not stored:
            other.execute("BEGIN EXCLUSIVE")
        assert daemon.post("/jobs/stubborn/kill", wait=0).status_code == 202
        os.kill(server, signal.SIGKILL)
        daemon.wait_new_server(server)
    daemon.wait_state("stubborn", "stopped")
    job = daemon.get("/jobs/stubborn").json()
    assert (job["want"], job["last_exit"]["reason"]) == ("down", "killed")


@pytest.mark.parametrize("leaves", [True, False])
def test_a_daemon_never_starts_beside_the_server_of_a_killed_keeper(daemon: Daemon, leaves: bool) -> None:
    """It waits until that server has left, and ends it when it hangs."""
    daemon.job("idle", "Idle")
    daemon.start()
    run = daemon.wait_state("idle", "running")["run"]
    daemon.wait_for(lambda: daemon.rows(f"SELECT id FROM run WHERE id = {run}"), "the run is stored")
    server = daemon.server_pid()
    os.kill(server, signal.SIGSTOP)
    _kill_keeper(daemon)
    daemon.launch()
    try:
        if leaves:
            until(lambda: _has_open(children(daemon.keeper_pid), daemon.state / "lock"), "the next waits")
            os.kill(server, signal.SIGCONT)
        until(lambda: not is_alive(server), "the old server, which may still answer, is gone")
    finally:
        if is_alive(server):
            os.kill(server, signal.SIGKILL)
    daemon.wait_serving()
    assert (f"the server {server} of a killed keeper did not leave" in daemon.log) is not leaves
    daemon.wait_state("idle", "running")
    daemon.wait_for(lambda: daemon.rows(f"SELECT id FROM run WHERE id = {run} AND reason = 'lost'"), "recorded as lost")


def test_wants_are_decided_by_autostart_after_a_cold_start(daemon: Daemon) -> None:
    daemon.job("auto", "Idle")
    daemon.job("manual", "Idle", autostart=False)
    daemon.start()
    daemon.get("/jobs/auto/stop", wait=30)
    daemon.get("/jobs/manual/start", wait=30)
    daemon.post("/jobs/auto/config", {"a": 1})
    daemon.wait_all("stopped", ["auto"])
    assert daemon.stop() == 0
    daemon.start()
    daemon.wait_state("auto", "running")
    daemon.wait_status("auto", config={"a": 1})
    assert daemon.hb("manual")["state"] == "stopped"
    assert daemon.ask("DELETE", "/jobs/auto/config").json()["overrides"] == {}
    assert daemon.stop() == 0
    daemon.start()
    daemon.wait_status("auto", config={})


def test_what_a_run_said_before_the_keeper_died_is_not_lost(daemon: Daemon) -> None:
    daemon.settings("[history]\nmax_rate = 1000000")
    daemon.job("floods", "Floods", args=["20000"], restart="never")
    daemon.start()
    daemon.status("floods")
    (run,) = daemon.wait_for(lambda: [run for (run,) in daemon.rows("SELECT id FROM run")], "the run is stored")
    server = daemon.server_pid()
    os.kill(server, signal.SIGSTOP)
    _kill_keeper(daemon)
    os.kill(server, signal.SIGKILL)
    daemon.job("floods", "Idle", autostart=False)
    daemon.start()
    query = "SELECT count(*), count(DISTINCT seq), max(seq), journal_done FROM status JOIN run ON run.id = run_id"
    rows = daemon.wait_for(
        lambda: [row for row in daemon.rows(f"{query} WHERE run_id = ?", run) if row[3]], "its journal is stored"
    )
    count, distinct, last, _ = rows[0]
    assert count == distinct == last > 0


# clocks and pids

_CLOCK = """
import os, time
_time, _time_ns, _path = time.time, time.time_ns, os.environ.get("TEST_CLOCK")
def _offset_s():
    try:
        with open(_path) as file:
            return int(file.read() or 0)
    except OSError:
        return 0
if _path:
    time.time = lambda: _time() + _offset_s()
    time.time_ns = lambda: _time_ns() + _offset_s() * 10**9
"""


def test_a_wall_clock_that_jumps_a_day_forward_and_back_changes_nothing(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(_CLOCK)
    offset = tmp_path / "offset"
    daemon.job("idle", "Idle")
    daemon.job("waits", "Waits", args=[f"{tmp_path}/go", "1"], backoff={"first_s": 3600, "max_s": 3600})
    daemon.start(PYTHONPATH=str(tmp_path / "clock"), TEST_CLOCK=str(offset))
    pids = pids_of(daemon.wait_all("running"))
    for number, day_s in enumerate((86_400, -86_400, 0)):
        offset.write_text(str(day_s))
        before = daemon.hb("idle")
        told = time.strptime(before["time"], "%Y-%m-%dT%H:%M:%S.%fZ")
        assert abs(calendar.timegm(told) - time.time() - day_s) < 3600
        assert 0 < before["uptime_s"] < 3600
        assert daemon.post("/jobs/idle/config", {"n": number}, wait=30).status_code == 200
        assert pids_of(daemon.jobs()) == pids
        daemon.wait_new_server(daemon.kill_server())
        assert {name: job["state"] for name, job in daemon.jobs().items()} == dict.fromkeys(pids, "running")
        assert pids_of(daemon.jobs()) == pids
        assert daemon.hb("idle")["uptime_s"] < 3600
    offset.write_text("-86400")
    (tmp_path / "go").touch()
    daemon.wait_state("waits", "starting", "backoff")
    offset.write_text("86400")
    assert daemon.hb("idle")["pid"] == pids["idle"]
    assert [length for (length,) in daemon.rows("SELECT mono_s FROM run WHERE ended_us NOTNULL") if length > 3600] == []


def test_a_job_that_was_killed_is_up_again_in_the_process_that_was_forked_ahead(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    daemon.start()
    (spare,) = daemon.wait_for(lambda: spares(daemon.keeper_pid), "a spare")
    until(lambda: tree.age_s(tree.start_ticks(spare)) > 1.5, "it has waited")
    killed = daemon.hb("idle")["pid"]
    os.kill(killed, signal.SIGKILL)
    daemon.wait_for(lambda: daemon.hb("idle")["pid"] not in (None, killed), "the next run")
    found = daemon.hb("idle")
    assert found["pid"] == spare
    assert found["uptime_s"] <= tree.age_s(tree.start_ticks(spare)) - 1
    query = "SELECT start_ticks FROM run WHERE pid = ?"
    ((began,),) = daemon.wait_for(lambda: daemon.rows(query, spare), "the run is stored")
    assert began >= tree.start_ticks(spare) + tree.TICKS_A_SECOND
    old = daemon.kill_server()
    daemon.wait_new_server(old)
    assert daemon.hb("idle")["pid"] == spare
    assert daemon.hb("idle")["uptime_s"] <= tree.age_s(tree.start_ticks(spare)) - 1


def test_a_pid_that_belongs_to_a_stranger_now_is_not_signalled(daemon: Daemon) -> None:
    daemon.job("idle", "Idle", autostart=False)
    daemon.start()
    daemon.get("/jobs/idle/start", wait=30)
    (run,) = daemon.wait_for(lambda: [run for (run,) in daemon.rows("SELECT id FROM run")], "the run is stored")
    _kill_keeper(daemon)
    until(lambda: not daemon.left(), "nothing is left")
    with subprocess.Popen(["sleep", "3600"]) as stranger:
        try:
            with sqlite3.connect(daemon.state / "harnessd.db") as database:
                ticks = tree.start_ticks(stranger.pid)
                database.execute("UPDATE run SET pid = ?, start_ticks = ?", (stranger.pid, ticks))
            database.close()
            daemon.start()
            assert daemon.hb("idle")["pid"] is None
            assert daemon.get("/jobs/idle/kill").status_code == 409
            query = "SELECT reason FROM run WHERE id = ? AND reason NOTNULL"
            assert daemon.wait_for(lambda: daemon.rows(query, run), "its end is recorded") == [("lost",)]
            assert daemon.stop() == 0
            assert stranger.poll() is None
        finally:
            stranger.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_that_is_told_to_end_while_it_comes_up_ends_in_order(daemon: Daemon, number: signal.Signals) -> None:
    daemon.job("one", "Idle")
    daemon.launch()
    daemon.wait_for(lambda: children(daemon.keeper_pid), "it has a server")
    assert daemon.stop(number) == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_a_daemon_that_gets_a_signal_while_it_comes_up_serves(daemon: Daemon, number: signal.Signals) -> None:
    daemon.job("one", "Idle")
    daemon.launch()
    daemon.wait_for(lambda: children(daemon.keeper_pid), "it has a server")
    daemon.tell(number)
    daemon.wait_serving()
    daemon.wait_state("one", "running")


def test_a_run_of_a_daemon_that_is_told_to_end_before_it_serves_is_in_the_history(daemon: Daemon) -> None:
    daemon.job("one", "Idle")
    daemon.launch()
    daemon.wait_for(lambda: len(children(daemon.keeper_pid)) >= 2, "it has a server and a run")
    assert daemon.stop() == 0
    assert daemon.rows("SELECT reason, ended_us IS NOT NULL FROM run") == [("shutdown", 1)]


def test_a_server_that_cannot_be_started_is_tried_again_and_the_jobs_go_on(daemon: Daemon) -> None:
    daemon.job("one", "Idle")
    daemon.start()
    before, server = daemon.hb("one")["pid"], daemon.server_pid()
    limit = resource.prlimit(daemon.keeper_pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.keeper_pid, resource.RLIMIT_NOFILE, (3, limit[1]))
    os.kill(server, signal.SIGRTMIN + 6)
    until(lambda: daemon.log.count("cannot start the server") > 1, "it was tried more than once")
    assert f"signal {signal.SIGRTMIN + 6}" in daemon.log
    resource.prlimit(daemon.keeper_pid, resource.RLIMIT_NOFILE, limit)
    daemon.wait_for(lambda: daemon.server_pid() not in (0, server), "the next server")
    assert daemon.hb("one")["pid"] == before
