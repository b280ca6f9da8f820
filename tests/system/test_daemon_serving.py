"""A daemon from its start to its end, and what its routes answer."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from helpers.daemon import COMMAND, Daemon, children, free_port, spares
from helpers.waiting import until

from harnessd import __version__


def test_every_job_runs_in_a_process_of_its_own_and_is_listed(daemon: Daemon) -> None:
    daemon.job("one", "Idle", tags=["a"])
    daemon.job("two", "Idle", tags=["a", "b"])
    daemon.job("shell", ["sleep", "3600"], tags=["b"])
    daemon.job("late", "Idle", autostart=False)
    daemon.start()
    jobs = daemon.wait_all("running", ["one", "two", "shell"])
    assert len({job["pid"] for job in jobs.values()}) == 3
    assert set(jobs["one"]) == {"name", "state", "want", "pid", "uptime_s", "restarts", "last_exit", "tags"}
    assert jobs["two"] | {"pid": 0, "uptime_s": 0} == {
        "name": "two",
        "state": "running",
        "want": "up",
        "pid": 0,
        "uptime_s": 0,
        "restarts": 0,
        "last_exit": None,
        "tags": ["a", "b"],
    }
    late = daemon.jobs()["late"]
    assert (late["state"], late["want"], late["pid"], late["uptime_s"]) == ("stopped", "down", None, None)
    assert list(daemon.jobs()) == ["late", "one", "shell", "two"]
    assert list(daemon.jobs(tag="b")) == ["shell", "two"]
    assert list(daemon.jobs(state="stopped")) == ["late"]
    assert list(daemon.jobs(tag="a", state="stopped")) == []
    assert Path(f"/proc/{jobs['one']['pid']}/cmdline").read_text().startswith("harnessd: one")


def test_healthz_tells_who_serves_and_how_many_jobs_are_in_which_state(daemon: Daemon) -> None:
    daemon.job("one", "Idle")
    daemon.job("two", "Idle")
    daemon.job("late", "Idle", autostart=False)
    daemon.start()
    daemon.wait_all("running", ["one", "two"])
    health = daemon.health()
    expected = {"status", "server_pid", "keeper_pid", "server_starts", "uptime_s", "version", "jobs", "storage"}
    assert set(health) >= expected
    assert health["status"] == "ok"
    assert health["keeper_pid"] == daemon.keeper_pid
    assert health["server_pid"] in children(daemon.keeper_pid)
    assert health["server_starts"] == 1
    assert health["version"] == __version__
    assert health["jobs"] == {"running": 2, "stopped": 1}
    assert health["storage"]["ok"] is True
    assert daemon.ask("HEAD", "/healthz").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_ends_all_jobs_in_parallel_and_with_code_0(daemon: Daemon, number: signal.Signals) -> None:
    for index in range(8):
        daemon.job(f"stubborn-{index}", "Stubborn", kill_grace=2)
    daemon.job("idle", "Idle")
    daemon.job("forks", "Forks", args=["stay"], kill_grace=0.2)
    daemon.start()
    for name in daemon.jobs():
        daemon.status(name)
    assert daemon.stop(number) == 0
    ends = dict(daemon.rows("SELECT job.name, signal FROM run JOIN job ON job.id = run.job_id"))
    assert ends == {f"stubborn-{index}": signal.SIGKILL for index in range(8)} | {
        "idle": signal.SIGTERM,
        "forks": signal.SIGTERM,
    }
    assert {reason for (reason,) in daemon.rows("SELECT reason FROM run")} == {"shutdown"}
    # One after the other, the eight graces would last sixteen seconds.
    spread = daemon.rows("SELECT max(ended_us) - min(ended_us) FROM run WHERE signal = 9")[0][0]
    assert spread < 8_000_000


def test_told_twice_it_does_not_wait_for_the_grace(daemon: Daemon) -> None:
    daemon.job("stubborn", "Stubborn", kill_grace=3600)
    daemon.start()
    daemon.status("stubborn")
    daemon.tell(signal.SIGTERM)
    daemon.wait_state("stubborn", "stopping")
    assert daemon.stop(signal.SIGTERM) == 0


def test_a_start_and_a_reload_are_refused_while_the_daemon_ends(daemon: Daemon) -> None:
    daemon.job("stubborn", "Stubborn", kill_grace=3600)
    daemon.job("late", "Idle", autostart=False)
    daemon.start()
    daemon.status("stubborn")
    daemon.tell(signal.SIGTERM)
    daemon.wait_state("stubborn", "stopping")
    daemon.get("/jobs/late/start")
    assert daemon.hb("late")["pid"] is None
    daemon.job("later", "Idle")
    answer = daemon.post("/reload")
    assert (answer.status_code, answer.json()["detail"]) == (503, "cannot reload: the daemon is ending")
    assert "later" not in daemon.jobs()
    assert daemon.stop(signal.SIGTERM) == 0


def test_a_second_serve_is_refused_and_names_the_first(daemon: Daemon, tmp_path: Path) -> None:
    daemon.job("idle", "Idle")
    daemon.start()
    pid = daemon.wait_state("idle", "running")["pid"]
    (tmp_path / "second").mkdir()
    second = Daemon(tmp_path / "second")
    try:
        second.job("other", "Idle")
        (second.config / "harnessd.toml").write_text(f'state_dir = "{daemon.state}"\n[http]\nport = {second.port}\n')
        second.launch()
        assert second.wait() == 1
        assert f"pid {daemon.keeper_pid}" in second.log
        assert "Traceback" not in second.log
    finally:
        second.close()
    assert daemon.hb("idle")["pid"] == pid
    assert daemon.rows("SELECT name FROM job") == [("idle",)]


@pytest.mark.parametrize("name", ["other", "o" * 256], ids=["other", "one that cannot be"])
def test_the_state_directory_stays_as_long_as_the_daemon(daemon: Daemon, tmp_path: Path, name: str) -> None:
    daemon.job("idle", "Idle")
    daemon.job("down", "Idle")
    daemon.start()
    daemon.post("/jobs/down/stop", wait=30)
    daemon.wait_state("down", "stopped")
    pid, server, state = daemon.wait_state("idle", "running")["pid"], daemon.server_pid(), daemon.state
    daemon.state = tmp_path / name
    daemon.settings()
    daemon.state = state
    assert daemon.post("/reload").json()["restart_needed"] == ["state_dir"]
    daemon.tell(signal.SIGUSR2)
    daemon.wait_new_server(server)
    assert (daemon.hb("idle")["pid"], daemon.hb("down")["state"]) == (pid, "stopped")
    assert f"it stays {state}" in daemon.log
    assert not os.path.exists(tmp_path / name)


def test_a_port_in_use_is_said_in_one_line(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", daemon.port))
        taken.listen()
        daemon.launch()
        assert daemon.wait() == 1
    assert f"cannot listen on http://127.0.0.1:{daemon.port}" in daemon.log
    assert "starting" not in daemon.log  # no job is started in vain
    assert "Traceback" not in daemon.log


def _no_such_folder(daemon: Daemon) -> None:
    for path in sorted(daemon.config.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    daemon.config.rmdir()


def _unknown_setting(daemon: Daemon) -> None:
    daemon.settings("preloads = []")


def _broken_toml(daemon: Daemon) -> None:
    (daemon.config / "harnessd.toml").write_text("[http\n")


def _wrong_type(daemon: Daemon) -> None:
    daemon.settings(http='max_body_bytes = "many"')


def _unknown_default(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    daemon.settings('default_job = "idel"')


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_no_such_folder, ["config"]),
        (_unknown_setting, ["harnessd.toml", "preloads (line 3)", "'preload'"]),
        (_broken_toml, ["harnessd.toml", "line 1"]),
        (_wrong_type, ["harnessd.toml", "http.max_body_bytes (line 7)"]),
        (_unknown_default, ["harnessd.toml", "default_job", "'idle'"]),
    ],
)
def test_settings_that_cannot_be_used_end_it_with_code_2(daemon: Daemon, spoil: Any, said: list[str]) -> None:
    spoil(daemon)
    daemon.launch()
    assert daemon.wait() == 2
    assert "Traceback" not in daemon.log
    for words in said:
        assert words in daemon.log


def test_a_broken_job_file_is_reported_and_the_other_jobs_run(daemon: Daemon) -> None:
    daemon.job("good", "Idle")
    daemon.job("bad", "Idle", restrat="always")
    daemon.start()
    daemon.wait_state("good", "running")
    assert "bad.json" in daemon.log
    assert "restrat" in daemon.log
    assert "did you mean" in daemon.log


def test_check_says_what_is_wrong_and_starts_nothing(daemon: Daemon) -> None:
    daemon.job("bad", "NoColon:", restrat="always")
    daemon.launch((COMMAND[0], "check"))
    assert daemon.wait() == 1
    assert "restrat" in daemon.log
    (daemon.config / "jobs" / "bad.json").unlink()
    daemon.job("good", "Idle")
    daemon.launch((COMMAND[0], "check"))
    assert daemon.wait() == 0
    assert not daemon.state.exists()


# the routes without a name


def test_routes_without_a_name_act_on_the_only_job(daemon: Daemon) -> None:
    daemon.job("only", "Idle")
    daemon.start()
    daemon.wait_state("only", "running")
    assert daemon.get("/hb").json()["job"] == "only"
    assert daemon.get("/pause", wait=30).json()["job"] == "only"
    assert daemon.hb("only")["state"] == "paused"


def test_routes_without_a_name_act_on_the_default_job(daemon: Daemon) -> None:
    daemon.job("one", "Idle")
    daemon.job("two", "Idle")
    daemon.settings('default_job = "two"')
    daemon.start()
    assert daemon.get("/hb").json()["job"] == "two"


def test_routes_without_a_name_and_a_default_name_the_alternatives(daemon: Daemon) -> None:
    daemon.job("one", "Idle")
    daemon.job("two", "Idle")
    daemon.start()
    answer = daemon.get("/hb")
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert "/jobs/one" in answer.json()["detail"]
    assert "/jobs/two" in answer.json()["detail"]


def test_an_unknown_name_is_answered_with_the_nearest(daemon: Daemon) -> None:
    daemon.job("vol-target", "Idle")
    daemon.start()
    for path in ("/jobs/vol-tarket", "/jobs/vol-tarket/hb", "/jobs/vol-tarket/kill"):
        answer = daemon.get(path)
        assert answer.status_code == 404
        assert answer.json()["kind"] == "no-such-job"
        assert "'vol-target'" in answer.json()["detail"]


# all


def test_all_acts_on_every_job_and_answers_207(daemon: Daemon) -> None:
    daemon.job("one", "Idle", tags=["a"])
    daemon.job("two", "Idle", tags=["a"])
    daemon.job("three", ["sleep", "3600"])
    daemon.start()
    daemon.wait_all("running")
    answer = daemon.get("/jobs/all/pause", wait=30)
    assert answer.status_code == 207
    results = {result["job"]: result for result in answer.json()["results"]}
    assert list(results) == ["one", "three", "two"]
    assert {result["status_code"] for result in results.values()} == {200}
    daemon.wait_all("paused")
    answer = daemon.get("/jobs/all/resume", wait=30, tag="a")
    assert [result["job"] for result in answer.json()["results"]] == ["one", "two"]
    assert {name: job["state"] for name, job in daemon.jobs().items()} == {
        "one": "running",
        "two": "running",
        "three": "paused",
    }


def test_all_gives_each_job_its_own_answer(daemon: Daemon) -> None:
    daemon.job("up", "Idle")
    daemon.job("down", "Idle", autostart=False)
    daemon.job("shell", ["sleep", "3600"])
    daemon.start()
    daemon.wait_all("running", ["up", "shell"])
    answer = daemon.post("/jobs/all/config", {"key": 1})
    assert answer.status_code == 207
    codes = {result["job"]: result["status_code"] for result in answer.json()["results"]}
    assert codes == {"up": 202, "down": 202, "shell": 409}
    answer = daemon.get("/jobs/all/kill")
    results = {result["job"]: result for result in answer.json()["results"]}
    assert results["down"]["status_code"] == 409
    assert results["up"]["body"]["exit"]["reason"] == "killed"
    assert [job["pid"] for job in daemon.jobs().values()] == [None] * 3
    assert daemon.get("/jobs/all/start", tag="nobody").json() == {"results": []}
    assert daemon.get("/jobs/all/hb").status_code == 207
    assert daemon.get("/jobs/all").status_code == 207


# secrets


def test_secrets_appear_in_no_answer_no_log_and_no_row(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESSD_TOKEN", "token-of-the-daemon")
    monkeypatch.setenv("SOME_PASSWORD", "pa55-from-outside")
    daemon.settings(http='token = "token-in-the-file"')
    secrets = {"API_KEY": "pa55-in-the-file", "OTHER": "x${SOME_PASSWORD}y"}
    daemon.job("one", "Looks", env=secrets)
    daemon.job("shell", ["sh", "-c", "sleep 3600"], env=secrets)
    daemon.start()
    daemon.wait_all("running")
    seen = daemon.status("one")["env"]
    assert (seen["API_KEY"], seen["OTHER"]) == ("pa55-in-the-file", "xpa55-from-outsidey")
    assert "HARNESSD_TOKEN" not in seen
    whole = daemon.get("/jobs/shell").json()
    assert whole["spec"]["env"] == {"API_KEY": "***", "OTHER": "***"}
    daemon.job("shell", ["sh", "-c", "sleep 3601"], env=secrets | {"API_KEY": "pa55-changed"})
    daemon.reload()
    daemon.job("shell", ["sh", "-c", "sleep 3601"], env=secrets | {"API_KEY": 55}, restart="pa55")
    texts = [daemon.post("/reload").text]
    paths = ["/jobs", "/healthz", "/", *(f"/jobs/shell{path}" for path in ("", "/hb", "/config", "/status"))]
    texts += [daemon.get(path).text for path in paths]
    daemon.stop()
    texts.append(daemon.log)
    with sqlite3.connect(daemon.state / "harnessd.db") as database:
        # What the job itself reports is its own business; everything else is the daemon's.
        database.execute("DELETE FROM status")
        texts += [line for line in database.iterdump() if not line.startswith('INSERT INTO "status"')]
    database.close()
    for secret in ("pa55-in", "pa55-from", "pa55-changed", "token-of", "token-in"):
        assert [text for text in texts if secret in text] == []


# as PID 1


def test_as_process_1_it_reaps_the_orphans_of_strangers(daemon: Daemon, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to make a PID namespace")
    daemon.job("idle", "Idle")
    daemon.start(("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *COMMAND))
    (keeper,) = children(daemon.keeper_pid)
    assert daemon.health()["keeper_pid"] == 1
    daemon.wait_state("idle", "running")
    # A stranger enters the namespace and leaves an orphan there, which ends while the keeper is its parent.
    enter = ["nsenter", "-t", str(keeper), "-p", "-m", "sh", "-c", f"(echo $$ > {tmp_path}/ready; sleep 0.3) & exit 0"]
    assert os.spawnvp(os.P_WAIT, "nsenter", enter) == 0
    until((tmp_path / "ready").exists, "the stranger has begun")
    daemon.wait_for(lambda: len(children(keeper).keys() - spares(keeper)) == 2, "the orphan is reaped")
    assert "Z" not in children(keeper).values()
    assert daemon.hb("idle")["alive"] is True
    os.kill(keeper, signal.SIGTERM)
    assert daemon.wait() == 0


def test_a_free_port_is_found_and_said(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    daemon.port = 0
    daemon.settings()
    daemon.launch()
    until(lambda: "serving 1 jobs on http://127.0.0.1:" in daemon.log, "it says where it serves")
    daemon.port = int(daemon.log.rpartition("http://127.0.0.1:")[2].split('"')[0])
    assert daemon.health()["status"] == "ok"
    old = daemon.kill_server()
    daemon.wait_new_server(old)


def test_two_daemons_of_one_user_do_not_disturb_each_other(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    second = Daemon(tmp_path / "second")
    try:
        second.port = free_port()
        second.settings()
        for each in (daemon, second):
            each.job("same", "Idle")
            each.start()
        pids = [each.wait_state("same", "running")["pid"] for each in (daemon, second)]
        daemon.get("/jobs/same/kill")
        assert second.hb("same")["pid"] == pids[1]
        assert daemon.stop() == 0
        assert second.hb("same")["pid"] == pids[1]
    finally:
        second.close()
