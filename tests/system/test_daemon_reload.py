"""A config directory that changes under a daemon."""

from __future__ import annotations

import errno
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from helpers.daemon import Daemon, ended, free_port, pids_of
from helpers.waiting import until

from harnessd.states import Command


def test_reload_answers_what_was_added_changed_removed_and_left_alone(daemon: Daemon) -> None:
    for name in ("stays", "changes", "goes"):
        daemon.job(name, "Idle")
    daemon.start()
    before = daemon.wait_all("running")
    daemon.job("comes", "Idle")
    daemon.job("sleeps", "Idle", autostart=False)
    daemon.job("changes", "Idle", args=["new"])
    (daemon.config / "jobs" / "goes.json").unlink()
    answer = daemon.reload()
    assert answer == {
        "added": ["comes", "sleeps"],
        "changed": ["changes"],
        "removed": ["goes"],
        "unchanged": ["stays"],
        "refused": {},
        "restart_needed": [],
    }
    daemon.wait_for(lambda: "goes" not in daemon.jobs(), "the removed job is deregistered")
    assert ended(before["goes"]["pid"])
    assert daemon.get("/jobs/goes/hb").status_code == 404
    daemon.wait_status("changes", args=["new"])
    after = daemon.wait_all("running", ["stays", "changes", "comes"])
    assert after["stays"]["pid"] == before["stays"]["pid"]
    assert after["changes"]["pid"] != before["changes"]["pid"]
    assert after["changes"]["last_exit"]["reason"] == "stopped"
    assert after["changes"]["restarts"] == 0
    assert daemon.jobs()["sleeps"]["state"] == "stopped"
    ((actor,),) = daemon.wait_for(lambda: daemon.rows("SELECT actor FROM event WHERE kind = 'reload'"), "it is stored")
    assert actor.startswith("loopback:127.0.0.1:")


def test_nothing_changed_touches_nothing(daemon: Daemon) -> None:
    daemon.job("idle", "Idle", env={"A": "1"})
    daemon.start()
    pid = daemon.wait_state("idle", "running")["pid"]
    for _ in range(3):
        assert daemon.reload()["unchanged"] == ["idle"]
    assert daemon.hb("idle")["pid"] == pid
    assert daemon.status("idle")["told"] == []


def test_what_needs_no_new_run_is_in_force_without_one(daemon: Daemon) -> None:
    changes: dict[str, Any] = {
        "restart": "never",
        "tags": ["new"],
        "kill_grace": 9.5,
        "autostart": False,
        "max_failures": 9,
        "backoff": {"first_s": 3.0},
        "log": {"keep": 3},
        "history": {"keep_days": 3.0},
    }
    for key in changes:
        daemon.job(key, "Idle")
    daemon.start()
    pids = pids_of(daemon.wait_all("running"))
    for key, value in changes.items():
        daemon.job(key, "Idle", **{key: value})
    assert daemon.reload()["changed"] == sorted(changes)
    for key, value in changes.items():
        whole = daemon.get(f"/jobs/{key}").json()
        assert (whole["state"], whole["pid"]) == ("running", pids[key])
        spec = whole["spec"][key]
        assert {name: spec[name] for name in value} == value if isinstance(value, dict) else spec == value
        assert daemon.status(key)["told"] == []


BURST = """
from harnessd import Cradle

class Burst(Cradle):
    def run(self):
        self.set_status("up")
        self.get_msg(timeout=None)
        for number in range(100):
            self.set_status(number)
        self.get_msg(timeout=None)
"""


def test_a_changed_rate_goes_for_the_run_that_is_there(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "burst.py").write_text(BURST)
    daemon.job("burst", f"{tmp_path}/burst.py:Burst", history={"max_rate": 1})
    daemon.start()
    daemon.status("burst")
    daemon.job("burst", f"{tmp_path}/burst.py:Burst", history={"max_rate": 1_000_000})
    assert daemon.reload()["changed"] == ["burst"]
    daemon.post("/jobs/burst/config", {}, wait=30)
    daemon.wait_for(lambda: daemon.rows("SELECT count(*) FROM status") == [(101,)], "each status is stored")


def test_a_changed_restart_policy_decides_the_next_exit(daemon: Daemon, tmp_path: Path) -> None:
    daemon.job("waits", "Waits", args=[f"{tmp_path}/go", "3"], restart="always")
    daemon.start()
    daemon.status("waits")
    daemon.job("waits", "Waits", args=[f"{tmp_path}/go", "3"], restart="never")
    daemon.reload()
    (daemon.folder / "go").touch()
    hb = daemon.wait_state("waits", "failed")
    assert hb["last_exit"]["code"] == 3
    assert hb["restarts"] == 0


def test_what_needs_a_new_run_gets_one(daemon: Daemon) -> None:
    changes: dict[str, Any] = {
        "args": ["new"],
        "env": {"A": "2"},
        "cwd": "/",
        "umask": "027",
        "nice": 1,
        "limits": {"core": 0},
        "control": "signals",
    }
    for key in changes:
        daemon.job(key, "Idle")
    daemon.start()
    pids = pids_of(daemon.wait_all("running"))
    for key, value in changes.items():
        daemon.job(key, "Idle", **{key: value})
    assert daemon.reload()["changed"] == sorted(changes)
    for key, pid in pids.items():
        daemon.wait_for(lambda key=key, pid=pid: daemon.hb(key)["pid"] not in (pid, None), "a new run")
    assert {job["restarts"] for job in daemon.wait_all("running").values()} == {0}


def test_a_changed_config_goes_as_config_over_which_the_overrides_lie(daemon: Daemon) -> None:
    daemon.job("idle", "Idle", config={"a": 1, "b": {"x": 1, "y": 1}})
    daemon.start()
    pid = daemon.wait_state("idle", "running")["pid"]
    daemon.post("/jobs/idle/config", {"b": {"y": 2}}, wait=30)
    daemon.job("idle", "Idle", config={"a": 5, "b": {"x": 5, "y": 5}, "c": 5})
    assert daemon.reload()["changed"] == ["idle"]
    daemon.wait_status("idle", pid=pid, config={"a": 5, "b": {"x": 5, "y": 2}, "c": 5})
    assert daemon.status("idle")["told"] == [Command.CONFIG, Command.CONFIG]
    assert daemon.get("/jobs/idle/config").json()["effective"] == {"a": 5, "b": {"x": 5, "y": 2}, "c": 5}


def test_a_changed_config_of_a_job_that_is_down_is_found_at_its_start(daemon: Daemon) -> None:
    daemon.job("idle", "Idle", autostart=False, config={"a": 1})
    daemon.start()
    daemon.job("idle", "Idle", autostart=False, config={"a": 2})
    daemon.reload()
    assert daemon.hb("idle")["state"] == "stopped"
    daemon.get("/jobs/idle/start", wait=30)
    daemon.wait_status("idle", config={"a": 2})


def test_a_broken_file_leaves_the_job_as_it_was_and_is_reported_everywhere(daemon: Daemon) -> None:
    daemon.job("idle", "Idle", args=["old"])
    daemon.job("other", "Idle")
    daemon.start()
    pids = {name: job["pid"] for name, job in daemon.wait_all("running").items()}
    daemon.job("idle", "Idle", args=["new"], restrat="always")
    daemon.job("other", "Idle", tags=["new"])
    answer = daemon.reload()
    (problem,) = answer["refused"]["idle"]
    assert "idle.json" in problem
    assert "restrat" in problem
    assert "'restart'" in problem
    assert answer["changed"] == ["other"]
    assert answer["removed"] == []
    whole = daemon.get("/jobs/idle").json()
    assert whole["problems"] == [problem]
    assert whole["pid"] == pids["idle"]
    assert whole["spec"]["args"] == ["old"]
    assert problem in daemon.log
    # A server that starts now knows the job from the one before it, and says so too.
    daemon.wait_new_server(daemon.kill_server())
    assert daemon.get("/jobs/idle").json()["problems"] == [problem]
    assert {name: job["pid"] for name, job in daemon.jobs().items()} == pids
    daemon.job("idle", "Idle", args=["old"])
    assert daemon.reload()["refused"] == {}
    assert daemon.get("/jobs/idle").json()["problems"] == []
    assert daemon.hb("idle")["pid"] == pids["idle"]


def test_no_contents_of_a_file_stop_a_job(daemon: Daemon) -> None:
    daemon.write("idle", 'command = ["sleep", "3600"]')
    daemon.start()
    pid = daemon.wait_for(lambda: daemon.hb("idle")["pid"], "it has a process")
    for text in ("entrypoint = [", "", "entrypoint = 'nowhere.py:Job'", "command = []", "\x00"):
        daemon.write("idle", text)
        assert list(daemon.reload()["refused"]) == ["idle"]
        assert daemon.hb("idle")["pid"] == pid


def test_a_doubled_name_is_refused(daemon: Daemon) -> None:
    daemon.write("idle", 'command = ["sleep", "3600"]')
    daemon.start()
    pid = daemon.wait_state("idle", "running")["pid"]
    daemon.job("idle", ["sleep", "1"])
    (first, second) = daemon.reload()["refused"]["idle"]
    assert "doubled" in first
    assert "idle.json" in second + first
    assert daemon.hb("idle")["pid"] == pid


def test_broken_settings_are_refused_and_the_old_ones_stay(daemon: Daemon) -> None:
    daemon.job("one", "Idle")
    daemon.job("two", "Idle")
    daemon.settings('default_job = "one"')
    daemon.start()
    daemon.wait_all("running")
    daemon.settings('default_job = "three"')
    (daemon.config / "jobs" / "two.json").unlink()
    answer = daemon.reload()
    assert "three" in answer["refused"]["harnessd"][0]
    assert answer["removed"] == ["two"]
    assert daemon.get("/hb").json()["job"] == "one"


def test_settings_that_need_a_new_server_are_named(daemon: Daemon) -> None:
    daemon.job("one", "Idle")
    daemon.job("two", "Idle")
    daemon.start()
    daemon.wait_all("running")
    daemon.settings('default_job = "two"\nsample_seconds = 5', http="max_body_bytes = 10")
    assert sorted(daemon.reload()["restart_needed"]) == ["http", "sample_seconds"]
    assert daemon.get("/hb").json()["job"] == "two"
    pid = daemon.server_pid()
    daemon.tell(signal.SIGUSR2)
    daemon.wait_new_server(pid)
    assert daemon.post("/jobs/one/config", {"key": "longer than ten bytes"}).status_code == 413


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_another_address_is_listened_on_after_a_replacement_and_the_old_one_is_let_go(
    daemon: Daemon, host: str
) -> None:
    daemon.start()
    pid, old = daemon.server_pid(), daemon.port
    if host == "127.0.0.1":
        daemon.port = free_port()
    settings = daemon.config / "harnessd.toml"
    daemon.settings()
    settings.write_text(settings.read_text().replace('host = "127.0.0.1"', f'host = "{host}"'))
    daemon.tell(signal.SIGUSR2)
    daemon.wait_serving()
    daemon.wait_new_server(pid)
    if daemon.port != old:
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", old)) == errno.ECONNREFUSED
    assert daemon.log.count("server ended") == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_an_address_that_cannot_be_had_leaves_the_old_one(daemon: Daemon, host: str) -> None:
    daemon.job("idle", "Idle")
    daemon.start()
    pid, old = daemon.wait_state("idle", "running")["pid"], daemon.port
    settings = daemon.config / "harnessd.toml"
    with socket.socket() as taken:
        if host == "127.0.0.1":
            taken.bind((host, 0))
            taken.listen()
            daemon.port = taken.getsockname()[1]
        daemon.settings()
        new, daemon.port = daemon.port, old
        settings.write_text(settings.read_text().replace('host = "127.0.0.1"', f'host = "{host}"'))
        serving = f"serving 1 jobs on http://127.0.0.1:{old}"
        for server in (2, 3):  # the third one finds what the second has left
            daemon.kill_server()
            until(lambda count=server: daemon.log.count(serving) == count, "it says where it serves")  # type: ignore[misc]
        assert daemon.log.count(f"cannot listen on http://{host}:{new}") == 2
    assert daemon.hb("idle")["pid"] == pid
    server, daemon.port = daemon.server_pid(), new
    daemon.settings()
    daemon.tell(signal.SIGUSR2)
    daemon.wait_serving()
    daemon.wait_new_server(server)
    assert daemon.hb("idle")["pid"] == pid


@pytest.mark.parametrize("gone", ["", "harnessd.toml", "jobs", "the target of jobs"])
def test_a_config_directory_that_is_gone_removes_nothing(daemon: Daemon, gone: str) -> None:
    daemon.job("idle", "Idle")
    daemon.start()
    pid = daemon.wait_state("idle", "running")["pid"]
    path, elsewhere = daemon.config / gone.removeprefix("the target of "), daemon.folder / "elsewhere"
    path.rename(elsewhere)
    if gone.startswith("the target"):
        path.symlink_to(daemon.folder / "away")
    answer = daemon.post("/reload")
    assert answer.status_code in (409, 422, 503)
    assert answer.headers["content-type"] == "application/problem+json"
    assert "config" in answer.json()["detail"]
    daemon.tell(signal.SIGHUP)
    until(lambda: "cannot reload" in daemon.log, "it is logged")
    daemon.wait_new_server(daemon.kill_server())
    assert daemon.hb("idle")["pid"] == pid
    path.unlink(missing_ok=True)
    elsewhere.rename(path)
    assert daemon.reload()["unchanged"] == ["idle"]


def test_sighup_reloads_and_logs_what_was_done(daemon: Daemon) -> None:
    daemon.job("one", "Idle")
    daemon.start()
    pid = daemon.wait_state("one", "running")["pid"]
    daemon.job("two", "Idle")
    daemon.job("one", "Idle", bogus=1)
    daemon.tell(signal.SIGHUP)
    daemon.wait_for(lambda: "two" in daemon.jobs(), "the new job is there")
    daemon.wait_state("two", "running")
    assert daemon.hb("one")["pid"] == pid
    until(lambda: "bogus" in daemon.log and "msg=reloaded added=1 " in daemon.log, "it is logged")
    (data,) = daemon.wait_for(lambda: daemon.rows("SELECT data FROM event WHERE kind = 'reload'"), "it is recorded")
    assert "two" in data[0]


def test_a_disabled_file_is_as_none(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    daemon.start()
    daemon.wait_state("idle", "running")
    daemon.job("idle", "Idle", enabled=False)
    assert daemon.reload()["removed"] == ["idle"]
    daemon.wait_for(lambda: not daemon.jobs(), "it is deregistered")
    daemon.job("idle", "Idle")
    assert daemon.reload()["added"] == ["idle"]
    daemon.wait_state("idle", "running")


def test_a_removed_job_that_comes_back_while_it_is_stopping_runs_again(daemon: Daemon) -> None:
    path = daemon.job("stubborn", "Stubborn", kill_grace=0.5)
    daemon.start()
    daemon.status("stubborn")
    path.unlink()
    assert daemon.reload()["removed"] == ["stubborn"]
    assert daemon.hb("stubborn")["state"] == "stopping"
    daemon.job("stubborn", "Stubborn", kill_grace=0.5)
    daemon.reload()
    daemon.wait_state("stubborn", "running")


def test_a_changed_file_of_a_failed_job_starts_it_afresh(daemon: Daemon) -> None:
    daemon.job("idle", "helpers_that_are_nowhere:Idle", max_failures=1, start_seconds=60)
    daemon.start()
    daemon.wait_state("idle", "failed")
    daemon.job("idle", "Idle", max_failures=1)
    daemon.reload()
    daemon.wait_state("idle", "running")


def test_a_file_removed_while_no_server_is_there_ends_the_run(daemon: Daemon) -> None:
    daemon.job("stays", "Idle")
    daemon.job("goes", "Idle")
    daemon.start()
    before = daemon.wait_all("running")
    (daemon.config / "jobs" / "goes.json").unlink()
    daemon.wait_new_server(daemon.kill_server())
    daemon.wait_for(lambda: "goes" not in daemon.jobs(), "the removed job is deregistered")
    assert ended(before["goes"]["pid"])
    assert daemon.hb("stays")["pid"] == before["stays"]["pid"]
    (row,) = daemon.wait_for(
        lambda: daemon.rows("SELECT reason FROM run WHERE pid = ? AND reason NOTNULL", before["goes"]["pid"]),
        "its end is recorded",
    )
    assert row == ("stopped",)
