"""The keeper as a server sees it."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.daemon import children
from helpers.rig import Rig, Run
from helpers.waiting import DEADLINE_S, until

from harnessd import Command, tree
from harnessd.wire import MAX_FRAME_BYTES, PROTOCOL, Frame, RunSpec, pack_frame

WAITING = """
class Job(Cradle):
    def run(self):
        self.set_status("up")
        while msg := self.get_msg(timeout=None):
            self.set_status(msg["cmd"])
            if msg["cmd"] == Command.STOP: return 0
"""
STUBBORN = """
import subprocess
class Job(Cradle):
    def run(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["setsid", "env", "-i", "/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done"])
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            time.sleep(1000)
        self.set_status("up")
        while True: time.sleep(1000)
"""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_hello_says_who_it_is(rig: Rig) -> None:
    assert rig.hello["protocol"] == PROTOCOL and rig.hello["pid"] == rig.process.pid
    assert rig.hello["ending"] is False and rig.hello["version"]


def test_spawn_answers_with_the_run_and_its_mailbox_and_page(rig: Rig) -> None:
    run = rig.spawn(WAITING)
    assert run.frame["pid"] == run.pid and run.frame["start_ticks"] == tree.start_ticks(run.pid)
    assert run.frame["mark"] == run.spec.mark
    run.send(Command.PAUSE)
    run.until_said("PAUSE")
    assert os.pread(run.fds[1], 8, 0) == (2).to_bytes(8, "little")  # two polls
    run.send(Command.STOP)
    assert rig.ended(run)["code"] == 0


def test_what_a_server_notes_of_an_end_is_told_to_the_next_with_the_run_and_with_its_exit(rig: Rig) -> None:
    run, other = rig.spawn(STUBBORN), rig.spawn(WAITING)
    run.until_said("up")
    assert run.frame["end_note"] == {}
    rig.ask("end", run=run.spec.run, grace=1000, note={"reason": "hung"})
    rig.ask("list")
    assert rig.event("child", run=run.spec.run)[0]["end_note"] == {"reason": "hung"}
    assert rig.event("child", run=other.spec.run)[0]["end_note"] == {}
    rig.ask("end", run=other.spec.run, grace=None, note={"reason": "hung"})
    assert other.is_left()
    rig.ask("end", run=run.spec.run, grace=0, note={"reason": "killed"})
    assert rig.ended(run)["end_note"] == {"reason": "killed"}
    rig.ask("end", run=run.spec.run, grace=0, note={"reason": "stopped"})  # sent before that was heard
    rig.ask("list")
    assert rig.ended(run)["end_note"] == {"reason": "stopped"}


def test_a_log_that_nobody_reads_holds_nobody_up() -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK)
    try:
        with suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
        code = "from harnessd.keeper.say import say; say('error', 'unread'); print('said')"
        said = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writing, timeout=DEADLINE_S, check=True
        )
        assert said.stdout == b"said\n"
    finally:
        os.close(reading)
        os.close(writing)


def test_exit_record_tells_how_it_ended_and_what_it_used(rig: Rig) -> None:
    run = rig.spawn("""
        class Job(Cradle):
            def run(self):
                x = bytearray(50_000_000)
                deadline = time.process_time() + 0.05
                while time.process_time() < deadline: pass
                return 3
        """)
    ended = rig.ended(run)
    assert (ended["run"], ended["job"], ended["pid"]) == (run.spec.run, run.spec.job, run.pid)
    assert (ended["code"], ended["signal"], ended["core"], ended["leftover"]) == (3, None, False, 0)
    assert ended["cpu_s"] >= 0.05 and ended["mono_s"] >= 0.05 and ended["wall_s"] > 0
    assert ended["peak_rss_bytes"] > 50_000_000
    assert abs(ended["at"] - os.stat(run.spec.output).st_mtime) < 3600


def test_exit_record_is_kept_until_it_is_acknowledged(rig: Rig) -> None:
    _, run = rig.run("class Job(Cradle):\n    def run(self): return 3")
    for _ in range(2):
        rig.ask("list")
        assert [frame["run"] for frame, _ in rig.events() if frame["event"] == "exit"] == [run.spec.run]
    refused, _ = rig.ask("spawn", spec=run.spec.to_frame())
    assert refused["error"] == f"cannot start '{run.spec.job}': there is a run {run.spec.run} already"
    rig.ask("ack", run=run.spec.run)
    rig.ask("ack", run=run.spec.run)
    rig.ask("list")
    assert rig.events() == []


def test_list_tells_every_run_with_its_descriptors(rig: Rig) -> None:
    runs = {run.spec.run: run for run in (rig.spawn(WAITING), rig.spawn(WAITING))}
    rig.ask("list")
    found = {frame["run"]: (frame, fds) for frame, fds in rig.events()}
    assert found.keys() == runs.keys()
    for number, (frame, (mailbox, page)) in found.items():
        assert frame["pid"] == runs[number].pid and frame["journal"] == runs[number].spec.journal
        runs[number].fds = [mailbox, page]  # what a later server adopts is as good
        runs[number].send(Command.STOP)
        assert rig.ended(runs[number])["code"] == 0


def test_descriptors_are_held_and_handed_back(rig: Rig, pipe: tuple[int, int]) -> None:
    rig.tell({"op": "store", "name": "http"}, list(pipe))
    rig.ask("list")
    ((frame, (reading, writing)),) = rig.events()
    assert (frame["event"], frame["name"]) == ("stored", "http")
    os.write(writing, b"x")
    assert os.read(reading, 9) == b"x" and os.fstat(reading).st_ino == os.fstat(pipe[0]).st_ino
    rig.tell({"op": "store", "name": "http"}, [pipe[0]])
    rig.ask("list")
    assert [len(fds) for _, fds in rig.events()] == [1]
    rig.tell({"op": "store", "name": "http"})
    rig.ask("list")
    assert rig.events() == []


def test_run_has_none_of_the_keepers_descriptors(rig: Rig, pipe: tuple[int, int]) -> None:
    rig.tell({"op": "store", "name": "http"}, list(pipe))
    other = rig.spawn(WAITING)
    other.until_said("up")
    _, run = rig.run("""
        class Job(Cradle):
            def run(self):
                self.set_status({fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                                 if os.path.exists(f"/proc/self/fd/{fd}")})
        """)
    (found,) = run.said()
    harness = {fd: name for fd, name in found.items() if int(fd) >= 900}
    assert len(harness) == 3
    names = [name for fd, name in found.items() if int(fd) > 2 and fd not in harness]
    # the pulse page's mapping holds a descriptor of its own
    assert [name for name in names if not name.startswith(("/memfd:harnessd-pulse", "/proc/"))] == []
    assert sum(name.startswith("/memfd") for name in names) <= 1


@pytest.mark.parametrize("op", ["dance", "", None, 5, [], {}])
def test_unknown_operation_is_refused_with_the_protocol(rig: Rig, op: object) -> None:
    assert "error" in rig.ask(op)[0]
    assert rig.run("class Job(Cradle):\n    def run(self): return 3")[0] == 3


@pytest.mark.parametrize(
    "frame",
    [
        {"op": "spawn"},
        {"op": "spawn", "spec": None},
        {"op": "spawn", "spec": {}},
        {"op": "spawn", "spec": {"unknown": 1}},
        {"op": "spawn", "spec": {"run": [], "job": 1, "mark": 1, "journal": 5}},
        {"op": "ack"},
        {"op": "store"},
        {"op": "end"},
    ],
)
def test_frame_without_sense_is_refused_and_harms_nothing(rig: Rig, frame: dict[str, object]) -> None:
    assert "error" in rig.ask(**frame)[0]
    assert rig.run("class Job(Cradle):\n    def run(self): return 3")[0] == 3


def test_nonsense_about_a_live_run_harms_nothing(rig: Rig) -> None:
    run = rig.spawn(WAITING)
    for frame in ({"op": "end"}, {"op": "end", "grace": "x"}, {"op": "signal", "signals": [999], "tree": True}):
        assert "error" in rig.ask(**frame, run=run.spec.run)[0]
    run.send(Command.STOP)
    assert rig.ended(run)["code"] == 0


def test_what_is_gone_is_neither_ended_nor_signalled(rig: Rig) -> None:
    assert "error" not in rig.ask("end", run=999, grace=0)[0]
    assert "error" not in rig.ask("signal", run=999, signals=[9], tree=True)[0]


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 8, b"\0\0\0\2[]", b"\0\0\0\3abc", (MAX_FRAME_BYTES + 1).to_bytes(4, "big")]
)
def test_garbage_closes_the_connection_and_ends_the_runs(rig: Rig, garbage: bytes) -> None:
    run = rig.spawn(WAITING)
    rig.control.send(garbage)
    assert rig.process.wait(DEADLINE_S) == 0
    assert not run.is_left()


def test_frames_come_in_any_pieces(rig: Rig) -> None:
    whole = pack_frame({"op": "ack", "run": 1, "id": 77}) + pack_frame({"op": "ack", "run": 1, "id": 78})
    for index in range(len(whole)):
        rig.control.send(whole[index : index + 1])
    assert [rig._next()[0]["re"] for _ in range(2)] == [77, 78]


def test_end_of_the_server_ends_every_runs_whole_tree(rig: Rig) -> None:
    runs = [
        rig.spawn(WAITING),
        rig.spawn(STUBBORN),
        rig.spawn("class Job(Cradle):\n    def run(self): time.sleep(1000)"),
    ]
    for run in runs[:2]:
        run.until_said("up")
    rig.control.shutdown(socket.SHUT_RDWR)
    assert rig.process.wait(DEADLINE_S) == 0
    until(lambda: not rig.members(), "nothing is left")


def test_sigterm_ends_every_run_and_then_the_keeper(rig: Rig) -> None:
    run = rig.spawn(STUBBORN)
    run.until_said("up")
    rig.process.send_signal(signal.SIGTERM)
    rig.event("ending")
    refused, _ = rig.ask("spawn", spec=rig.spec(WAITING).to_frame())
    assert "the daemon is ending" in refused["error"]
    rig.ended(run)
    rig.tell({"op": "ack", "run": run.spec.run})
    assert rig.process.wait(DEADLINE_S) == 0


def _asked_of_a_stopped_zygote(rig: Rig) -> tuple[int, RunSpec]:
    rig.ask("preload", modules=["xml.dom.minidom"])
    (zygote,) = children(rig.process.pid)
    os.kill(zygote, signal.SIGSTOP)
    spec = rig.spec(WAITING)
    rig.tell({"op": "spawn", "id": 77, "spec": spec.to_frame()})
    return zygote, spec


def _answer(rig: Rig, request: int) -> Frame:
    while (frame := rig._next()[0]).get("re") != request:
        pass
    return frame


def test_a_run_that_the_zygote_was_asked_for_when_the_daemon_is_told_to_end_is_refused(rig: Rig) -> None:
    _, spec = _asked_of_a_stopped_zygote(rig)
    rig.ask("ack", run=1)  # what comes before is heard
    rig.process.send_signal(signal.SIGTERM)
    frame = _answer(rig, 77)
    assert "the daemon is ending" in frame["error"]
    assert rig.process.wait(DEADLINE_S) == 0
    assert not tree.members({spec.mark})


def test_a_run_that_the_zygote_cannot_fork_is_refused_with_the_reason(rig: Rig) -> None:
    rig.ask("preload", modules=["xml.dom.minidom"])
    refused, _ = rig.ask("spawn", spec=rig.spec(WAITING).to_frame() | {"mark": 1 << 70})
    assert "cannot start" in refused["error"]
    rig.spawn(WAITING).until_said("up")


def test_a_run_whose_end_is_asked_for_while_the_zygote_forks_it_never_starts(rig: Rig) -> None:
    zygote, spec = _asked_of_a_stopped_zygote(rig)
    rig.tell({"op": "end", "id": 78, "run": spec.run, "grace": 0.0})
    frame = _answer(rig, 77)
    assert "it was ended before" in frame["error"]
    os.kill(zygote, signal.SIGCONT)
    rig.spawn(WAITING).until_said("up")
    assert not tree.members({spec.mark})


def test_without_a_free_descriptor_the_keeper_goes_on(rig: Rig, tmp_path: Path) -> None:
    run = rig.spawn(WAITING)
    run.until_said("up")
    limit = resource.prlimit(rig.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(rig.process.pid, resource.RLIMIT_NOFILE, (3, limit[1]))
    refused, _ = rig.ask("spawn", spec=rig.spec(WAITING).to_frame())
    assert "Too many open files" in refused["error"]
    listed, _ = rig.ask("list")
    assert "Too many open files" in listed["error"]
    os.kill(run.pid, signal.SIGKILL)
    until(lambda: "cannot look for what is left" in (tmp_path / "keeper.err").read_text(), "it was looked for")
    resource.prlimit(rig.process.pid, resource.RLIMIT_NOFILE, limit)
    assert rig.ended(run)["signal"] == signal.SIGKILL
    rig.spawn(WAITING).until_said("up")


def test_death_of_the_keeper_is_the_death_of_the_runs(rig: Rig) -> None:
    run = rig.spawn(WAITING)
    run.until_said("up")
    rig.process.kill()
    until(lambda: not run.is_left(), "the run is gone")


def test_spawn_that_the_system_refuses_is_an_error_and_leaves_nothing_open(rig: Rig, tmp_path: Path) -> None:
    folder = f"/proc/{rig.process.pid}/fd"
    before = len(os.listdir(folder))
    for changes in ({"journal": str(tmp_path / "missing" / "1.jsonl")}, {"output": str(tmp_path / "missing" / "log")}):
        refused, fds = rig.ask("spawn", spec=rig.spec(WAITING, **changes).to_frame())
        assert "No such file or directory: " in refused["error"] and str(tmp_path / "missing") in refused["error"]
        assert fds == []
    assert len(os.listdir(folder)) == before


def test_runs_asked_for_at_once_are_each_answered_and_have_nothing_of_each_other(rig: Rig) -> None:
    specs = [rig.spec(WAITING) for _ in range(40)]
    answers = _asked_at_once(rig, [{"op": "spawn", "spec": spec.to_frame()} for spec in specs])
    runs = [Run(spec, frame, fds) for spec, (frame, fds) in zip(specs, answers, strict=True)]
    for run in runs:
        run.until_said("up")
        assert run.frame["pid"] == run.pid and tree.members({run.spec.mark}) == {run.spec.mark: [run.pid]}
    assert len({run.pid for run in runs}) == 40
    for run in runs[::7]:
        run.send(Command.STOP)
        assert rig.ended(run)["code"] == 0 and run.said() == ["up", "STOP"]
        with pytest.raises(ConnectionError):  # nobody else holds the other end
            run.send(Command.PAUSE)


def test_one_refused_among_runs_asked_for_at_once_is_no_harm_to_the_others(rig: Rig, tmp_path: Path) -> None:
    specs = [rig.spec(WAITING) for _ in range(4)]
    specs[1] = rig.spec(WAITING, journal=str(tmp_path / "missing" / "1.jsonl"))
    specs[3] = rig.spec(WAITING, run=specs[0].run)
    first, refused, third, doubled = _asked_at_once(rig, [{"op": "spawn", "spec": spec.to_frame()} for spec in specs])
    assert "No such file or directory" in refused[0]["error"] and "already" in doubled[0]["error"]
    for spec, (frame, fds) in ((specs[0], first), (specs[2], third)):
        Run(spec, frame, fds).until_said("up")


@pytest.mark.parametrize("mark", ["x", 1.5, 1 << 70, None])
def test_run_whose_mark_makes_no_sense_is_refused_and_the_keeper_goes_on(rig: Rig, mark: object) -> None:
    spec = rig.spec(WAITING)
    nonsense = rig.spec(WAITING).to_frame() | {"mark": mark}
    spawns = [{"op": "spawn", "spec": nonsense}, {"op": "spawn", "spec": spec.to_frame()}]
    refused, (frame, fds) = _asked_at_once(rig, spawns)
    assert "cannot start" in refused[0]["error"]
    Run(spec, frame, fds).until_said("up")


def test_run_that_is_to_be_ended_in_the_same_breath_is_ended(rig: Rig) -> None:
    spec = rig.spec(STUBBORN)
    end = {"op": "end", "run": spec.run, "grace": 0}
    (frame, fds), _ = _asked_at_once(rig, [{"op": "spawn", "spec": spec.to_frame()}, end])
    run = Run(spec, frame, fds)
    assert rig.ended(run)["signal"] == signal.SIGKILL
    assert not run.is_left()


def _asked_at_once(rig: Rig, frames: list[Frame]) -> list[tuple[Frame, list[int]]]:
    """Send the frames with one write. Return the answers to them, in their order, whatever order they came in."""
    first = 1_000_000
    rig.control.sendall(b"".join(pack_frame(frame | {"id": first + n}) for n, frame in enumerate(frames)))
    answers = {frame["re"]: (frame, fds) for frame, fds in (rig._next() for _ in frames)}
    return [answers[first + number] for number in range(len(frames))]


def test_keeper_grows_by_nothing_over_many_runs(rig: Rig) -> None:
    folder = f"/proc/{rig.process.pid}/fd"
    sizes = []
    for _ in range(2):
        for _ in range(50):
            _, run = rig.run(command=["true"])
            rig.ask("ack", run=run.spec.run)
            for fd in run.fds:
                os.close(fd)
                rig._fds.remove(fd)
        sizes.append(len(os.listdir(folder)))
    assert sizes[0] == sizes[1]
    assert rig.members() == [rig.process.pid]
