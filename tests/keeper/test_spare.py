"""The process that is forked ahead and becomes the next run."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.brand import is_alive
from helpers.daemon import children, spares
from helpers.rig import HEAD, Rig, Run
from helpers.waiting import DEADLINE_S, until

from harnessd import Command, tree

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may run a job as another user")
WAITING = """
class Job(Cradle):
    def run(self):
        self.set_status("up")
        while (message := self.get_msg(timeout=None))["cmd"] is not Command.STOP:
            self.set_status(message["cmd"])
"""
LOOK = """
import resource
class Job(Cradle):
    def run(self):
        umask = os.umask(0)
        limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name[:6] == "RLIMIT"}
        self.set_status({
            "cwd": os.getcwd(), "umask": umask, "nice": os.nice(0), "limits": limits, "user": os.getresuid(),
            "group": os.getresgid(), "groups": os.getgroups(), "leads": os.getsid(0) == os.getpid() == os.getpgrp(),
            "parent": os.getppid(), "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "handlers": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
            "env": {name: value for name, value in os.environ.items() if name != "HARNESS_JOURNAL"},
            "fds": sorted(os.listdir("/proc/self/fd"), key=int), "modules": sorted(sys.modules), "path": sys.path,
            "argv": sys.argv[1:], "encodings": [stream.encoding for stream in (sys.stdin, sys.stdout, sys.stderr)],
            "threads": threading.active_count(), "config": self.get_config(),
        })
        print("said")
        print("wrong", file=sys.stderr)
"""
DRAWS = """
import random
class Job(Cradle):
    def run(self):
        self.set_status(random.random())
"""


def spare_of(rig: Rig) -> int:
    """Have a run forked, and return what is forked ahead after it."""
    rig.run("class Job(Cradle):\n    def run(self): pass")
    (pid,) = until(lambda: spares(rig.process.pid), "a spare")
    return pid


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into, as pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="harnessd-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def goes_on(run: Run) -> bool:
    run.until_said("up")
    run.send(Command.PAUSE)
    run.until_said("PAUSE")
    return run.is_left()


def test_the_next_run_is_the_process_that_was_forked_ahead(rig: Rig) -> None:
    spare = spare_of(rig)
    run = rig.spawn(WAITING)
    assert run.pid == spare and goes_on(run)
    assert tree.members({run.spec.mark}) == {run.spec.mark: [spare]}
    rig.ask("end", run=run.spec.run, grace=0)
    assert rig.ended(run)["signal"] == signal.SIGKILL
    (other,) = until(lambda: spares(rig.process.pid), "another spare")
    assert other != spare


@pytest.mark.parametrize("errors", [False, True], ids=["one log", "a log for errors"])
@pytest.mark.parametrize("user", [False, pytest.param(True, marks=AS_ROOT)], ids=["same user", "another user"])
def test_a_run_finds_the_same_in_a_spare_as_in_a_fork(rig: Rig, open_folder: Path, user: bool, errors: bool) -> None:
    changes = {
        "cwd": "/",
        "umask": 0o27,
        "nice": 3,
        "env": {"MINE": "1", "HOME": None},
        "args": ["a"],
        "config": {"b": 1},
    }
    changes |= {"limits": {"nofile": 100, "core": 0}} | (
        {"uid": 65534, "gid": 65533, "groups": [65532]} if user else {}
    )
    job = open_folder / "look.py"
    job.write_text(HEAD + LOOK)
    job.chmod(0o644)
    found = []
    for number in range(2):
        spare = spare_of(rig) if number else 0
        files = {"errors": str(open_folder / f"{number}.err")} if errors else {}
        code, run = rig.run(entrypoint=f"{job}:Job", **changes, **files)
        assert code == 0 and (run.pid == spare) is bool(number), run.out
        assert run.out == ("said\n" if errors else "said\nwrong\n")
        assert all(Path(path).read_text() == "wrong\n" for path in files.values())
        found += run.said()
    assert found[0] == found[1]


def test_a_run_began_when_it_was_asked_for_and_not_when_it_was_forked(rig: Rig) -> None:
    spare = spare_of(rig)
    until(lambda: tree.age_s(tree.start_ticks(spare)) > 0.3, "it has waited")
    asked = time.time()
    code, run = rig.run(DRAWS)
    assert (code, run.pid) == (0, spare)
    assert asked <= run.frame["started_at"] <= time.time()
    assert run.frame["began_ticks"] >= run.frame["start_ticks"] + 0.2 * tree.TICKS_A_SECOND


def test_a_spare_has_nothing_open_but_stdio_and_its_socket(rig: Rig) -> None:
    rig.spawn(WAITING).until_said("up")
    (spare,) = until(lambda: spares(rig.process.pid), "a spare")
    others = [os.readlink(f"/proc/{spare}/fd/{fd}") for fd in os.listdir(f"/proc/{spare}/fd") if int(fd) > 2]
    assert len(others) == 1 and others[0].startswith("socket:")
    assert os.getsid(spare) == spare and not tree.is_mark(tree._worn_by(spare)[0])


def test_each_spare_draws_other_numbers(rig: Rig) -> None:
    drawn = []
    for _ in range(3):
        spare = spare_of(rig)
        _, run = rig.run(DRAWS)
        assert run.pid == spare
        drawn += run.said()
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_spare_that_was_killed_is_missed_by_nobody(rig: Rig, number: signal.Signals) -> None:
    spare = spare_of(rig)
    os.kill(spare, number)
    until(lambda: children(rig.process.pid).get(spare, "Z") == "Z", "it has ended")
    run = rig.spawn(WAITING)
    assert run.pid != spare and goes_on(run)


def test_a_spare_that_is_killed_as_it_becomes_a_run_is_a_run_that_was_killed(rig: Rig) -> None:
    spare = spare_of(rig)
    os.kill(spare, signal.SIGSTOP)
    run = rig.spawn(WAITING)
    assert run.pid == spare
    os.kill(spare, signal.SIGKILL)
    assert rig.ended(run)["signal"] == signal.SIGKILL
    assert run.said() == []


def test_a_run_that_is_ended_before_the_spare_has_become_it_never_begins(rig: Rig) -> None:
    spare = spare_of(rig)
    os.kill(spare, signal.SIGSTOP)
    run = rig.spawn(WAITING)
    rig.ask("end", run=run.spec.run, grace=0.1)
    assert rig.ended(run)["signal"] in (signal.SIGTERM, signal.SIGKILL)
    assert not run.is_left() and run.said() == []


@pytest.mark.parametrize(
    "changes",
    [{"config": {"wide": "x" * (1 << 17)}}, {"command": ["/bin/true"], "entrypoint": ""}],
    ids=["does not fit into the socket", "is executed"],
)
def test_what_a_spare_cannot_become_is_forked(rig: Rig, changes: dict[str, Any]) -> None:
    spare = spare_of(rig)
    code, run = rig.run("class Job(Cradle):\n    def run(self): pass", **changes)
    assert code == 0 and run.pid != spare
    assert goes_on(rig.spawn(WAITING))


@pytest.mark.parametrize("nonsense", [{"mark": 1 << 70}, {"mark": "x"}, {"mark": None}])
def test_what_makes_no_sense_is_refused_by_the_fork_and_leaves_nothing_open(rig: Rig, nonsense: dict[str, Any]) -> None:
    spare_of(rig)
    before = os.listdir(f"/proc/{rig.process.pid}/fd")
    refused, _ = rig.ask("spawn", spec=rig.spec(WAITING).to_frame() | nonsense)
    assert "cannot start" in refused["error"]
    assert len(os.listdir(f"/proc/{rig.process.pid}/fd")) == len(before) - 1  # the spare is used up
    assert goes_on(rig.spawn(WAITING))


def test_of_runs_that_are_asked_for_together_one_is_the_spare(rig: Rig) -> None:
    spare = spare_of(rig)
    specs = [rig.spec(WAITING) for _ in range(3)]
    for number, spec in enumerate(specs, 1000):
        rig.tell({"op": "spawn", "id": number, "spec": spec.to_frame()})
    answers = {}
    while len(answers) < 3:
        frame, fds = rig._next()
        answers[frame.get("re")] = Run(specs[frame["re"] - 1000], frame, fds)
    assert [run.pid == spare for run in answers.values()].count(True) == 1
    assert len({run.pid for run in answers.values()}) == 3
    assert all(map(goes_on, answers.values()))


def test_preloading_needs_no_spare(rig: Rig) -> None:
    spare = spare_of(rig)
    rig.ask("preload", modules=["xml.dom.minidom"])
    until(lambda: spare not in children(rig.process.pid), "the spare is gone")
    assert goes_on(rig.spawn(WAITING))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_spare_ends_with_the_keeper(rig: Rig, number: signal.Signals) -> None:
    spare = spare_of(rig)
    rig.tell({"op": "ack", "run": 1})  # else it waits for a server that stores the exit
    rig.process.send_signal(number)
    rig.process.wait(DEADLINE_S)
    until(lambda: not is_alive(spare), "the spare is gone")
