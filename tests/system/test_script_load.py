"""A job that is too busy, stopped or deaf takes nothing from its harness, and its harness nothing from it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.script import Script
from helpers.waiting import until

Start = Callable[..., Script]

BUSY = {
    "holding the GIL": "sum(range(10**13))",
    "in a loop": "while True: pass",
    "in a long call": "x = list(range(10**7)); x.sort(key=lambda n: -n); x * 10**3",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
}
HB = {
    "job", "state", "alive", "pid", "uptime_s", "restarts", "process", "pulse", "status_age_s", "mailbox", "last_exit",
    "time",
}  # fmt: skip


@pytest.mark.parametrize("how", BUSY)
def test_hb_and_kill_never_wait_for_the_job(how: str, start: Start) -> None:
    script = start(f"""
        class Job(Cradle):
            def run(self):
                self.set_status("up")
                {BUSY[how]}
        """)
    script.until_status("up")
    for _ in range(200):
        assert script.get("/pause" if how == "stopped" else "/start").status_code == 202
    hb = script.get("/hb")
    assert hb.status_code == 200
    body = hb.json()
    assert body.keys() >= HB
    assert body["process"].keys() >= {"cpu_percent", "rss_bytes", "threads", "fds", "children", "status"}
    assert body["mailbox"] == {"waiting": 200} and body["pulse"]["polls"] == 0 and body["pulse"]["age_s"] is None
    assert body["alive"] is True and body["last_exit"] is None and body["status_age_s"] >= 0
    if how == "stopped":
        until(lambda: script.hb()["process"]["status"] == "stopped", "it is seen to be stopped")
    assert script.get("/kill").json()["exit"]["signal"] == "SIGTERM"
    assert script.wait() == 143


def test_commands_to_a_job_that_never_reads_are_429_once_its_mailbox_is_full(start: Start) -> None:
    script = start("class Job(Cradle):\n    def run(self):\n        self.set_status('up'); time.sleep(1000)")
    script.until_status("up")
    connection = http.client.HTTPConnection(script.url.removeprefix("http://"))
    codes = []
    for _ in range(5000):
        connection.request("POST", "/jobs/job/config", '{"n": 1}')
        with connection.getresponse() as answer:
            answer.read()
            codes.append(answer.status)
    connection.close()
    accepted = codes.index(429)
    assert len(codes) == 5000 and accepted >= 200
    assert set(codes[:accepted]) == {202} and set(codes[accepted:]) == {429}
    refused = script.post("/config", "{}")
    assert refused.json()["kind"] == "mailbox-full" and refused.headers["retry-after"] == "1"
    assert script.hb()["mailbox"] == {"waiting": accepted}
    assert script.get("/kill").status_code == 200


def test_commands_are_read_in_order_once_the_job_reads_again(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self):
                self.set_status("up")
                while not os.path.exists("go"): time.sleep(0.01)
                self.set_status([self.get_msg(timeout=None)["data"]["n"] for _ in range(200)])
                self.get_msg(timeout=None)
        """)
    script.until_status("up")
    for number in range(200):
        assert script.post("/config", json.dumps({"n": number})).status_code == 202
    (script.folder / "go").touch()
    script.until_status(list(range(200)))
    assert script.hb()["mailbox"] == {"waiting": 0}


def test_100_000_statuses_then_exit_lose_none(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self):
                print(all([self.set_status({"n": n}) for n in range(100_000)]))
        """)
    assert script.wait() == 0
    assert script.out == "True\n"
    assert script.err.endswith('job completed: exit code 0; last status {"n":99999}\n')


def test_waiting_job_is_woken_by_the_command_long_before_its_timeout(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self):
                self.set_status("up")
                msg = self.get_msg(timeout=3600)
                self.set_status([msg["cmd"], msg["data"], time.time() >= msg["time"], msg["id"]])
                self.get_msg(timeout=None)
        """)
    script.until_status("up")
    until(lambda: script.hb()["pulse"]["waiting"], "it waits")
    sent = script.post("/start", '{"a": 1}').json()
    script.until_status(["START", {"a": 1}, True, sent["id"]])


def test_threads_and_forked_children_share_the_mailbox_and_the_journal(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self):
                def read(who):
                    while (msg := self.get_msg(timeout=None))["cmd"] != Command.STOP:
                        os.write(1, f"{msg['data']['n']} {who}\\n".encode())
                        self.set_status(msg["data"]["n"])
                child = os.fork()
                threads = [threading.Thread(target=read, args=(f"{child == 0} {n}",)) for n in range(3)]
                for thread in threads: thread.start()
                for thread in threads: thread.join()
                if child == 0: os._exit(0)
                os.waitpid(child, 0)
        """)
    script.job_pid()
    for number in range(100):
        assert script.post("/config", json.dumps({"n": number})).status_code == 202
    until(lambda: script.out.count("\n") == 100, "all were read")
    assert sorted(int(line.split()[0]) for line in script.out.splitlines()) == list(range(100))
    for _ in range(6):
        script.post("/stop")
    assert script.wait() == 0


def test_full_journal_is_false_for_a_while_and_never_in_the_way(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self):
                written = [self.set_status("x" * 200_000) for _ in range(500)]
                print(True in written, False in written)
                while not self.set_status("last"): time.sleep(0.01)
        """, config={"journal_max_bytes": 1_000_000})  # fmt: skip
    assert script.wait() == 0
    assert script.out == "True True\n"
    assert script.err.count("the journal is full, 1000000 bytes wait to be stored") == 1
    assert script.err.endswith('last status "last"\n')


def test_file_size_limit_is_false_and_the_job_goes_on(start: Start) -> None:
    script = start("""
        import resource
        class Job(Cradle):
            def run(self):
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
                print([self.set_status(text * 400) for text in "abcd"])
                return 3
        """)
    assert script.wait() == 3
    assert script.out == "[True, True, False, False]\n"


@pytest.fixture
def small_disk() -> object:
    folder = tempfile.mkdtemp()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        os.rmdir(folder)
        pytest.skip("a filesystem cannot be mounted here")
    yield Path(folder)
    subprocess.run(["umount", folder], check=True)
    os.rmdir(folder)


def test_full_disk_under_the_journal_is_false_and_the_job_goes_on(small_disk: Path, start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self):
                with open(sys.argv[1] + "/ballast", "wb", buffering=0) as file:
                    try:
                        while True: file.write(bytes(4096))
                    except OSError: pass
                print([self.set_status("x" * 5000), self.set_status("y" * 5000)])
                os.unlink(sys.argv[1] + "/ballast")
                self.set_status("room again")
                self.get_msg(timeout=None)
        """, argv=[str(small_disk)], config={"runtime_dir": str(small_disk)})  # fmt: skip
    script.until_status("room again")
    assert script.out in ("", "[False, False]\n")
    script.signal(signal.SIGTERM)
    assert script.wait() == 143
    assert "cannot write the status: " in script.err
