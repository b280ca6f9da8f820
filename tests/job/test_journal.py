from __future__ import annotations

import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harnessd.job import pulse
from harnessd.job.journal import Journal
from harnessd.wire import MAX_STATUS_BYTES

Opens = Callable[..., Journal]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def fds() -> Iterator[list[int]]:
    opened: list[int] = []
    yield opened
    for fd in opened:
        os.close(fd)


@pytest.fixture
def opened(path: Path, fds: list[int]) -> Opens:
    def open_journal(max_bytes: int = 1 << 20, target: Path = path) -> Journal:
        fds.append(os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
        fds.append(pulse.create())
        return Journal(fds[-2], fds[-1], max_bytes)

    return open_journal


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_child(work: Callable[[], object]) -> None:
    """Do the work in a forked child; a failure in it is one here."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_line_has_number_time_and_status(opened: Opens, path: Path) -> None:
    journal = opened()
    assert journal.status({"a": 1}) is True
    journal.ack(7)
    journal.error("boom\n" * 5000)
    status, ack, error = lines_of(path)
    assert (status["seq"], status["status"]) == (1, {"a": 1})
    assert (ack["seq"], ack["ack"]) == (2, 7)
    assert len(error["error"]) == 4096
    assert abs(status["t"] - path.stat().st_mtime) < 60


def test_status_of_256_kib_is_written_and_a_longer_one_refused_with_one_warning(
    opened: Opens, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = opened()
    assert journal.status("x" * (MAX_STATUS_BYTES - 2)) is True
    assert journal.status("x" * (MAX_STATUS_BYTES - 1)) is False
    assert journal.status("x" * 5_000_000) is False
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "at most 262144 are allowed" in warning
    assert len(lines_of(path)) == 1
    assert journal.status(1) is True


def test_nothing_is_raised_when_stderr_cannot_take_the_warning(opened: Opens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert opened().status("x" * 5_000_000) is False


def test_full_journal_refuses_statuses_but_takes_what_the_harness_needs(
    opened: Opens, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = opened(max_bytes=4096)
    written = 0
    while journal.status({"n": written}):
        written += 1
        assert written < 10_000
    assert [line["status"]["n"] for line in lines_of(path)] == list(range(written))
    journal.ack(3)
    journal.error("boom")
    assert lines_of(path)[-2]["ack"] == 3
    assert "the journal is full, 4096 bytes wait to be stored" in capsys.readouterr().err


def test_journal_takes_statuses_again_once_space_is_given_back(opened: Opens, path: Path) -> None:
    journal = opened(max_bytes=4096)
    while journal.status("x" * 1000):
        pass
    os.truncate(path, 0)
    assert journal.status("y") is True


def test_job_closing_the_journal_stops_statuses(opened: Opens, fds: list[int]) -> None:
    journal = opened()
    os.close(fds.pop(0))
    assert journal.status(1) is False


def test_file_that_took_the_journals_number_is_never_written_to(opened: Opens, fds: list[int], tmp_path: Path) -> None:
    journal = opened()
    own = os.open(tmp_path / "own", os.O_RDWR | os.O_CREAT)
    os.dup2(own, fds[0])
    os.close(own)
    assert journal.status(1) is False
    journal.ack(1)
    journal.error("boom")
    assert (tmp_path / "own").read_bytes() == b""


def test_full_disk_is_false_and_no_exception(opened: Opens, capsys: pytest.CaptureFixture[str]) -> None:
    journal = opened(target=Path("/dev/full"))
    assert journal.status(1) is False
    journal.ack(1)
    assert "No space left on device" in capsys.readouterr().err


def test_line_after_one_that_was_cut_short_stands_alone(opened: Opens, path: Path) -> None:
    journal = opened()

    def fill() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        assert journal.status("first") is True
        assert journal.status("x" * 80) is False  # a part of it fits
        assert journal.status("none") is False  # and then nothing at all
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert journal.status("last") is True

    in_child(fill)
    first, torn, last = path.read_text().splitlines()
    assert json.loads(first)["status"] == "first" and json.loads(last)["status"] == "last"
    assert len(first) + 1 + len(torn) == 100


def test_a_line_for_whose_newline_there_is_no_room_is_written(opened: Opens, path: Path) -> None:
    journal = opened()

    def fill() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        assert journal.status("one") is True
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * path.stat().st_size - 1, hard))
        assert journal.status("two") is True
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert journal.status("three") is True

    in_child(fill)
    assert [json.loads(line)["status"] for line in path.read_text().splitlines()] == ["one", "two", "three"]


def test_numbers_are_unique_between_threads_and_forked_children(opened: Opens, path: Path) -> None:
    journal = opened()

    def write() -> None:
        for number in range(500):
            journal.status({"n": number})

    def write_in_threads() -> None:
        threads = [threading.Thread(target=write) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    children = [os.fork() for _ in range(1)]
    if not all(children):
        write_in_threads()
        os._exit(0)
    write_in_threads()
    for child in children:
        os.waitpid(child, 0)
    assert sorted(line["seq"] for line in lines_of(path)) == list(range(1, 3001))


def test_status_whose_encoding_needs_too_much_memory_is_false(opened: Opens) -> None:
    class Greedy:
        def tolist(self) -> object:
            raise MemoryError

        def __repr__(self) -> str:
            raise MemoryError

    assert opened().status(Greedy()) is True  # told as <Greedy>
