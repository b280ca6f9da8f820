"""What the database holds after the worst has happened: everything that was said, once."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from helpers.daemon import Daemon
from helpers.waiting import until

UNTHINNED = "[history]\nmax_rate = 1e9\n"


NUMBERS = "SELECT json_extract(status, '$.number') FROM status_history WHERE job = 'counts' ORDER BY seq"


def numbers(daemon: Daemon) -> list[int]:
    return [number for (number,) in daemon.rows(NUMBERS)]


def numbers_if_any(daemon: Daemon) -> list[int]:
    """Return the numbers; none while a new database is being made."""
    try:
        return numbers(daemon)
    except sqlite3.OperationalError:
        return []


def counted(daemon: Daemon, tmp_path: Path) -> int:
    """Stop the job that counts. Return the last number that it said."""
    daemon.get("/jobs/counts/stop")
    daemon.wait_state("counts", "stopped")
    return int((tmp_path / "last").read_text())


def has_all(daemon: Daemon, last: int) -> bool:
    return numbers(daemon) == list(range(1, last + 1))


@pytest.fixture
def counting(daemon: Daemon, tmp_path: Path) -> Daemon:
    daemon.settings(UNTHINNED)
    daemon.job("counts", "Counts", args=[str(tmp_path / "last")])
    daemon.start()
    daemon.wait_state("counts", "running")
    return daemon


def test_every_status_is_stored_once_whenever_the_server_is_killed(counting: Daemon, tmp_path: Path) -> None:
    chance = random.Random(4)
    for _ in range(5):
        old = counting.server_pid()
        time.sleep(chance.uniform(0.05, 0.4))
        os.kill(old, signal.SIGKILL)
        counting.wait_new_server(old)
    last = counted(counting, tmp_path)
    until(lambda: has_all(counting, last), "every number to be stored once")


def test_a_locked_database_stops_nothing_and_all_is_stored_afterwards(counting: Daemon, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "state" / "harnessd.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        until(lambda: counting.get("/healthz").status_code == 503, "the trouble to be noticed")
        heartbeat = counting.hb("counts")
        assert heartbeat["alive"]
        assert "locked" in heartbeat["storage"]
        seen = counting.status("counts")["number"]
        counting.wait_for(lambda: counting.status("counts")["number"] > seen, "a newer status")
        other.execute("ROLLBACK")
    until(lambda: counting.hb("counts")["storage"] == "ok", "the end of the trouble")
    last = counted(counting, tmp_path)
    until(lambda: has_all(counting, last), "every number to be stored once")


def test_a_deleted_database_is_begun_anew_and_supervision_goes_on(counting: Daemon, tmp_path: Path) -> None:
    pid = counting.hb("counts")["pid"]
    until(lambda: numbers(counting), "something to be stored")
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / "state" / f"harnessd.db{suffix}").unlink(missing_ok=True)
    until(lambda: numbers_if_any(counting), "a new database with statuses")
    assert counting.hb("counts")["pid"] == pid
    last = counted(counting, tmp_path)
    until(lambda: numbers(counting)[-1:] == [last], "the last number to be stored")
    stored = numbers(counting)
    assert len(stored) == len(set(stored))


def test_a_damaged_database_is_set_aside_and_the_daemon_boots(daemon: Daemon, tmp_path: Path) -> None:
    daemon.job("idle", "Idle")
    daemon.start()
    daemon.wait_state("idle", "running")
    daemon.stop()
    path = tmp_path / "state" / "harnessd.db"
    with open(path, "r+b") as file:
        file.write(b"\xff" * 8192)
    daemon.start()
    daemon.wait_state("idle", "running")
    assert list((tmp_path / "state").glob("harnessd.db.corrupt-*"))
    until(lambda: daemon.rows("SELECT 1 FROM status_history"), "statuses in the new database")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small filesystem cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_nothing_and_all_is_stored_once_there_is_room(
    daemon: Daemon, small_disk: Path, tmp_path: Path
) -> None:
    daemon.settings(UNTHINNED)
    settings = tmp_path / "config" / "harnessd.toml"
    settings.write_text(settings.read_text().replace(str(tmp_path / "state"), str(small_disk / "state")))
    assert "small" in settings.read_text()
    daemon.job("counts", "Counts", args=[str(tmp_path / "last")])
    daemon.start()
    daemon.wait_state("counts", "running")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * 4096)
            except OSError:
                break
    until(lambda: daemon.hb("counts")["storage"] != "ok", "the trouble to be noticed")
    assert daemon.get("/healthz").status_code == 503
    assert daemon.hb("counts")["alive"]
    filler.unlink()
    until(lambda: daemon.hb("counts")["storage"] == "ok", "the end of the trouble")
    last = counted(daemon, tmp_path)
    with closing(sqlite3.connect(small_disk / "state" / "harnessd.db")) as connection:
        until(
            lambda: [number for (number,) in connection.execute(NUMBERS)] == list(range(1, last + 1)),
            "every number to be stored once",
        )


def test_what_a_reader_in_a_long_transaction_sees_does_not_stop_the_writer(counting: Daemon, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "state" / "harnessd.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        before = reader.execute("SELECT count(*) FROM status").fetchone()
        until(lambda: len(numbers(counting)) > before[0] + 500, "statuses to be stored meanwhile")
        assert reader.execute("SELECT count(*) FROM status").fetchone() == before
        assert counting.hb("counts")["storage"] == "ok"


def test_a_backup_is_whole_while_the_daemon_writes(counting: Daemon, tmp_path: Path) -> None:
    command = shutil.which("harnessd", path=str(Path(sys.executable).parent))
    assert command
    config = str(tmp_path / "config")
    subprocess.run([command, "db", "backup", config, str(tmp_path / "copy.db")], check=True, timeout=60)
    subprocess.run([command, "db", "check", config], check=True, timeout=60)
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        (stored,) = copy.execute("SELECT count(*) FROM status").fetchone()
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert stored > 0


def answers(daemon: Daemon) -> bool:
    try:
        return daemon.get("/healthz").status_code in (200, 503)
    except httpx.ConnectError:
        return False


def test_on_a_read_only_state_directory_the_daemon_boots_and_its_jobs_run(
    daemon: Daemon, small_disk: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "config" / "harnessd.toml"
    daemon.settings()
    settings.write_text(settings.read_text().replace(str(tmp_path / "state"), str(small_disk / "state")))
    daemon.job("idle", "Idle")
    daemon.start()
    daemon.stop()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    daemon.launch()
    until(lambda: answers(daemon), "the daemon serves")
    heartbeat = daemon.wait_state("idle", "running")
    assert "Read-only" in heartbeat["storage"]
    assert daemon.get("/healthz").status_code == 503
    assert daemon.get("/jobs/idle/kill").json()["exit"]["reason"] == "killed"
    daemon.stop()


def test_what_config_has_set_outlives_a_start_without_the_database(daemon: Daemon, tmp_path: Path) -> None:
    daemon.job("one", "Idle")
    daemon.start()
    assert daemon.post("/jobs/one/config", {"a": 1}).status_code == 202
    daemon.stop()
    database, aside = tmp_path / "state" / "harnessd.db", tmp_path / "aside.db"
    database.rename(aside)
    database.mkdir()
    daemon.launch()
    daemon.wait_for(lambda: daemon.log.count("serving 1 jobs") == 2, "it serves again")
    assert daemon.get("/jobs/one/config").json()["overrides"] == {}
    assert daemon.post("/jobs/one/config", {"b": 2}).status_code == 202
    database.rmdir()
    aside.rename(database)
    daemon.wait_for(lambda: daemon.get("/jobs/one/config").json()["overrides"] == {"a": 1, "b": 2}, "they are known")
    until(lambda: daemon.rows("SELECT overrides FROM job") == [('{"a": 1, "b": 2}',)], "and kept")
