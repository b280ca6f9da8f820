"""What a run finds when it begins."""

from __future__ import annotations

import os
import pwd
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.rig import Rig
from helpers.waiting import until

from harnessd import Command

SLEEPING = """
class Job(Cradle):
    def run(self):
        self.set_status("up")
        time.sleep(1000)
"""
USER = """
import os
from harnessd import Cradle
class Job(Cradle):
    def run(self): self.set_status([os.getuid(), os.getgid(), os.getgroups()])
"""
LOOK = """
import resource
class Job(Cradle):
    def run(self):
        umask = os.umask(0)
        self.set_status({
            "cwd": os.getcwd(), "umask": umask, "nice": os.nice(0), "env": dict(os.environ),
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE), "cpu": resource.getrlimit(resource.RLIMIT_CPU),
            "uid": os.getuid(), "groups": sorted(os.getgroups()), "sid": os.getsid(0), "pid": os.getpid(),
            "ppid": os.getppid(), "mask": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "default": [signal.getsignal(number) is signal.SIG_DFL for number in
                        (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR2)],
            "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "wakeup": signal.set_wakeup_fd(-1), "main": sys.modules["__main__"].__name__,
            "threads": threading.active_count(), "stdin": sys.stdin.read(),
            "running": asyncio._get_running_loop() is not None,
        })
"""


def looked(keeper: Rig, **changes: Any) -> dict[str, Any]:
    code, run = keeper.run(LOOK, **changes)
    assert code == 0, run.out
    return dict(run.said()[0])


def test_run_is_pristine(keeper: Rig) -> None:
    found = looked(keeper)
    assert found["mask"] == [] and found["wakeup"] == -1 and not found["running"]
    assert found["sigint"] is (signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    assert found["default"] == [True] * 4
    assert found["sid"] == found["pid"] and found["ppid"] == keeper.process.pid
    assert (found["main"], found["threads"], found["stdin"]) == ("__main__", 1, "")
    assert found["nofile"] == list(resource.getrlimit(resource.RLIMIT_NOFILE))


def test_run_prints_any_file_name_where_the_interpreter_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")  # as under an init system that sets no locale
    made = Rig(tmp_path)
    try:
        code, run = made.run("class Job(Cradle):\n    def run(self): print(os.fsdecode(b'a\\xff'))\n")
        assert (code, Path(run.spec.output).read_bytes()) == (0, b"a\xff\n")
    finally:
        made.close()


def test_run_is_as_its_spec_says(keeper: Rig, tmp_path: Path) -> None:
    found = looked(
        keeper,
        cwd=str(tmp_path),
        umask=0o27,
        nice=3,
        env={**dict.fromkeys([*os.environ, "PYTHONPATH"]), "ONLY": "this", "TZ": "UTC"},
        limits={"cpu": 100, "nofile": 64, "core": 0},
    )
    assert (found["cwd"], found["umask"]) == (str(tmp_path), 0o27)
    assert found["nice"] == os.nice(0) + 3
    assert found["env"].pop("HARNESS_JOURNAL").endswith(".jsonl")
    assert found["env"] == {"ONLY": "this", "TZ": "UTC"}
    assert looked(keeper, env={"ONLY": "this"})["env"].items() >= {"ONLY": "this", "PATH": os.environ["PATH"]}.items()
    assert found["cpu"] == [100, 100] and found["nofile"] == [64, 64]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change to another user")
def test_run_becomes_its_user_and_reports_as_such(keeper: Rig, tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    place = Path("/tmp") / f"harnessd-test-{os.getpid()}"  # nobody cannot look into pytest's own directories
    place.mkdir()
    try:
        (place / "job.py").write_text(USER)
        for path, mode in ((place, 0o755), (place / "job.py", 0o644)):
            path.chmod(mode)
        ids = {"uid": nobody.pw_uid, "gid": nobody.pw_gid, "groups": [nobody.pw_gid]}
        code, run = keeper.run(entrypoint=f"{place / 'job.py'}:Job", **ids)
        assert code == 0, run.out
        assert run.said() == [[nobody.pw_uid, nobody.pw_gid, [nobody.pw_gid]]]
        assert os.stat(run.spec.journal).st_uid == nobody.pw_uid
    finally:
        (place / "job.py").unlink()
        place.rmdir()


def test_command_reports_through_the_journal_and_reads_its_mailbox(keeper: Rig) -> None:
    run = keeper.spawn(
        command=[
            "sh",
            "-c",
            'echo "{\\"status\\": {\\"up\\": $1}}" >> "$HARNESS_JOURNAL"; head -n1 <&"$HARNESS_MAILBOX"',
            "x",
        ],
        args=["5"],
    )
    run.until_said({"up": 5})
    run.send(Command.CONFIG, {"n": 1})
    assert keeper.ended(run)["code"] == 0
    assert run.out == '{"cmd":"CONFIG","data":{"n":1},"id":1,"time":1.5}\n'


def test_command_has_no_descriptor_of_the_harness_but_its_mailbox(keeper: Rig) -> None:
    _, run = keeper.run(command=["sh", "-c", "ls -l /proc/$$/fd; echo mailbox $HARNESS_MAILBOX; :"])
    mailbox = run.out.split("mailbox ")[1].strip()
    fds = {line.split()[8] for line in run.out.splitlines() if " -> " in line}
    assert fds == {"0", "1", "2", mailbox}


def test_command_has_the_signals_as_a_shell_gives_them(keeper: Rig) -> None:
    _, run = keeper.run(command=["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"])
    ordinary = (1 << 31) - 1  # above are glibc's own, which posix_spawn(3), say in make, leaves ignored
    assert [int(line.split()[1], 16) & ordinary for line in run.out.splitlines()] == [0, 0]


@pytest.mark.parametrize(
    ("changes", "code", "why"),
    [
        ({"command": ["no-such-program-anywhere"], "env": {"PATH": "/usr/bin"}}, 127, "No such file or directory"),
        ({"command": ["/no/such/program"]}, 127, "No such file or directory"),
        ({"command": ["/etc/passwd"]}, 126, "Permission denied"),
        ({"command": ["true"], "cwd": "/no/such/place"}, 126, "No such file or directory: /no/such/place"),
        ({"entrypoint": "x:Job", "cwd": "/no/such/place"}, 126, "No such file or directory: /no/such/place"),
        ({"entrypoint": "x:Job", "python": "/no/such/python"}, 127, "No such file or directory"),
        ({"command": ["true"], "limits": {"no_such_limit": 1}}, 126, "RLIMIT_NO_SUCH_LIMIT"),
    ],
)
def test_run_that_cannot_begin_says_why(keeper: Rig, changes: dict[str, Any], code: int, why: str) -> None:
    found, run = keeper.run(**changes)
    assert found == code
    assert run.out.startswith(f"harnessd: cannot start '{run.spec.job}': ") and why in run.out
    assert why in run.said("error")[0]


def test_output_is_appended(keeper: Rig, tmp_path: Path) -> None:
    path = tmp_path / "both.log"
    for word in ("one", "two"):
        keeper.run(command=["sh", "-c", f"echo {word}; echo {word} >&2"], output=str(path))
    assert path.read_text() == "one\none\ntwo\ntwo\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_printed_lines_are_there_at_once(keeper: Rig) -> None:
    run = keeper.spawn("class Job(Cradle):\n    def run(self):\n        print('now')\n        time.sleep(1000)")
    until(lambda: run.out == "now\n", "the line is in the file")


def test_job_is_named_in_the_process_list(keeper: Rig) -> None:
    run = keeper.spawn(SLEEPING)
    run.until_said("up")
    assert Path(f"/proc/{run.pid}/cmdline").read_bytes().rstrip(b"\0 ") == f"harnessd: {run.spec.job}".encode()


def test_run_of_a_low_descriptor_limit_has_its_mailbox_all_the_same(keeper: Rig) -> None:
    run = keeper.spawn("""
        class Job(Cradle):
            def run(self):
                self.set_status("up")
                self.set_status(self.get_msg(timeout=None)["data"])
        """, limits={"nofile": 16})  # fmt: skip
    run.until_said("up")
    run.send(Command.CONFIG, "read")
    assert keeper.ended(run)["code"] == 0 and run.said() == ["up", "read"]


OTHER_PYTHON = "/usr/bin/python3.11"


@pytest.mark.parametrize("python", [sys.executable, OTHER_PYTHON])
def test_job_under_an_interpreter_of_its_own(keeper: Rig, python: str, tmp_path: Path) -> None:
    if not os.path.exists(python):
        pytest.skip(f"there is no {python}")
    path = tmp_path / "job.py"
    path.write_text("""
import importlib.util, os, sys
from bqm.harness import Command, Cradle
from harnessd import Cradle as Same
assert Same is Cradle

class Job(Cradle):
    def run(self, *args):
        self.set_status({"python": sys.executable, "args": args, "argv": sys.argv, "config": self.get_config(),
                         "env": "PYTHONPATH" in os.environ, "lent": importlib.util.find_spec("uvicorn") is not None})
        print("line")
        message = self.get_msg(timeout=None)
        self.set_status(message["cmd"])
        fds = [fd for fd in sorted(os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")]
        self.set_status([fd for fd in fds if os.get_inheritable(int(fd))])
        return 7
""")
    env = {"PYTHONPATH": None}  # that interpreter has no harnessd
    run = keeper.spawn(entrypoint=f"{path}:Job", python=python, args=["a"], config={"k": 1}, env=env)
    until(lambda: run.said() or not run.is_left(), "it reports")
    assert run.said(), run.out
    found = run.said()[0]
    assert (found["python"], found["args"], found["argv"]) == (python, ["a"], [str(path), "a"])
    assert found["config"] == {"k": 1} and not found["env"]
    if python == OTHER_PYTHON:
        assert not found["lent"]
    until(lambda: run.out == "line\n", "the line is in the file at once")
    run.send(Command.PAUSE)
    assert keeper.ended(run)["code"] == 7, run.out
    assert run.said()[1:] == ["PAUSE", ["0", "1", "2"]] and len(run.said("ack")) == 1


def test_death_of_the_keeper_also_ends_a_run_under_its_own_interpreter(rig: Rig) -> None:
    run = rig.spawn(SLEEPING, python=sys.executable)
    run.until_said("up")
    rig.process.send_signal(signal.SIGKILL)
    until(lambda: not run.is_left(), "the run is gone")
