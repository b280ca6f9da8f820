"""No byte is lost and none is there twice, whoever writes and whenever the rotating process dies."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harnessd.server import rotation
from harnessd.server.cursor import Cursor
from harnessd.server.rotation import Log, RotatedAway

BLOCK = 4096
LINE = 16
# Numbered lines, appended as fast as it goes, in pieces that end at no block.
WRITER = """
import itertools, os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
at = 0
for turn in itertools.count():
    upto = at + 1 + turn * 37 % 1500
    data = b"".join(b"%015d\\n" % number for number in range(at, upto))
    assert os.write(fd, data) == len(data)
    at = upto
"""
ROTATOR = """
import sys
from pathlib import Path
from harnessd.server.rotation import Log
log = Log(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    log.rotate(65536, 100_000)
    for start in log.to_compress()[:2]:
        log.compress(start)
"""


@pytest.fixture(params=["here", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A log on the filesystem of the temporary folder, which may collapse, and one in memory, which can only punch."""
    if request.param == "here":
        yield tmp_path / "etl.log"
        return
    folder = Path(f"/dev/shm/harnessd-test-{os.getpid()}-{time.monotonic_ns()}")
    folder.mkdir()
    yield folder / "etl.log"
    for left in folder.iterdir():
        left.unlink()
    folder.rmdir()


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def begin(code: str, path: Path) -> subprocess.Popen[str]:
        started.append(subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout
    process.stdout.close()


def numbered(first: int, size: int) -> bytes:
    return b"".join(b"%015d\n" % number for number in range(first, first + size // LINE))


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def read_all(log: Log, offset: int = 0) -> bytes:
    cursor = Cursor(log, offset)
    found = b"".join(iter(lambda: cursor.read(1 << 20), b""))
    cursor.close()
    return found


def assert_whole(log: Log) -> None:
    """Everything that the numbering writer wrote is there, once, in order."""
    first, end = log.bounds()
    assert first == 0
    cursor, at = Cursor(log, 0), 0
    while data := cursor.read(1 << 20):
        lines = -(-(at + len(data)) // LINE) - at // LINE
        assert data == numbered(at // LINE, lines * LINE)[at % LINE :][: len(data)]
        at += len(data)
    assert at == end


def test_rotated_files_and_log_together_are_what_was_written(path: Path) -> None:
    log, data = Log(path), numbered(0, 50_000)
    append(path, data)

    assert log.rotate(2 * BLOCK, 100) == 6
    append(path, b"more")

    rotated = sorted(path.parent.glob("etl.log.0*"))
    assert [each.stat().st_size for each in rotated] == [2 * BLOCK] * 6
    assert b"".join(each.read_bytes() for each in rotated) == data[: 12 * BLOCK]
    assert read_all(log) == data + b"more"
    assert path.read_bytes().lstrip(b"\0") == data[12 * BLOCK :] + b"more"


def test_space_is_given_back(path: Path) -> None:
    append(path, bytes(1 << 20) + b"x")
    Log(path).rotate(1 << 20, 0)
    assert path.stat().st_blocks * 512 <= 2 * BLOCK


def test_a_log_not_longer_than_max_bytes_stays_as_it_is(path: Path) -> None:
    append(path, bytes(2 * BLOCK))
    assert Log(path).rotate(2 * BLOCK, 10) == 0
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_log_is_nothing_to_rotate(path: Path) -> None:
    assert Log(path).rotate(BLOCK, 10) == 0
    assert Log(path).bounds() == (0, 0)


def test_only_the_newest_are_kept_and_offsets_stay(path: Path) -> None:
    log, data = Log(path), numbered(0, 20 * BLOCK)
    for begin in range(0, len(data), 4 * BLOCK):
        append(path, data[begin : begin + 4 * BLOCK])
        log.rotate(BLOCK, 3)

    assert log.bounds() == (16 * BLOCK, 20 * BLOCK)
    assert len(list(path.parent.glob("etl.log.0*"))) == 3
    assert read_all(log, 17 * BLOCK) == data[17 * BLOCK :]
    with pytest.raises(RotatedAway):
        read_all(log, 15 * BLOCK)


def test_nothing_is_copied_that_would_not_be_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda part, to: (copied.append(Path(to).name), replace(part, to)))
    append(path, bytes(100 * BLOCK + 1))
    Log(path).rotate(BLOCK, 2)
    assert [name for name in copied if name != "etl.log.at"] == [f"etl.log.{n * BLOCK:020d}" for n in (98, 99)]


def test_a_new_log_object_goes_on_where_the_old_one_was(path: Path) -> None:
    data = numbered(0, 30 * BLOCK)
    for begin in range(0, len(data), 5 * BLOCK):
        append(path, data[begin : begin + 5 * BLOCK])
        Log(path).rotate(2 * BLOCK, 100)
    assert read_all(Log(path)) == data


def test_compressed_files_read_as_before(path: Path) -> None:
    log, data = Log(path), numbered(0, 10 * BLOCK)
    append(path, data)
    log.rotate(3 * BLOCK, 100)
    for start in log.to_compress():
        log.compress(start)

    assert log.to_compress() == []
    assert len(list(path.parent.glob("etl.log.0*.gz"))) == len(list(path.parent.glob("etl.log.0*"))) == 3
    assert read_all(log) == data
    assert read_all(Log(path), 5000) == data[5000:]


def test_a_stopped_compression_leaves_the_file_as_it_was(path: Path) -> None:
    log = Log(path)
    append(path, numbered(0, 3 * BLOCK))
    log.rotate(BLOCK, 100)
    log.compress(0, stopped=lambda: True)
    assert log.to_compress() == [0, BLOCK]
    assert not list(path.parent.glob("*gz*"))


def test_a_file_dropped_while_it_is_compressed_does_not_come_back(path: Path) -> None:
    log = Log(path)
    append(path, numbered(0, 3 * BLOCK))
    log.rotate(BLOCK, 100)

    def rotate() -> bool:
        append(path, numbered(0, 3 * BLOCK))
        log.rotate(BLOCK, 1)
        return False

    log.compress(0, stopped=rotate)
    assert not list(path.parent.glob("*gz*"))


def test_an_emptied_log_goes_on(path: Path) -> None:
    log, data = Log(path), numbered(0, 4 * BLOCK)
    append(path, data)
    log.rotate(2 * BLOCK, 100)
    os.truncate(path, 0)
    log.rotate(2 * BLOCK, 100)
    append(path, b"anew")
    assert read_all(log) == data[: 2 * BLOCK] + b"anew"
    assert read_all(Log(path)) == data[: 2 * BLOCK] + b"anew"


def test_a_lost_note_overwrites_no_rotated_file(path: Path) -> None:
    data = numbered(0, 10 * BLOCK)
    append(path, data)
    log = Log(path)
    log.rotate(2 * BLOCK, 100)
    log.compress(log.to_compress()[-1])
    path.with_name("etl.log.at").write_bytes(b"\0\0")
    before = sorted(path.parent.glob("etl.log.0*"))

    append(path, data)
    Log(path).rotate(2 * BLOCK, 100)

    assert set(before) < set(path.parent.glob("etl.log.0*"))


def test_a_full_disk_leaves_everything_where_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space")

    log, data = Log(path), numbered(0, 10 * BLOCK)
    append(path, data)
    with monkeypatch.context() as patched:
        patched.setattr(os, "sendfile", full)
        with pytest.raises(OSError, match="no space"):
            log.rotate(2 * BLOCK, 100)
    assert path.read_bytes() == read_all(log) == data
    assert not list(path.parent.glob("*.part"))
    assert log.rotate(2 * BLOCK, 100) == 4
    assert read_all(log) == data


def test_without_holes_nothing_is_cut_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_holes(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(rotation, "_fallocate", no_holes)
    append(path, bytes(10 * BLOCK))
    with pytest.raises(OSError, match="not supported"):
        Log(path).rotate(BLOCK, 10)
    assert list(path.parent.iterdir()) == [path]


class Crash(BaseException):
    """As if the process had been killed there."""


STEPS = ((os, "replace"), (os, "unlink"), (os, "fdatasync"), (os, "sendfile"), (rotation, "_fallocate"))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("keep", [100, 3])
def test_a_crash_at_any_step_loses_and_doubles_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, keep: int
) -> None:
    """The same block again and again in the log would hide a loss from a comparison, so all of them differ."""
    written = b""
    for crash_at in itertools.count():
        written += (more := numbered(len(written) // LINE, 5 * BLOCK))
        append(path, more)
        with monkeypatch.context() as patched:
            crashed = _rotate_until(crash_at, before, path, keep, patched)
        log = Log(path)
        first, end = log.bounds()
        assert end == len(written)
        assert first == 0 or keep == 3
        assert read_all(log, first) == written[first:]
        log.rotate(2 * BLOCK, keep)
        assert read_all(log, log.bounds()[0]) == written[log.bounds()[0] :]
        if not crashed:
            break
    assert crash_at >= 10
    for start in log.to_compress():
        log.compress(start)
    assert not list(path.parent.glob("*.part"))


def _rotate_until(crash_at: int, before: bool, path: Path, keep: int, patched: pytest.MonkeyPatch) -> bool:
    left = itertools.count(-crash_at)

    def crashing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            now = next(left) == 0
            if now and before:
                raise Crash
            try:
                return function(*args)
            finally:
                if now:
                    raise Crash

        return call

    for owner, name in STEPS:
        patched.setattr(owner, name, crashing(getattr(owner, name)))
    try:
        log = Log(path)
        log.rotate(2 * BLOCK, keep)
        for start in log.to_compress()[-1:]:
            log.compress(start)
    except Crash:
        return True
    return False


def test_100_rotations_under_a_writer_at_full_speed_lose_no_byte(
    path: Path, start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "_AT_ONCE", 1)
    writer, log, rotations = start(WRITER, path), Log(path), 0
    while rotations < 100:
        assert writer.poll() is None
        rotations += log.rotate(64 << 10, 1 << 20) > 0
    end(writer)
    assert_whole(log)


def test_30_kills_of_the_rotating_process_lose_and_double_nothing(
    path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    writer, chance = start(WRITER, path), random.Random(4)
    for _ in range(30):
        os.kill(writer.pid, signal.SIGCONT)
        rotator = start(ROTATOR, path)
        assert rotator.stdout
        assert rotator.stdout.readline() == "ready\n"
        deadline = time.monotonic() + chance.uniform(0, 0.08)
        while time.monotonic() < deadline:
            pass
        end(rotator)
        os.kill(writer.pid, signal.SIGSTOP)  # or it fills the disk while the next one is on its way
    end(writer)
    assert_whole(Log(path))
