from __future__ import annotations

import asyncio
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from harnessd.server import logs as module
from harnessd.server.cursor import CHUNK_BYTES, Cursor, tail
from harnessd.server.jobspec import LogSettings
from harnessd.server.logs import Logs, Runs
from harnessd.server.rotation import Log, RotatedAway

BLOCK = 4096
DEADLINE_S = 30


def written(path: Path, data: bytes, *, max_bytes: int = 2 * BLOCK, keep: int = 1000, compress: bool = True) -> Log:
    """Return the log of a job that wrote the data, rotated now and then."""
    log = Log(path)
    for begin in range(0, len(data), 3 * max_bytes):
        with path.open("ab") as file:
            file.write(data[begin : begin + 3 * max_bytes])
        log.rotate(max_bytes, keep)
    for start in log.to_compress() if compress else ():
        log.compress(start)
    return log


def text(offset: int, log: Log) -> bytes:
    cursor = Cursor(log, offset)
    data = b"".join(iter(lambda: cursor.read(1 << 20), b""))
    cursor.close()
    return data


async def poll(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - files have no event
            await asyncio.sleep(0.01)


# reading


@pytest.mark.parametrize("compress", [True, False])
def test_any_offset_can_be_read_from(tmp_path: Path, compress: bool) -> None:
    chance = random.Random(1)
    data = chance.randbytes(12 * BLOCK + 17)
    log = written(tmp_path / "etl.log", data, compress=compress)
    for offset in [0, 1, BLOCK, len(data) - 1, len(data), *(chance.randrange(len(data)) for _ in range(50))]:
        assert text(offset, log) == data[offset:]


def test_a_cursor_goes_on_through_rotation_and_compression(tmp_path: Path) -> None:
    path, data = tmp_path / "etl.log", random.Random(2).randbytes(20 * BLOCK)
    path.write_bytes(data)
    log, found = Log(path), b""
    cursor = Cursor(log, 0)
    for _ in range(200):
        found += cursor.read(777)
        log.rotate(BLOCK, 1000)
        for start in log.to_compress()[:1]:
            log.compress(start)
    while more := cursor.read(777):
        found += more
    assert found == data


def test_what_is_no_longer_kept_cannot_be_read(tmp_path: Path) -> None:
    log = written(tmp_path / "etl.log", bytes(20 * BLOCK), keep=2)
    with pytest.raises(RotatedAway):
        Cursor(log, 0).read(1)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("end", [b"\n", b"", b"\n\n\n"], ids=["newline", "none", "three"])
def test_tail_is_the_last_lines_wherever_they_lie(tmp_path: Path, compress: bool, end: bytes) -> None:
    chance = random.Random(3)
    data = b"\n".join(b"x" * chance.choice([0, 1, 30, 5000]) for _ in range(60)) + end
    log = written(tmp_path / "etl.log", data, compress=compress)
    lines = data.splitlines(keepends=True)
    for wanted in (0, 1, 2, 3, 30, 59, 60, 61, 62, 63, 1000):
        expected = b"".join(lines[-wanted:]) if wanted else b""
        assert data[tail(log, 0, len(data), wanted) :] == expected


def test_tail_stays_within_its_bounds(tmp_path: Path) -> None:
    log = written(tmp_path / "etl.log", b"one\ntwo\nthree\nfour\n")
    assert tail(log, 4, 14, 9) == 4
    assert tail(log, 0, 14, 1) == 8


def test_tail_of_a_line_of_100_MB_holds_little_of_it(tmp_path: Path) -> None:
    path = tmp_path / "etl.log"
    with path.open("wb") as file:
        file.write(b"first\n")
        file.truncate(100 << 20)
    tracemalloc.start()
    assert tail(Log(path), 0, 100 << 20, 1) == 6
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * CHUNK_BYTES


def test_tail_of_nothing_is_its_beginning(tmp_path: Path) -> None:
    assert tail(Log(tmp_path / "etl.log"), 0, 0, 10) == 0


# runs


def test_a_run_has_what_was_written_until_the_next_one(tmp_path: Path) -> None:
    log = Log(tmp_path / "etl.log")
    runs = Runs(log)
    runs.begin(11)
    log.path.write_bytes(bytes(3 * BLOCK))
    runs.begin(12)
    log.rotate(BLOCK, 10)
    runs.begin(13)
    assert [Runs(Log(log.path)).range_of(run) for run in (11, 12, 13)] == [
        (0, 3 * BLOCK),
        (3 * BLOCK, 3 * BLOCK),
        (3 * BLOCK, None),
    ]
    assert runs.range_of(14) is None


def test_half_a_note_costs_that_run_alone(tmp_path: Path) -> None:
    log = Log(tmp_path / "etl.log")
    Path(f"{log.path}.runs").write_bytes(b"11 0\n12 \n13 40\n")
    assert Runs(log).range_of(11) == (0, 40)
    assert Runs(log).range_of(12) is None


def test_notes_on_runs_without_kept_output_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RUNS_BYTES", 100)
    log = Log(tmp_path / "etl.log")
    runs = Runs(log)
    for run in range(10, 30):
        with log.path.open("ab") as file:
            file.write(bytes(BLOCK))
        log.rotate(BLOCK, 2)
        runs.begin(run)
    first, _ = log.bounds()
    assert len(Path(f"{log.path}.runs").read_bytes()) <= 120
    assert runs.range_of(29) == (20 * BLOCK, None)
    assert runs.range_of(11) is None
    assert runs.range_of(28) == (19 * BLOCK, 20 * BLOCK)
    assert first == 17 * BLOCK


# all logs


def test_no_two_jobs_share_a_file(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    names = ["a", "a.err", "a.log", "a.log.at", "a.err.log"]
    paths = {logs.path(name, stream, merge=False) for name in names for stream in ("stdout", "stderr")}  # type: ignore[arg-type]
    assert len(paths) == 2 * len(names)
    assert logs.path("a", "stderr", merge=True) == logs.path("a", "stdout", merge=True)


def test_a_tick_rotates_compresses_and_drops(tmp_path: Path) -> None:
    async def ticked() -> None:
        logs, path = Logs(tmp_path), tmp_path / "etl.log"
        settings = LogSettings(max_bytes=2 * BLOCK, keep=3)
        path.write_bytes(bytes(20 * BLOCK))

        def done() -> bool:
            logs.tick([("etl", settings), ("new", settings)])
            return len(list(tmp_path.glob("etl.log.0*.gz"))) == 3 == len(list(tmp_path.glob("etl.log.0*")))

        await poll(done)
        assert logs.log(str(path)).bounds() == (12 * BLOCK, 20 * BLOCK)
        await logs.close()

    asyncio.run(ticked())


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged while its run goes on"])
def test_stderr_apart_is_rotated_too(tmp_path: Path, merge: bool) -> None:
    async def ticked() -> None:
        logs = Logs(tmp_path)
        (tmp_path / "etl.err").write_bytes(bytes(20 * BLOCK))
        settings = LogSettings(max_bytes=2 * BLOCK, merge=merge, compress=False)

        def done() -> bool:
            logs.tick([("etl", settings)])
            return len(list(tmp_path.glob("etl.err.0*"))) == 9

        await poll(done)
        await logs.close()

    asyncio.run(ticked())


def test_what_an_earlier_server_left_is_compressed(tmp_path: Path) -> None:
    async def ticked() -> None:
        written(tmp_path / "etl.log", bytes(7 * BLOCK), compress=False)
        logs = Logs(tmp_path)

        def done() -> bool:
            logs.tick([("etl", LogSettings(max_bytes=2 * BLOCK))])
            return len(list(tmp_path.glob("etl.log.0*.gz"))) == 3 == len(list(tmp_path.glob("etl.log.0*")))

        await poll(done)
        await logs.close()

    asyncio.run(ticked())


def test_a_log_that_cannot_be_rotated_is_told_once_and_harms_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def ticked() -> None:
        logs, settings = Logs(tmp_path), LogSettings(max_bytes=2 * BLOCK)
        (tmp_path / "bad.log").write_bytes(bytes(4 * BLOCK))
        (tmp_path / "bad.log.at.part").mkdir()
        (tmp_path / "etl.log").write_bytes(bytes(4 * BLOCK))

        def done() -> bool:
            logs.tick([("bad", settings), ("etl", settings)])
            return (tmp_path / f"etl.log.{0:020d}.gz").exists()

        await poll(done)
        for _ in range(3):
            logs.tick([("bad", settings), ("etl", settings)])
            await poll(lambda: all(work.done() for work in logs._busy.values()))
        await logs.close()
        assert (tmp_path / "bad.log").stat().st_size == 4 * BLOCK

    asyncio.run(ticked())
    assert len([record for record in caplog.records if "cannot rotate" in record.message]) == 1


def test_begin_names_the_files_and_notes_the_offsets(tmp_path: Path) -> None:
    async def begun() -> None:
        logs = Logs(tmp_path)
        (tmp_path / "etl.err").write_bytes(b"old")
        assert logs.begin("etl", 5, merge=False) == (str(tmp_path / "etl.log"), str(tmp_path / "etl.err"))
        assert logs.begin("etl", 6, merge=True) == (str(tmp_path / "etl.log"), "")
        assert Runs(logs.log(str(tmp_path / "etl.err"))).range_of(5) == (3, None)
        assert Runs(logs.log(str(tmp_path / "etl.log"))).range_of(5) == (0, 0)
        await logs.close()

    asyncio.run(begun())


def test_a_folder_that_is_gone_stops_no_run(tmp_path: Path) -> None:
    async def begun() -> None:
        logs = Logs(tmp_path / "gone")
        assert logs.begin("etl", 5, merge=True)[0] == str(tmp_path / "gone" / "etl.log")
        await logs.close()

    asyncio.run(begun())


def test_a_change_is_told_once_and_to_all(tmp_path: Path) -> None:
    async def told() -> None:
        logs, path = Logs(tmp_path), tmp_path / "etl.log"
        assert logs.changes.next(str(path)) is None
        path.write_bytes(b"")
        one, two, gone = (logs.changes.next(str(path)) for _ in range(3))
        assert one and two and gone
        gone.cancel()
        with path.open("ab") as file:
            file.write(b"x")
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(one, two)
        await logs.close()

    asyncio.run(told())
