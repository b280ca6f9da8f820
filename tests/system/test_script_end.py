"""How a harnessed script ends, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from helpers.brand import is_alive
from helpers.script import Script
from helpers.waiting import until

Start = Callable[..., Script]

SLEEPING = """
class Job(Cradle):
    def run(self):
        self.set_status("up")
        while True: time.sleep(1000)
"""
ORDERLY = """
class Job(Cradle):
    def run(self):
        def end(*_):
            self.set_status("saved")
            sys.exit(9)
        signal.signal(signal.SIGTERM, end)
        self.set_status("up")
        while True: time.sleep(1000)
"""
STUBBORN = """
class Job(Cradle):
    def run(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.set_status("up")
        while True: time.sleep(1000)
"""
# A job with every kind of descendant; each of them says on stdout that it is there.
FAMILY = """
import subprocess
def daemonise():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            print("daemonised", flush=True)
            os.closerange(0, 65536)
            time.sleep(1000)
        os._exit(0)
class Job(Cradle):
    def run(self):
        here = "echo here; exec sleep 1000"
        for command in (
            ["sh", "-c", here], ["setsid", "sh", "-c", here], ["setsid", "env", "-i", "/bin/sh", "-c", here],
            ["sh", "-c", "trap '' TERM; echo here; while :; do sleep 1; done"],
            ["sh", "-c", "(trap '' TERM; setsid sh -c \\"trap '' TERM; echo here; while :; do sleep 1; done\\") & "],
        ): subprocess.Popen(command)
        daemonise()
        self.set_status("up")
        while True: time.sleep(1000)
"""


def family(start: Start, **options: object) -> Script:
    script = start(FAMILY, config={"kill_grace": 0.5}, **options)
    script.until_status("up")
    until(lambda: script.out.count("\n") == 6, "all are there")
    return script


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_script_ends_the_job_in_an_orderly_way(number: signal.Signals, start: Start) -> None:
    script = start(ORDERLY, config={"kill_grace": 1000.0})
    script.until_status("up")
    script.signal(number)
    assert script.wait() == 9
    assert script.err.endswith('job killed: exit code 9; last status "saved"\n')
    assert "Traceback" not in script.err


def test_ctrl_c_in_the_terminal_does_not_reach_the_job_itself(start: Start) -> None:
    script = start(
        ORDERLY.replace(
            "signal.SIGTERM, end", "signal.SIGTERM, end); signal.signal(signal.SIGINT, lambda *_: os._exit(77)"
        )
    )
    script.until_status("up")
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait() == 9


def test_job_that_ignores_sigterm_is_killed_after_its_grace(start: Start) -> None:
    script = start(STUBBORN, config={"kill_grace": 0.2})
    script.until_status("up")
    script.signal(signal.SIGTERM)
    assert script.wait() == 137


def test_second_signal_does_not_wait_for_the_grace(start: Start) -> None:
    script = start(STUBBORN, config={"kill_grace": 1000.0})
    script.until_status("up")
    script.signal(signal.SIGINT)
    until(lambda: script.hb()["state"] == "stopping", "it is being ended")
    script.signal(signal.SIGINT)
    assert script.wait() == 137


@pytest.mark.parametrize(("query", "code"), [({}, 143), ({"grace": "0"}, 137), ({"grace": "500ms"}, 143)])
def test_kill_answers_once_nothing_is_left(query: dict[str, str], code: int, start: Start) -> None:
    script = family(start)
    killed = script.get("/kill", **query)
    assert killed.status_code == 200
    assert killed.json()["exit"]["signal"] == ("SIGKILL" if code == 137 else "SIGTERM")
    assert killed.json()["exit"]["reason"] == "killed"
    assert script.wait() == code


def test_kill_without_waiting_is_202(start: Start) -> None:
    script = start(SLEEPING)
    script.until_status("up")
    killed = script.post("/kill", wait="0")
    assert killed.status_code == 202 and killed.json()["exit"] is None
    assert script.wait() == 143


def test_kill_right_after_the_start_is_orderly_too(start: Start) -> None:
    script = start(SLEEPING, config={"kill_grace": 1000.0})
    assert script.get("/kill").status_code in (200, 409)  # 409: it is not started yet
    script.signal(signal.SIGTERM)
    assert script.wait() == 143


def test_interrupt_before_the_job_has_started_leaves_nothing(start: Start) -> None:
    script = start(SLEEPING)
    until(lambda: len(script.members()) > 1, "the keeper is there")
    script.signal(signal.SIGINT)
    assert script.wait() != 0


def test_what_the_job_leaves_at_its_own_end_is_ended(start: Start) -> None:
    script = start(FAMILY.replace("while True: time.sleep(1000)", "return 5"), config={"kill_grace": 0.2})
    assert script.wait() == 5


def test_script_killed_takes_the_jobs_whole_tree_with_it(start: Start) -> None:
    script = family(start)
    script.process.kill()
    assert script.wait() == -signal.SIGKILL


def test_keeper_killed_takes_the_run_with_it_and_main_raises(start: Start) -> None:
    script = family(start)
    os.kill(script.get("/healthz").json()["keeper_pid"], signal.SIGKILL)
    assert script.wait() == 1
    last = "harnessd.errors.KeeperLost: cannot go on: the keeper was killed, and the job with it"
    assert script.err.splitlines()[-1] == last


def test_keeper_told_to_end_ends_the_job_in_an_orderly_way(start: Start) -> None:
    script = start(ORDERLY)
    script.until_status("up")
    os.kill(script.get("/healthz").json()["keeper_pid"], signal.SIGTERM)
    assert script.wait() == 9


def test_job_killed_by_a_signal_is_128_and_its_number(start: Start) -> None:
    script = start(SLEEPING)
    script.until_status("up")
    os.kill(script.job_pid(), signal.SIGSEGV)
    assert script.wait() == 139
    assert 'job signaled: signal SIGSEGV; last status "up"' in script.err


def test_stop_is_a_message_and_the_jobs_own_end_its_exit_code(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self):
                while self.get_msg(timeout=None)["cmd"] != Command.STOP: pass
                return 4
        """)
    script.job_pid()
    assert script.get("/stop", wait="20").status_code == 200
    assert script.wait() == 4


def test_signal_handlers_are_given_back(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self): pass
        def own(*_): pass
        if __name__ == "__main__":
            signal.signal(signal.SIGTERM, own)
            launch(Job, {"http": {"port": 0}})
            print(signal.getsignal(signal.SIGTERM) is own)
            print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        """)
    assert script.wait() == 0
    assert script.out == "True\nTrue\n"


def test_cancelling_main_ends_the_job(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self): print(os.getpid(), flush=True); time.sleep(1000)
        async def main():
            task = asyncio.ensure_future(ProcessHarness({"http": {"port": 0}}).main(Job()))
            while not os.path.getsize("stdout"): await asyncio.sleep(0.01)
            task.cancel()
            try: await task
            except asyncio.CancelledError: print("cancelled")
        if __name__ == "__main__": asyncio.run(main())
        """)
    assert script.wait() == 0
    found = re.fullmatch(r"(\d+)\ncancelled\n", script.out)
    assert found and not is_alive(int(found[1]))


SLOW_STORAGE = """
from harnessd.server.database import Database
check = Database.check
Database.check = lambda self: (time.sleep(0.1), check(self))[1]
class Job(Cradle):
    def run(self):
        self.set_status("said")
"""


def test_on_a_slow_disk_a_script_ends_when_its_journal_is_stored_and_removed(start: Start, tmp_path: Path) -> None:
    script = start(SLOW_STORAGE, config={"state_dir": f"{tmp_path}/state", "runtime_dir": f"{tmp_path}/run"})
    assert script.wait() == 0
    assert "Traceback" not in script.err
    assert list((tmp_path / "run").rglob("*.jsonl")) == []
    with closing(sqlite3.connect(tmp_path / "state" / "harnessd.db")) as database:
        assert database.execute("SELECT exit_code, journal_done FROM run").fetchall() == [(0, 1)]


TRIMMED = """
from harnessd.server import archive
archive._FIRST_TRIM_S = archive._TRIM_S = 0.05
class Job(Cradle):
    def run(self):
        for number in range(100): self.set_status(number)
        self.get_msg(timeout=None)
"""


def test_old_history_is_forgotten_while_the_script_runs(start: Start, tmp_path: Path) -> None:
    folders = {"state_dir": f"{tmp_path}/state", "runtime_dir": f"{tmp_path}/run"}
    script = start(TRIMMED, config=folders | {"history": {"keep_rows_per_job": 10}})
    script.until_status(99)
    with closing(sqlite3.connect(tmp_path / "state" / "harnessd.db")) as database:
        query = "SELECT status FROM status ORDER BY id"
        until(lambda: [int(text) for (text,) in database.execute(query)] == [*range(90, 100)], "the oldest are gone")
