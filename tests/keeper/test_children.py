"""How the keeper ends a run's tree."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest
from helpers.brand import is_alive
from helpers.rig import ROOT, Rig, Run
from helpers.waiting import until

from harnessd import tree

# Each leaves a process behind that only its mark gives away, and says its pid.
LEFT_BEHIND = {
    "child": "subprocess.Popen(['sleep', '1000'])",
    "session": "subprocess.Popen(['sleep', '1000'], start_new_session=True)",
    "stripped": "subprocess.Popen(['setsid', 'env', '-i', '/bin/sleep', '1000'])",
    "ignoring SIGTERM": "subprocess.Popen(['sh', '-c', 'trap \"\" TERM; while :; do sleep 1; done'])",
    "daemonised": "daemonise()",
    "holding stdout": "subprocess.Popen(['sleep', '1000'], stdout=1, close_fds=False)",
    "without its first thread": "first_thread_ends()",
    "stopped": "os.kill(subprocess.Popen(['sleep', '1000']).pid, signal.SIGSTOP)",
}
SLEEPING = """
class Job(Cradle):
    def run(self):
        self.set_status("up")
        time.sleep(1000)
"""
HEAD = """
import subprocess
FIRST_THREAD_ENDS = '''
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
ctypes.CDLL(None).pthread_exit(None)
'''
def first_thread_ends():
    child = subprocess.Popen([sys.executable, "-c", FIRST_THREAD_ENDS])
    while open(f"/proc/{child.pid}/stat").read().split()[2] != "Z":
        time.sleep(0.01)
def daemonise():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.chdir("/")
            os.closerange(0, 65536)
            time.sleep(1000)
        os._exit(0)
"""


def leaving(keeper: Rig, how: str, then: str) -> Run:
    body = f"""{HEAD}
class Job(Cradle):
    def run(self):
        {LEFT_BEHIND[how]}
        self.set_status("up")
        {then}
"""
    run = keeper.spawn(body)
    run.until_said("up")
    return run


@pytest.mark.parametrize("how", LEFT_BEHIND)
def test_end_takes_the_whole_tree(how: str, keeper: Rig) -> None:
    run = leaving(keeper, how, "time.sleep(1000)")
    keeper.tell({"op": "end", "run": run.spec.run, "grace": 0.2})
    ended = keeper.ended(run)
    assert ended["signal"] == signal.SIGTERM
    assert not run.is_left() and keeper.members() == [keeper.process.pid]


@pytest.mark.parametrize("how", LEFT_BEHIND)
def test_what_outlives_its_run_is_ended_and_counted(how: str, keeper: Rig) -> None:
    run = leaving(keeper, how, "return 4")
    ended = keeper.ended(run)
    assert ended["code"] == 4 and ended["leftover"] >= 1
    assert keeper.members() == [keeper.process.pid]


def test_run_has_its_grace_to_end_as_it_likes(keeper: Rig) -> None:
    run = keeper.spawn("""
        class Job(Cradle):
            def run(self):
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
                self.set_status("up")
                while True: time.sleep(1000)
        """)
    run.until_said("up")
    keeper.tell({"op": "end", "run": run.spec.run, "grace": 1000})
    assert keeper.ended(run)["code"] == 9


@pytest.mark.parametrize("graces", [[0], [0.1], [1000, 0], [1000, 0.1]])
def test_run_that_ignores_sigterm_is_killed_after_the_shortest_grace(keeper: Rig, graces: list[float]) -> None:
    run = keeper.spawn("""
        class Job(Cradle):
            def run(self):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                self.set_status("up")
                while True: time.sleep(1000)
        """)
    run.until_said("up")
    for grace in graces:
        keeper.ask("end", run=run.spec.run, grace=grace)
    assert keeper.ended(run)["signal"] == signal.SIGKILL


def test_stopped_run_is_woken_to_end(keeper: Rig) -> None:
    run = keeper.spawn(SLEEPING)
    run.until_said("up")
    keeper.ask("signal", run=run.spec.run, signals=[signal.SIGSTOP], tree=True)
    keeper.ask("end", run=run.spec.run, grace=1000)
    assert keeper.ended(run)["signal"] == signal.SIGTERM


def test_signal_goes_to_the_whole_tree_or_to_the_first_process_alone(keeper: Rig) -> None:
    run = keeper.spawn("""
        import subprocess
        class Job(Cradle):
            def run(self):
                signal.signal(signal.SIGUSR1, lambda *_: self.set_status("USR1"))
                self.set_status({"child": subprocess.Popen(["sleep", "1000"]).pid})
                while True: time.sleep(1000)
        """)
    child = until(run.said, "it has a child")[0]["child"]
    keeper.ask("signal", run=run.spec.run, signals=[signal.SIGUSR1], tree=False)
    run.until_said("USR1")
    assert is_alive(child)
    keeper.ask("signal", run=run.spec.run, signals=[signal.SIGUSR1], tree=True)
    until(lambda: not is_alive(child), "the child had it too")


def test_orphans_of_strangers_are_reaped(rig: Rig) -> None:
    """A process without a mark comes to the keeper as its subreaper when its parent ends."""
    run = rig.spawn(f"""
        import resource
        class Job(Cradle):
            def run(self):
                if os.fork() == 0:
                    resource.setrlimit(10, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                    if os.fork():
                        os._exit(0)
                    while os.getppid() != {rig.process.pid}: time.sleep(0.001)
                    self.set_status("orphaned")
                    os._exit(0)
                time.sleep(1000)
        """)
    run.until_said("orphaned")
    until(lambda: set(rig.members()) == {rig.process.pid, run.pid}, "the orphan is reaped")
    zombies = [entry for entry in os.listdir("/proc") if entry.isdecimal() and _parent(entry) == rig.process.pid]
    until(lambda: all(is_alive(int(pid)) or not os.path.exists(f"/proc/{pid}") for pid in zombies), "no zombie stays")


def _parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b") ")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


UNTOUCHABLE = """
import os, sys, time
from harnessd.keeper.children import Child, Children
from harnessd.wire import RunSpec
os.setuid(65534)
children = Children()
spec = RunSpec(run=1, job="etl", mark=(1 << 61) + 77, journal="", journal_max_bytes=1)
children.add(Child(spec, int(sys.argv[1]), 0.0, 0.0, 0, 0, -1, -1))
children.end(1, 0.02)
children.end(1, 0.0)
while children.live[1].probe_s < 0.2:
    assert children.settle() == []
    time.sleep(0.005)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="root's processes are the ones that others may not signal")
def test_a_run_that_has_become_another_user_is_told_of_once_and_harms_nobody() -> None:
    with subprocess.Popen(["sleep", "1000"]) as other:
        try:
            environ = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, "-c", UNTOUCHABLE, str(other.pid)], env=environ, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("cannot signal the job: it runs as another user job=etl") == 1
            assert other.poll() is None
        finally:
            other.kill()


def test_who_wears_no_mark_is_of_no_run() -> None:
    assert tree.worn() == resource.RLIM_INFINITY
    assert tree.members({tree.worn(), 0}) == {}
