from __future__ import annotations

import copy
import os
import pickle
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import DEADLINE_S, until

from harnessd import Command, Cradle
from harnessd.job import pulse
from harnessd.job.cradle import Mailbox
from harnessd.job.journal import Journal
from harnessd.job.pulse import POLLS, WAITING
from harnessd.wire import pack_command


class Plain(Cradle):
    def __init__(self) -> None:  # as many jobs do, it calls no super().__init__()
        self.own = 1


class Harnessed:
    """A Cradle with the mailbox, page and journal of a run, all in this process."""

    def __init__(self, folder: Path) -> None:
        self.server, self.client = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.client.setblocking(False)
        self.path = folder / "journal"
        self.journal_fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.pulse_fd = pulse.create()
        self.page = pulse.attach(self.pulse_fd)
        journal = Journal(self.journal_fd, self.pulse_fd, 1 << 20)
        self.mailbox = Mailbox(self.client.fileno(), self.page, journal, {"a": 1, "deep": {"x": 1}})
        self.job = Plain()

    def send(self, cmd: Command, data: Any = None, id: int = 1) -> None:
        self.server.send(pack_command(cmd, data, id, 12.5))

    def close(self) -> None:
        self.server.close()
        self.client.close()
        os.close(self.journal_fd)
        os.close(self.pulse_fd)
        self.page.release()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harnessed]:
    made = Harnessed(tmp_path)
    monkeypatch.setattr(Cradle, "_harness", made.mailbox)
    yield made
    made.close()


def test_job_without_a_harness_gets_no_messages_and_keeps_its_statuses_to_itself() -> None:
    job = Plain()
    assert job.get_msg() is None and job.get_msg(timeout=0.01) is None
    assert job.set_status(status={"a": 1}) is False
    assert job.get_config() == {}


def test_cradle_without_run_says_so() -> None:
    with pytest.raises(TypeError, match=r"cannot run Plain: it has no run\(\) method"):
        Plain().run()


def test_get_msg_returns_commands_in_order_and_acknowledges_each(run: Harnessed) -> None:
    run.send(Command.START, id=5)
    run.send(Command.CONFIG, {"b": [1, None]}, id=6)
    assert run.job.get_msg() == {"cmd": Command.START, "data": None, "id": 5, "time": 12.5}
    assert '"ack":5' in run.path.read_text() and '"ack":6' not in run.path.read_text()
    message = run.job.get_msg(timeout=None)
    assert message is not None and message["cmd"] == "CONFIG" and message["data"] == {"b": [1, None]}
    assert '"ack":6' in run.path.read_text()
    assert run.job.get_msg() is None


@pytest.mark.parametrize("timeout", [0, 0.0, 0.001, -1, False, float("nan")])
def test_get_msg_returns_none_when_nothing_came_in_time(run: Harnessed, timeout: float) -> None:
    assert run.job.get_msg(timeout=timeout) is None


def test_every_get_msg_is_counted_and_waiting_is_seen(run: Harnessed) -> None:
    for _ in range(3):
        run.job.get_msg()
    assert (run.page[POLLS], run.page[WAITING]) == (3, 0)
    waiter = threading.Thread(target=run.job.get_msg, args=(None,))
    waiter.start()
    until(lambda: run.page[WAITING] == os.getpid(), "the wait is seen")
    run.send(Command.STOP)
    waiter.join(DEADLINE_S)
    assert (run.page[POLLS], run.page[WAITING]) == (4, 0)


def test_one_that_waits_is_seen_whatever_other_threads_and_children_do(run: Harnessed) -> None:
    waiters = [threading.Thread(target=run.job.get_msg, args=(None,)) for _ in range(2)]
    for waiter in waiters:
        waiter.start()
    until(lambda: len(run.mailbox._calls) == 2, "both wait")
    assert run.job.get_msg(timeout=0.001) is None
    assert run.page[WAITING]
    if (pid := os.fork()) == 0:
        run.job.get_msg(timeout=0.001)
        os._exit(0)
    os.waitpid(pid, 0)
    run.page[WAITING] = pid  # as if it had been killed in the midst of that
    assert run.job.get_msg(timeout=0.001) is None
    assert run.page[WAITING] == os.getpid()
    run.send(Command.PAUSE)
    until(lambda: len(run.mailbox._calls) == 1, "one has it")
    assert run.page[WAITING]
    run.send(Command.STOP)
    for waiter in waiters:
        waiter.join(DEADLINE_S)
    assert not run.page[WAITING]


@pytest.mark.parametrize("timeout", [None, 3600.0, float("inf"), 1e12])
def test_get_msg_wakes_for_the_command(run: Harnessed, timeout: float | None) -> None:
    found: list[Any] = []
    waiter = threading.Thread(target=lambda: found.append(run.job.get_msg(timeout=timeout)), daemon=True)
    waiter.start()
    until(lambda: run.page[WAITING], "it waits")
    run.send(Command.PAUSE)
    waiter.join(DEADLINE_S)
    assert found[0]["cmd"] is Command.PAUSE


def test_a_call_that_a_signal_handler_ends_waits_no_more() -> None:
    class Page(list[int]):
        interrupted = False

        def __setitem__(self, place: Any, value: Any) -> None:
            if value and not self.interrupted:
                self.interrupted = True
                raise TimeoutError("as a handler of the job's does")
            super().__setitem__(place, value)

    page = Page([0, 0])
    mailbox = Mailbox(page=page)
    with pytest.raises(TimeoutError):
        mailbox.receive(0)
    assert mailbox.receive(0) is None
    assert page[WAITING] == 0


def test_threads_share_the_commands_and_none_is_lost_or_doubled(run: Harnessed) -> None:
    found: list[int] = []

    def read() -> None:
        while (message := run.job.get_msg(timeout=None)) and message["cmd"] is not Command.STOP:
            found.append(message["id"])

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for number in range(500):
        until(lambda: select.select([], [run.server], [], 0)[1], "there is room")
        run.send(Command.CONFIG, {"n": number}, id=number)
    for number in range(4):
        run.send(Command.STOP, id=1000 + number)
    for reader in readers:
        reader.join(DEADLINE_S)
    assert sorted(found) == list(range(500))


def test_config_is_what_was_given_and_every_config_read_since(run: Harnessed) -> None:
    config = run.job.get_config()
    config["a"] = config["deep"]["x"] = "the job's own copy"
    assert run.job.get_config() == {"a": 1, "deep": {"x": 1}}
    run.send(Command.CONFIG, {"deep": {"y": 2}, "b": None})
    assert run.job.get_config() == {"a": 1, "deep": {"x": 1}}
    run.job.get_msg()
    assert run.job.get_config() == {"a": 1, "deep": {"x": 1, "y": 2}, "b": None}
    run.send(Command.CONFIG, "no object")
    run.job.get_msg()
    assert run.job.get_config()["a"] == 1


def test_packet_that_is_no_command_is_passed_over(run: Harnessed) -> None:
    for packet in (b"garbage", b"[]", b'{"cmd":"DANCE","id":1,"time":1}', b'{"cmd":"STOP"}', b"\xff\xfe"):
        run.server.send(packet)
    run.send(Command.STOP)
    message = run.job.get_msg(timeout=DEADLINE_S)
    assert message is not None and message["cmd"] is Command.STOP


def test_end_of_the_harness_is_silence_and_not_a_busy_loop(run: Harnessed, monkeypatch: pytest.MonkeyPatch) -> None:
    run.send(Command.STOP)
    run.server.close()
    message = run.job.get_msg(timeout=None)
    assert message is not None and message["cmd"] is Command.STOP
    sleeps: list[float] = []
    monkeypatch.setattr(time, "sleep", sleeps.append)
    assert run.job.get_msg() is None
    sleeps.clear()
    assert run.job.get_msg(timeout=0.05) is None
    assert 0 < sleeps[0] <= 0.05


def test_closed_mailbox_is_silence_and_its_number_is_not_read_from(run: Harnessed) -> None:
    fd = run.client.fileno()
    reading, writing = os.pipe()
    os.write(writing, pack_command(Command.STOP, None, 1, 1.0))
    run.client.detach()
    os.dup2(reading, fd)
    assert run.job.get_msg() is None and run.job.get_msg(timeout=0.01) is None
    assert os.read(reading, 10)
    for opened in {reading, writing, fd}:
        os.close(opened)
    assert run.job.get_msg() is None and run.job.get_msg(timeout=0.01) is None


def test_harnessed_job_can_be_pickled_and_copied(run: Harnessed) -> None:
    run.job.own = 2
    copied = copy.deepcopy(run.job)
    assert copied.set_status("from the copy") is True
    assert pickle.loads(pickle.dumps(run.job)).own == 2
    assert vars(run.job) == {"own": 2}
