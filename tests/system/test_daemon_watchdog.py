"""Jobs that hang for real, and what the daemon finds, keeps and does."""

from __future__ import annotations

import json
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.daemon import Daemon, free_port
from helpers.documents import Shell, commands, fenced, text
from helpers.waiting import until

FAST = "sample_seconds = 0.1"
JOB = '''
import os, threading, time
from harnessd import Cradle

class Hangs(Cradle):
    """Polls, and hangs in stuck() as long as the file is there."""
    def run(self, path):
        threading.Thread(target=self.works, name="worker", daemon=True).start()
        while True:
            self.get_msg()
            self.set_status({"pid": os.getpid()})
            while os.path.exists(path):
                self.stuck()
            time.sleep(0.02)

    def stuck(self):
        time.sleep(0.05)

    def works(self):
        time.sleep(3600)

class Loads(Cradle):
    """Has not come to its first poll."""
    def run(self):
        self.set_status({"pid": os.getpid()})
        time.sleep(3600)
'''
WEB = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(500 if os.path.exists(sys.argv[2]) else 200)
        self.end_headers()
    def log_message(self, *args): pass

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def hang(daemon: Daemon) -> Path:
    """The file that has the jobs hang."""
    (daemon.folder / "hangs.py").write_text(JOB)
    daemon.settings(FAST)
    return daemon.folder / "hang"


def hanging(daemon: Daemon, name: str, hang: Path, action: str = "restart", **keys: Any) -> None:
    watchdog = {"pulse_seconds": 1, "action": action}
    daemon.job(name, f"{daemon.folder}/hangs.py:Hangs", args=[str(hang)], watchdog=watchdog, **keys)


def events(daemon: Daemon, job: str, *kinds: str) -> list[dict[str, Any]]:
    """Return the events of these kinds, oldest first."""
    return list(daemon.get(f"/jobs/{job}/events", kind=",".join(kinds), order="asc").json()["rows"])


def test_a_job_that_hangs_is_started_again_and_where_it_stood_is_kept(daemon: Daemon, hang: Path) -> None:
    hanging(daemon, "hangs", hang, kill_grace=0.5)
    daemon.job("loads", f"{daemon.folder}/hangs.py:Loads", watchdog={"pulse_seconds": 1})
    daemon.job("idle", "Idle", watchdog={"pulse_seconds": 1})
    daemon.start()
    first = daemon.status("hangs")["pid"]
    others = [daemon.status(name)["pid"] for name in ("loads", "idle")]
    hang.touch()
    daemon.wait_for(lambda: daemon.hb("hangs")["restarts"] == 1, "it is started again")
    hang.unlink()
    hb = daemon.wait_state("hangs", "running")
    assert hb["pid"] != first and hb["last_exit"]["reason"] == "hung"
    kept = events(daemon, "hangs", "hung", "state")
    found, stopping = next((a, b) for a, b in pairwise(kept) if a["kind"] == "hung")
    assert stopping["data"]["to"] == "stopping"  # recorded before it acted
    assert 1 <= found["data"]["age_s"] < 30
    main, worker = found["data"]["stack"]
    assert "stuck" in [frame["function"].rpartition(".")[2] for frame in main["frames"][:2]]
    assert worker["name"] == "worker"
    assert [daemon.hb(name)["pid"] for name in ("loads", "idle")] == others


def test_notify_tells_once_a_server_and_again_when_it_is_over(daemon: Daemon, hang: Path) -> None:
    hanging(daemon, "hangs", hang, "notify")
    daemon.start()
    pid = daemon.status("hangs")["pid"]
    hang.touch()
    daemon.wait_for(lambda: events(daemon, "hangs", "hung"), "it is told")
    assert daemon.hb("hangs")["hung_s"] >= 1
    daemon.wait_new_server(daemon.kill_server())
    assert daemon.hb("hangs")["hung_s"] is None  # it counts from its own start
    daemon.wait_for(lambda: len(events(daemon, "hangs", "hung")) == 2, "the new one finds it too")
    hang.unlink()
    daemon.wait_for(lambda: events(daemon, "hangs", "hung-over"), "it is over")
    assert [row["kind"] for row in events(daemon, "hangs", "hung", "hung-over")] == ["hung", "hung", "hung-over"]
    hb = daemon.hb("hangs")
    assert (hb["pid"], hb["hung_s"], hb["restarts"]) == (pid, None, 0)


def test_what_is_paused_or_stopped_by_a_signal_is_left_alone_and_a_reload_arms_the_watchdog(
    daemon: Daemon, hang: Path
) -> None:
    paused = {"control": "signals"}
    hanging(daemon, "paused", hang, **paused)
    hanging(daemon, "stopped", hang)
    hanging(daemon, "control", hang, "notify")
    daemon.job("later", f"{daemon.folder}/hangs.py:Hangs", args=[str(hang)])
    daemon.start()
    pids = {name: daemon.status(name)["pid"] for name in ("paused", "stopped", "control", "later")}
    assert daemon.get("/jobs/paused/pause").status_code == 202
    os.kill(pids["stopped"], signal.SIGSTOP)
    until(lambda: daemon.hb("stopped")["process"]["status"] == "stopped", "it is stopped")
    hang.touch()
    daemon.wait_for(lambda: events(daemon, "control", "hung"), "another of the same length hangs")
    for name in ("paused", "stopped", "later"):
        hb = daemon.hb(name)
        assert (hb["pid"], hb["hung_s"], events(daemon, name, "hung")) == (pids[name], None, []), name
    hanging(daemon, "later", hang, "notify")
    assert daemon.reload()["changed"] == ["later"]
    daemon.wait_for(lambda: events(daemon, "later", "hung"), "the new watchdog sees it")
    assert daemon.hb("later")["pid"] == pids["later"]
    os.kill(pids["stopped"], signal.SIGCONT)


def test_a_server_whose_check_fails_is_started_again(daemon: Daemon, tmp_path: Path) -> None:
    sick, port = tmp_path / "sick", free_port()
    (tmp_path / "web.py").write_text(WEB)
    check = {"http": f"http://127.0.0.1:{port}/health", "every": 1, "failures": 1}
    daemon.settings(FAST)
    daemon.job("web", ["python3", str(tmp_path / "web.py"), str(port), str(sick)], check=check, start_seconds=0.2)
    daemon.start()
    first = daemon.wait_for(lambda: (hb := daemon.hb("web"))["check"] and hb["check"]["ok"] and hb["pid"], "it is well")
    sick.touch()
    daemon.wait_for(lambda: events(daemon, "web", "unhealthy"), "it is told")
    sick.unlink()
    daemon.wait_for(lambda: events(daemon, "web", "healthy"), "it is well again")
    hb = daemon.hb("web")
    assert hb["pid"] != first and hb["last_exit"]["reason"] == "unhealthy" and hb["check"]["failures"] == 0
    (told,) = events(daemon, "web", "unhealthy")
    assert told["data"] == {"failures": 1, "error": "answered 500", "action": "restart"}


def test_the_stack_of_a_job_shows_its_threads_and_hides_its_values(daemon: Daemon, hang: Path) -> None:
    hang.touch()
    hanging(daemon, "hangs", hang, "notify")
    daemon.job("sleeps", ["sleep", "3600"])
    daemon.job("late", "Idle", autostart=False)
    daemon.start()
    daemon.status("hangs")
    answer = daemon.get("/jobs/hangs/stack")
    assert answer.status_code == 200
    (process,) = answer.json()["processes"]
    assert process["pid"] == daemon.hb("hangs")["pid"]
    assert [thread["name"] for thread in process["threads"]] == ["MainThread", "worker"]
    main = [frame["function"].rpartition(".")[2] for frame in process["threads"][0]["frames"]]
    assert "run" in main and set(process["threads"][0]["frames"][0]) == {"function", "file", "line"}
    assert f'{hang}"' not in json.dumps(process)
    assert daemon.get("/jobs/hangs/stack", all="1").json()["processes"][0]["pid"] == process["pid"]
    assert daemon.get("/jobs/hangs/stack", all="x").status_code == 400
    for name, kind in (("sleeps", "not-python"), ("late", "wrong-state")):
        refused = daemon.get(f"/jobs/{name}/stack")
        assert (refused.status_code, refused.json()["kind"]) == (409, kind)
    assert {each["status_code"] for each in daemon.get("/jobs/all/stack").json()["results"]} == {200, 409}


def test_the_jobs_of_the_page_work_and_its_requests_are_answered(daemon: Daemon) -> None:
    page = text("docs/watchdog.md")
    (daemon.config / "feed.py").write_text(
        f"{JOB}\nclass Feed(Hangs):\n    def run(self): super().run('/nowhere/at/all')\n"
    )
    for block in fenced(page, "toml"):
        name = block.split("/")[2].partition(".toml")[0]
        daemon.write(name, block.replace("8000", str(free_port())).replace("every = 10", "every = 1"))
    daemon.settings(FAST)
    daemon.start()
    daemon.status("feed")
    shell = Shell(daemon.folder, daemon.port)
    for line in (*commands(page, "curl"), *commands(page, "harnessd")):
        assert shell(line)
    daemon.wait_for(lambda: (daemon.hb("site")["check"] or {}).get("ok"), "the site is well")
