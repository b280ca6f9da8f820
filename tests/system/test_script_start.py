"""How a script is started, and what stops the start."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.script import Script
from helpers.waiting import until

Start = Callable[..., Script]

WAITING = """
class VolTarget(Cradle):
    def run(self, *args):
        self.set_status({"args": args, "argv": sys.argv[1:], "config": self.get_config()})
        while msg := self.get_msg(timeout=None):
            self.set_status({"cmd": msg["cmd"], "data": msg["data"]})
            if msg["cmd"] == Command.STOP: return 7
"""
EXAMPLE = """
class TestJob(Cradle):
    def run(self, *args):
        while True:
            msg = self.get_msg()
            if msg and msg["cmd"] == Command.START:
                self.set_status(status={"key": 1})

if __name__ == "__main__":
    job = TestJob()
    sys.exit(asyncio.run(ProcessHarness().main(job)))
"""


def curl(*args: str) -> dict[str, object]:
    done = subprocess.run(["curl", "-sS", "--max-time", "30", *args], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.mark.skipif(not is_free(2222), reason="the default port is in use")
def test_eight_curl_lines_on_the_default_port(start: Start) -> None:
    script = start(EXAMPLE)
    assert script.url == "http://127.0.0.1:2222"
    url = script.url
    until(lambda: script.hb()["alive"], "the job is alive")
    assert curl("-X", "GET", f"{url}/hb")["job"] == "test-job"
    assert curl("-X", "GET", f"{url}/start")["verb"] == "start"
    until(lambda: curl("-X", "GET", f"{url}/status")["status"] == {"key": 1}, "the status is there")
    assert curl("-X", "GET", f"{url}/pause")["queued"] is True
    until(lambda: script.hb()["state"] == "paused", "it is paused")
    assert curl("-X", "GET", f"{url}/resume")["queued"] is True
    until(lambda: script.hb()["state"] == "running", "it runs again")
    assert curl("-X", "POST", f"{url}/config", "-d", "{'target_vol':4.2}")["verb"] == "config"
    assert curl(f"{url}/config")["effective"] == {"target_vol": 4.2}
    assert curl("-X", "GET", f"{url}/stop")["verb"] == "stop"
    killed = curl("-X", "GET", f"{url}/kill")
    assert killed["exit"]["signal"] == "SIGTERM" and killed["exit"]["reason"] == "killed"  # type: ignore[index]
    assert script.wait() == 143


def test_verbs_by_the_jobs_name_and_exit_code_of_the_job(start: Start) -> None:
    script = start(WAITING, job="VolTarget()")
    assert script.status() == {"args": [], "argv": [], "config": {}}
    assert script.hb()["job"] == "vol-target"
    sent = script.post("/jobs/vol-target/config", '{"a": [1, 2]}', wait=20)
    assert sent.status_code == 200 and sent.json()["read"] is True
    script.until_status({"cmd": "CONFIG", "data": {"a": [1, 2]}})
    assert script.get("/jobs/vol-target/stop").status_code == 202
    assert script.wait() == 7
    assert 'vol-target stopped: exit code 7; last status {"cmd":"STOP","data":null}' in script.err


def test_name_and_config_of_the_code(start: Start) -> None:
    script = start(WAITING, job="VolTarget(), 'x', 'y'", config={"name": "etl.1", "config": {"a": {"b": 1}}})
    assert script.status() == {"args": ["x", "y"], "argv": [], "config": {"a": {"b": 1}}}
    assert script.get("/jobs/etl.1/hb").json()["job"] == "etl.1"
    assert script.get("/jobs/vol-target/hb").status_code == 404
    assert [job["name"] for job in script.get("/jobs").json()["jobs"]] == ["etl.1"]
    assert script.get("/healthz").json()["status"] == "ok"


FORMS = {
    "-x JSON": ["-x", '{"name": "given", "config": {"a": 2}}'],
    "-x=JSON": ['-x={"name": "given", "config": {"a": 2}}'],
    "long JSON": ["--harness-config", '{"name": "given", "config": {"a": 2}}'],
    "long=JSON": ['--harness-config={"name": "given", "config": {"a": 2}}'],
    "-x JSON file": ["-x", "given.json"],
    "long=TOML file": ["--harness-config=given.toml"],
    "twice": ["-x", '{"name": "given"}', '-x={"config": {"a": 2}}'],
}


def test_option_is_laid_over_the_code_and_hidden_from_the_job(start: Start, tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text('{"name": "given", "config": {"a": 2}}')
    (tmp_path / "given.toml").write_text('name = "given"\n[config]\na = 2\n')
    forms = [[part.replace("given.", f"{tmp_path}/given.") for part in form] for form in FORMS.values()]
    script = start(f"""
        class Job(Cradle):
            def run(self): print(sys.argv[1:], self.get_config())
        if __name__ == "__main__":
            for form in {forms!r}:
                sys.argv[1:] = ["--symbol", *form, "SPX", "--", "-x"]
                launch(Job, {{"http": {{"port": 0}}, "config": {{"a": 1, "b": 1}}}})
        """)
    assert script.wait() == 0
    assert script.out.splitlines() == ["['--symbol', 'SPX', '--', '-x'] {'a': 2, 'b': 1}"] * len(forms)
    assert script.err.count("harnessd: given listens on") == len(forms)


BAD = {
    "file": (["-x", "/no/such/file"], "cannot read -x '/no/such/file': No such file or directory"),
    "directory": (["-x", "/"], "cannot read -x '/': Is a directory"),
    "nothing": (["-x", ""], "-x needs a file or inline JSON"),
    "nothing behind =": (["-x="], "-x needs a file or inline JSON"),
    "JSON": (["-x", '{"a": '], "cannot read -x '{\"a\": ': Expecting value"),
    "no object": (["--harness-config=/dev/null"], "cannot read --harness-config '/dev/null': Expecting value"),
    "no value": (["a", "-x"], "-x needs a file or inline JSON"),
    "unknown key": (["-x", '{"htp": {}}'], "htp"),
    "two problems": (["-x", '{"htp": {}, "kill_grace": "x"}'], "; "),
    "wrong type": (["-x", '{"http": {"port": "x"}}'], "http.port"),
    "port": (["-x", '{"http": {"port": 70000}}'], "http.port"),
    "deep": (["-x", '{"a":' * 20_000], "cannot read -x"),
}


@pytest.mark.parametrize("case", ["JSON", "unknown key"])
def test_bad_option_is_one_line_and_exit_code_2(case: str, start: Start) -> None:
    argv, why = BAD[case]
    script = start(WAITING, job="VolTarget()", argv=argv)
    assert script.wait() == 2
    assert script.err.startswith("harnessd: ") and script.err.count("\n") == 1
    assert why in script.err and script.out == ""


def test_every_bad_option_has_its_line(start: Start) -> None:
    script = start(f"""
        if __name__ == "__main__":
            for argv in {[argv for argv, _ in BAD.values()]!r}:
                sys.argv[1:] = argv
                try:
                    launch(lambda: print("never"), {{"http": {{"port": 0}}}})
                except SystemExit as error:
                    print(error.code)
        """)
    assert script.wait() == 0
    assert script.out.split() == ["2"] * len(BAD)
    lines = script.err.splitlines()
    assert len(lines) == len(BAD)
    for line, (_, why) in zip(lines, BAD.values(), strict=True):
        assert line.startswith("harnessd: ") and why in line


@pytest.mark.parametrize(
    ("job", "config", "why"),
    [
        ("5", {}, "harnessd.errors.NotAJob: cannot run int: an object of a class that extends Cradle is wanted"),
        ("VolTarget", {}, "harnessd.errors.NotAJob: cannot run the class VolTarget: an object of a class"),
        ("None", {}, "harnessd.errors.NotAJob: cannot run NoneType"),
        ("VolTarget()", {"htp": 1}, "harnessd.errors.ConfigError: config: htp"),
        ("VolTarget()", {"http": {"host": "203.0.113.7"}}, "harnessd.errors.CannotListen: cannot listen on"),
    ],
)
def test_start_that_cannot_be_ends_with_a_clear_error(job: str, config: object, why: str, start: Start) -> None:
    script = start(WAITING, job=job, config=config)
    assert script.wait() == 1
    assert why in script.err.splitlines()[-1]


def test_port_in_use_is_said_by_main_and_by_launch(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        script = start(WAITING, job="VolTarget()", config={"http": {"port": port}})
        body = WAITING + f"\nif __name__ == '__main__': launch(VolTarget(), {{'http': {{'port': {port}}}}}, exit=True)"
        launched = start(body)
        assert (script.wait(), launched.wait()) == (1, 2)
    why = f"cannot listen on http://127.0.0.1:{port}: Address already in use; set http.port to a free one\n"
    assert script.err.endswith(f"harnessd.errors.CannotListen: {why}") and launched.err == f"harnessd: {why}"


def test_script_with_threads_is_refused(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def __init__(self):
                threading.Thread(target=time.sleep, args=(1000,), name="poller", daemon=True).start()
            def run(self): print("never")
        """)
    assert script.wait() == 1
    assert "cannot start the job: the script runs other threads (poller)" in script.err and script.out == ""


def test_a_second_job_beside_the_first_is_refused(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self): self.get_msg(timeout=0.1)
        async def both():
            harness = ProcessHarness({"http": {"port": 0}})
            print(*await asyncio.gather(harness.main(Job()), harness.main(Job()), return_exceptions=True))
            print(await harness.main(Job()))
        if __name__ == "__main__":
            asyncio.run(both())
        """)
    assert script.wait() == 0
    why = "cannot start the job: this script harnesses another; `harnessd serve` is for several"
    assert script.out == f"0 {why}\n0\n"


def test_job_object_that_cannot_be_pickled_is_no_obstacle(start: Start) -> None:
    script = start("""
        import socket
        class Job(Cradle):
            __slots__ = ("file", "double", "pair", "lock", "generator")
            def __init__(self):
                self.file = open(__file__)
                self.double = lambda n: 2 * n
                self.pair = socket.socketpair()
                self.lock = threading.RLock()
                self.generator = (n for n in range(5))
            def run(self):
                self.pair[0].send(b"x")
                with self.lock:
                    received = self.pair[1].recv(1).decode()
                    self.set_status([self.double(4), received, next(self.generator), self.file.read(6)])
                self.get_msg(timeout=None)
        """)
    assert script.status() == [8, "x", 0, "import"]
    assert script.post("/kill").status_code == 200
    assert script.wait() == 143


LAUNCHES = """
def plain(): print("plain"); return 3
def taking(cradle): cradle.set_status("told"); return 4
async def awaited(cradle): await asyncio.sleep(0.001); cradle.set_status("awaited"); return 5
class Job(Cradle):
    def run(self, *args): self.set_status(args); return 6
class Missing: pass

if __name__ == "__main__":
    config = {"http": {"port": 0}}
    codes = [launch(plain, config), launch(taking, config), launch(awaited, config), launch(Job(), config),
             launch(Job, config, args=("a", "b")), launch(lambda: 7, config)]
    print(codes, flush=True)
    print(asyncio.run(ProcessHarness(config).main(Job())), flush=True)
    launch(Job, config, exit=True)
"""


def test_launch_takes_every_kind_of_job_one_after_the_other(start: Start) -> None:
    script = start(LAUNCHES)
    assert script.wait() == 6
    assert script.out == "plain\n[3, 4, 5, 6, 6, 7]\n6\n"
    names = [line.split()[1] for line in script.err.splitlines() if "listens" in line]
    assert names == ["plain", "taking", "awaited", "job", "job", "lambda", "job", "job"]
    assert 'job crashed: exit code 6; last status ["a","b"]' in script.err


def test_launch_of_what_is_no_job_is_one_line_and_2(start: Start) -> None:
    script = start("""
        class Missing: pass
        if __name__ == "__main__":
            try:
                print(launch(Missing))
            except BaseException as error:
                print(type(error).__name__, error)
            launch(5, exit=True)
        """)
    assert script.wait() == 2
    assert script.out == "2\n"
    assert script.err.splitlines() == [
        "harnessd: cannot run Missing: it does not extend Cradle",
        "harnessd: cannot run 5: a Cradle or a callable is wanted",
    ]


def test_journals_of_scripts_that_were_killed_are_cleared_away(start: Start, tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    config = {"runtime_dir": str(runtime)}
    first = start(WAITING, job="VolTarget()", config=config)
    first.status()
    first.process.kill()
    first.wait()
    assert len(os.listdir(runtime)) == 1
    second = start(WAITING, job="VolTarget()", config=config)
    second.status()
    (left,) = os.listdir(runtime)
    assert left.startswith(f"script-{second.pid}-")
    second.get("/kill")
    second.wait()
    assert os.listdir(runtime) == []
