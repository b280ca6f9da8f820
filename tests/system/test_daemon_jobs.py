"""Jobs of all kinds under one daemon: how they are made, how they end, and what they cannot do to one another."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.brand import is_alive
from helpers.daemon import JOBS, Daemon, ended
from helpers.waiting import until

OTHER_PYTHON = "/usr/bin/python3.11"

# jobs that misbehave


def test_jobs_that_misbehave_get_the_right_end_and_hurt_nobody(daemon: Daemon, tmp_path: Path) -> None:
    slow_to_give_up = {"max_failures": 2, "backoff": {"first_s": 0.05, "max_s": 0.1}}
    (tmp_path / "never.py").write_text("import time\ntime.sleep(3600)\nclass Job: pass\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "doomed").mkdir()
    healthy = ["healthy-cradle", "healthy-shell"]
    daemon.job("healthy-cradle", "Idle")
    daemon.job("healthy-shell", ["sleep", "3600"])
    daemon.job("at-once", "Ends", args=["3", "0"], start_seconds=5, **slow_to_give_up)
    daemon.job("later", "Ends", args=["4", "2"], restart="never")
    daemon.job("segfaults", "Segfaults", start_seconds=5, **slow_to_give_up)
    daemon.job("oom", "KillsItself", start_seconds=5, **slow_to_give_up)
    daemon.job("forks", "Forks", restart="never", kill_grace=0.3)
    daemon.job("stubborn", "Stubborn", kill_grace=0.3)
    daemon.job("fills", "Fills", log={"max_bytes": "100MB"})
    daemon.job("loses-cwd", "LosesCwd", cwd=str(tmp_path / "doomed"))
    daemon.job("never-imports", f"{tmp_path}/never.py:Job")
    daemon.job("broken", f"{tmp_path}/broken.py:Job", start_seconds=5, **slow_to_give_up)
    daemon.job("nowhere", ["/nowhere/at/all"], start_seconds=5, **slow_to_give_up)
    daemon.job("no-class", f"{JOBS}:Nothing", start_seconds=5, **slow_to_give_up)
    daemon.job("done", "Ends", args=["0", "0"])
    daemon.start()
    pids = {name: daemon.wait_state(name, "running")["pid"] for name in healthy}

    ends = {
        "at-once": ("failed", "crashed", 3, None),
        "later": ("failed", "crashed", 4, None),
        "segfaults": ("failed", "signaled", None, "SIGSEGV"),
        "oom": ("failed", "signaled", None, "SIGKILL"),
        "forks": ("exited", "completed", 0, None),
        "broken": ("failed", "crashed", 1, None),
        "nowhere": ("failed", "crashed", 127, None),
        "no-class": ("failed", "crashed", 1, None),
        "done": ("exited", "completed", 0, None),
    }
    for name, expected in ends.items():
        hb = daemon.wait_state(name, "failed", "exited")
        last = hb["last_exit"]
        assert (hb["state"], last["reason"], last["code"], last["signal"]) == expected, name
    assert not any(is_alive(pid) for pid in daemon.status("forks")["pids"])
    assert "nothing_of_that_name" in daemon.output("broken")
    assert daemon.hb("broken")["last_exit"]["error"].startswith("ModuleNotFoundError: ")  # without JSON's quotes

    daemon.wait_status("fills", written=20_000)
    assert len(daemon.output("fills")) == 20_000 * 1024
    daemon.wait_status("loses-cwd", gone=True)
    assert daemon.hb("never-imports")["state"] == "running"
    for name, signal_name in {"stubborn": "SIGKILL", "fills": "SIGTERM", "never-imports": "SIGTERM"}.items():
        killed = daemon.get(f"/jobs/{name}/kill")
        assert killed.status_code == 200
        assert killed.json()["exit"]["signal"] == signal_name
        assert killed.json()["exit"]["reason"] == "killed"
        assert daemon.hb(name)["state"] == "stopped"
    assert pids == {name: daemon.hb(name)["pid"] for name in healthy}
    assert {job["restarts"] for name, job in daemon.jobs().items() if name in healthy} == {0}


def test_kill_ends_everything_that_a_job_has_started(daemon: Daemon) -> None:
    daemon.job("forks", "Forks", args=["stay"], kill_grace=0.3)
    daemon.start()
    status = daemon.status("forks")
    assert all(is_alive(pid) for pid in status["pids"])
    assert daemon.get("/jobs/forks/kill").status_code == 200
    assert all(ended(pid) for pid in [status["pid"], *status["pids"]])


# A job that is a harness itself, of a job that starts a process of its own.
HARNESS = """
import asyncio, subprocess, time
from harnessd import Cradle, ProcessHarness
class Inner(Cradle):
    def run(self):
        print("started", subprocess.Popen(["setsid", "env", "-i", "/bin/sleep", "3600"]).pid, flush=True)
        time.sleep(3600)
asyncio.run(ProcessHarness({"http": {"port": 0}}).main(Inner()))
"""


@pytest.mark.parametrize("grace", [0, 20])
def test_kill_of_a_job_that_is_a_harness_ends_what_its_own_job_has_started(daemon: Daemon, grace: float) -> None:
    daemon.job("outer", [sys.executable, "-c", HARNESS])
    daemon.start()
    until(lambda: "started" in daemon.output("outer"), "the inner job has started a process")
    inner = int(daemon.output("outer").rpartition("started")[2].split()[0])
    assert is_alive(inner)
    assert daemon.post("/jobs/outer/kill", grace=grace).status_code == 200
    assert not is_alive(inner)


@pytest.mark.parametrize("exit_code", [0, 1])
@pytest.mark.parametrize("restart", ["on-failure", "always", "never"])
def test_restart_policy(daemon: Daemon, tmp_path: Path, restart: str, exit_code: int) -> None:
    daemon.job("waits", "Waits", args=[f"{tmp_path}/go", str(exit_code)], restart=restart, backoff={"first_s": 0.01})
    daemon.start()
    first = daemon.wait_state("waits", "running")["pid"]
    daemon.status("waits")
    (tmp_path / "go").touch()
    until(lambda: ended(first), "the first run has ended")
    (tmp_path / "go").unlink()
    if restart == "always" or (restart == "on-failure" and exit_code):
        daemon.wait_for(lambda: daemon.hb("waits")["pid"] not in (first, None), "it is started again")
        assert daemon.hb("waits")["restarts"] == 1
    else:
        hb = daemon.wait_state("waits", "failed" if exit_code else "exited")
        assert (hb["pid"], hb["restarts"], hb["want"]) == (None, 0, "up")
        assert daemon.get("/jobs/waits/start").status_code == 202
        daemon.wait_state("waits", "running")


def test_a_stop_is_final_whatever_the_restart_policy(daemon: Daemon) -> None:
    daemon.job("cradle", "Idle", restart="always")
    daemon.job("shell", ["sleep", "3600"], restart="always")
    daemon.start()
    daemon.wait_all("running")
    daemon.get("/jobs/all/stop")
    jobs = daemon.wait_all("stopped")
    assert {job["last_exit"]["reason"] for job in jobs.values()} == {"stopped"}
    assert {job["want"] for job in jobs.values()} == {"down"}
    daemon.get("/jobs/all/start")
    daemon.wait_all("running")
    daemon.get("/jobs/all/restart")
    daemon.wait_for(lambda: all(job["restarts"] == 0 and job["pid"] for job in daemon.jobs().values()), "new runs")
    daemon.wait_all("running")


# how a run is made


def test_cwd_umask_nice_limits_env_and_args_are_applied(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    keys: dict[str, Any] = {
        "args": ["--symbol", "SPX"],
        "cwd": str(tmp_path / "here"),
        "umask": "027",
        "nice": 5,
        "limits": {"nofile": 123, "core": 0},
        "env": {"MODE": "live", "HOME_COPY": "${HOME}", "PRICE": "$$5"},
    }
    daemon.job("cradle", "Looks", **keys)
    daemon.start()
    seen = daemon.status("cradle")
    assert seen["args"] == ["--symbol", "SPX"]
    assert seen["cwd"] == str(tmp_path / "here")
    assert seen["umask"] == 0o027
    assert seen["nice"] == os.nice(0) + 5
    assert (seen["nofile"], seen["core"]) == ([123, 123], [0, 0])
    assert {key: seen["env"][key] for key in keys["env"]} == {
        "MODE": "live",
        "HOME_COPY": os.environ["HOME"],
        "PRICE": "$5",
    }


def test_a_job_runs_under_an_interpreter_that_has_no_harnessd(daemon: Daemon) -> None:
    if not os.path.exists(OTHER_PYTHON):
        pytest.skip(f"needs {OTHER_PYTHON}")
    assert subprocess.run([OTHER_PYTHON, "-c", "import harnessd"], cwd="/", stderr=subprocess.DEVNULL).returncode
    daemon.job("looks", "Looks", python=OTHER_PYTHON, args=["a"], umask="077")
    daemon.job("idle", "Idle", python=OTHER_PYTHON)
    daemon.start()
    seen = daemon.status("looks")
    assert seen["executable"] == OTHER_PYTHON
    assert (seen["args"], seen["umask"]) == (["a"], 0o077)
    daemon.wait_state("idle", "running")
    assert daemon.post("/jobs/idle/config", {"a": 1}, wait=30).status_code == 200
    daemon.wait_status("idle", config={"a": 1})
    assert daemon.get("/jobs/idle/stop", wait=30).status_code == 200
    assert daemon.wait_state("idle", "stopped")["last_exit"]["code"] == 0


@pytest.fixture
def open_daemon() -> Iterator[Daemon]:
    """A daemon in a folder that every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="harnessd-test-"))
    folder.chmod(0o755)
    shutil.copy(JOBS, folder / "jobs.py")
    made = Daemon(folder)
    try:
        yield made
        made.close()
    finally:
        shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_kill_ends_what_a_job_of_another_user_has_started(open_daemon: Daemon) -> None:
    """Root without CAP_SYS_RESOURCE, as in a container, may not ask prlimit(2) about another user's process."""
    daemon = open_daemon
    script = 'setsid sleep 3600 & echo "{\\"status\\": $!}" >> $HARNESS_JOURNAL; wait'
    daemon.job("shell", ["sh", "-c", script], user="nobody", cwd="/")
    daemon.start()
    sleeping = daemon.status("shell")
    assert is_alive(sleeping)
    assert daemon.get("/jobs/shell/kill").status_code == 200
    assert ended(sleeping)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_job_of_another_user_has_its_identity_and_sees_nothing_of_the_others(open_daemon: Daemon) -> None:
    daemon = open_daemon
    daemon.job("root", "Idle")
    daemon.start()
    daemon.status("root")
    (journal,) = daemon.wait_for(lambda: daemon.rows("SELECT journal FROM run"), "the run is stored")
    prying = [str(daemon.state), f"{daemon.state}/harnessd.db", f"{daemon.state}/log/root.log", journal[0]]
    prying += [str(Path(journal[0]).parent)]
    entry = f"{daemon.folder}/jobs.py:Looks"
    python = OTHER_PYTHON if os.path.exists(OTHER_PYTHON) else sys.executable
    daemon.job("nobody", entry, user="nobody", cwd="/", args=prying)
    daemon.job("other", entry, user="nobody", cwd="/", args=prying, python=python)
    script = 'echo "{\\"status\\": \\"$(id -un)\\"}" >> $HARNESS_JOURNAL; sleep 3600'
    daemon.job("shell", ["sh", "-c", script], user="nobody", cwd="/")
    daemon.reload()
    nobody = pwd.getpwnam("nobody")
    for name in ("nobody", "other"):
        seen = daemon.status(name)
        assert seen["ids"] == [nobody.pw_uid] * 2 + [nobody.pw_gid] * 2
        assert seen["groups"] == sorted({*os.getgrouplist("nobody", nobody.pw_gid)} - {grp.getgrnam("root").gr_gid})
        assert (seen["env"]["USER"], seen["env"]["HOME"]) == ("nobody", nobody.pw_dir)
        assert seen["readable"] == []
    daemon.wait_for(lambda: daemon.get("/jobs/shell/status").json()["status"] == "nobody", "the shell reports")
    assert daemon.get("/jobs/all/kill").status_code == 207


def test_a_command_is_steered_by_signals_and_reports_through_its_journal(daemon: Daemon, tmp_path: Path) -> None:
    script = f"""
        trap 'echo "{{\\"status\\": {{\\"up\\": false}}}}" >> $HARNESS_JOURNAL; exit 0' TERM
        echo '{{"status": {{"up": true}}}}' >> $HARNESS_JOURNAL
        while :; do echo x >> {tmp_path}/beats; sleep 0.02; done
    """
    daemon.job("shell", ["bash", "-c", script])
    daemon.start()
    assert daemon.status("shell") == {"up": True}
    pid = daemon.wait_state("shell", "running")["pid"]
    assert daemon.get("/jobs/shell/pause").status_code == 202
    daemon.wait_state("shell", "paused")
    daemon.wait_for(lambda: daemon.hb("shell")["process"]["status"] == "stopped", "it is stopped")
    assert daemon.get("/jobs/shell/resume").status_code == 202
    beats = (tmp_path / "beats").stat().st_size
    until(lambda: (tmp_path / "beats").stat().st_size > beats, "it goes on")
    answer = daemon.post("/jobs/shell/config", {"a": 1})
    assert answer.status_code == 409
    assert "signals" in answer.json()["detail"]
    assert daemon.hb("shell")["pid"] == pid
    daemon.get("/jobs/shell/stop")
    hb = daemon.wait_state("shell", "stopped")
    assert (hb["last_exit"]["code"], hb["last_exit"]["reason"]) == (0, "stopped")
    assert daemon.status("shell") == {"up": False}


def test_control_overrides_how_a_job_is_steered(daemon: Daemon) -> None:
    reader = (
        "import os, json; box = int(os.environ['HARNESS_MAILBOX']); os.set_blocking(box, True)\n"
        "while True:\n"
        "    told = json.loads(os.read(box, 1 << 17))\n"
        "    with open(os.environ['HARNESS_JOURNAL'], 'a') as journal:\n"
        "        journal.write(json.dumps({'status': told['cmd']}) + chr(10))\n"
        "        journal.write(json.dumps({'ack': told['id']}) + chr(10))\n"
        "    if told['cmd'] == 'STOP': break\n"
    )
    daemon.job("program", [sys.executable, "-c", reader], control="messages")
    daemon.job("cradle", "Idle", control="signals")
    daemon.start()
    daemon.wait_all("running")
    for verb, state in (("pause", "paused"), ("resume", "running")):
        assert daemon.get(f"/jobs/program/{verb}", wait=30).status_code == 200
        daemon.wait_state("program", state)
        assert daemon.get(f"/jobs/cradle/{verb}").status_code == 202
        daemon.wait_state("cradle", state)
    assert daemon.post("/jobs/cradle/config", {"a": 1}).status_code == 409
    daemon.get("/jobs/program/stop", wait=30)
    daemon.get("/jobs/cradle/stop")
    jobs = daemon.wait_all("stopped")
    assert (jobs["program"]["last_exit"]["code"], jobs["cradle"]["last_exit"]["signal"]) == (0, "SIGTERM")
    assert daemon.status("cradle")["told"] == []


# verbs in every state


def _starting(daemon: Daemon) -> None:
    daemon.job("job", "Deaf", start_seconds=3600)
    daemon.start()
    daemon.status("job")
    daemon.wait_state("job", "starting")


def _backoff(daemon: Daemon) -> None:
    daemon.job("job", "Ends", args=["1", "0"], start_seconds=60, backoff={"first_s": 3600, "max_s": 3600})
    daemon.start()
    daemon.wait_state("job", "backoff")


def _frozen(daemon: Daemon) -> None:
    daemon.job("job", ["sleep", "3600"])
    daemon.start()
    daemon.wait_state("job", "running")
    daemon.get("/jobs/job/pause")
    daemon.wait_for(lambda: daemon.hb("job")["process"]["status"] == "stopped", "it is stopped")


def _stopped_by_hand(daemon: Daemon) -> None:
    daemon.job("job", "Idle")
    daemon.start()
    os.kill(daemon.wait_state("job", "running")["pid"], signal.SIGSTOP)


def _stopping(daemon: Daemon) -> None:
    daemon.job("job", "Stubborn", kill_grace=0.5)
    daemon.start()
    daemon.status("job")
    daemon.get("/jobs/job/stop")
    daemon.wait_state("job", "stopping")


@pytest.mark.parametrize("verb", ["kill", "stop"])
@pytest.mark.parametrize("reach", [_starting, _backoff, _frozen, _stopped_by_hand, _stopping])
def test_kill_and_stop_in(daemon: Daemon, reach: Any, verb: str) -> None:
    reach(daemon)
    answer = daemon.get(f"/jobs/job/{verb}")
    assert answer.status_code == (200 if verb == "kill" else 202), answer.text
    hb = daemon.hb("job")
    assert hb["want"] == "down"
    if verb == "kill" or reach in (_backoff, _frozen):  # a message waits until it is read
        hb = daemon.wait_state("job", "stopped")
        assert hb["pid"] is None
        assert daemon.wearing_a_mark() == []
    else:
        assert hb["state"] == "stopping"
        assert daemon.get("/jobs/job/kill").status_code == 200
    assert daemon.hb("job")["state"] == "stopped"


@pytest.mark.parametrize("reach", [_starting, _backoff, _frozen, _stopped_by_hand, _stopping])
def test_start_in(daemon: Daemon, reach: Any) -> None:
    reach(daemon)
    before = daemon.hb("job")
    assert daemon.get("/jobs/job/start").status_code == 202
    hb = daemon.wait_state("job", "starting", "running", "stopping", "backoff")
    assert hb["want"] == "up"
    if reach is _backoff:
        daemon.wait_for(lambda: len(daemon.rows("SELECT id FROM run")) > 1, "it was started at once")
    else:
        assert hb["pid"] == before["pid"]
    assert len({mark for (mark,) in daemon.rows("SELECT mark FROM run WHERE ended_us IS NULL")}) <= 1


def test_a_kill_of_a_stopping_job_that_was_started_again_is_final(daemon: Daemon) -> None:
    _stopping(daemon)
    daemon.get("/jobs/job/start")
    assert daemon.get("/jobs/job/kill").status_code == 200
    hb = daemon.hb("job")
    assert (hb["state"], hb["want"], hb["last_exit"]["reason"]) == ("stopped", "down", "killed")


def test_many_clients_at_once_never_make_two_runs(daemon: Daemon) -> None:
    daemon.job("job", "Idle", restart="always", backoff={"first_s": 0.01, "max_s": 0.02})
    daemon.start()
    daemon.wait_state("job", "running")
    codes: list[int] = []

    def client(*verbs: str) -> None:
        for _ in range(8):
            codes.extend(daemon.get(f"/jobs/job/{verb}").status_code for verb in verbs)

    pairs = (("start", "stop"), ("kill", "start"), ("restart",), ("pause", "resume"))
    clients = [threading.Thread(target=client, args=verbs) for verbs in pairs]
    for each in clients:
        each.start()
    most = 0
    while any(each.is_alive() for each in clients):
        most = max(most, len(daemon.wearing_a_mark()))
    for each in clients:
        each.join()
    assert most <= 1
    assert set(codes) <= {200, 202, 409}
    daemon.get("/jobs/job/kill")
    daemon.wait_state("job", "stopped")
    daemon.get("/jobs/job/start")
    daemon.wait_state("job", "running")
    overlapping = "SELECT a.id, b.id FROM run a JOIN run b ON a.id < b.id AND b.started_us < a.ended_us"
    assert daemon.rows(overlapping) == []


def test_a_command_that_ends_at_once_is_never_taken_for_a_running_one(daemon: Daemon) -> None:
    for index in range(30):
        daemon.job(f"true-{index}", ["true"])
    daemon.start()
    daemon.wait_all("exited")
    for _ in range(3):
        assert daemon.get("/jobs/all/start").status_code == 207
        jobs = daemon.wait_all("exited")
        assert {(job["pid"], job["last_exit"]["code"]) for job in jobs.values()} == {(None, 0)}


def test_a_status_is_shown_as_it_was_said(daemon: Daemon, tmp_path: Path) -> None:
    said = {"text": "\ud800 é", "big": 2**70, "deep": [[[{}]]], "none": None}
    daemon.job("shell", ["sh", "-c", "cat said >> $HARNESS_JOURNAL; sleep 3600"], cwd=str(tmp_path))
    (tmp_path / "said").write_text(json.dumps({"status": said}) + "\n")
    daemon.start()
    assert daemon.status("shell") == said
