"""What happens to the file happens here: locked, full, gone, damaged, killed in mid-commit."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import RUN, job_row, run_started, status_lines

from harnessd.errors import StoreError
from harnessd.server import desired
from harnessd.server.records import Event, RunEnded
from harnessd.server.store import Store
from harnessd.server.tape import Tape

OpenStore = Callable[..., Store]
ROOT = Path(desired.__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def failed(future: Future[Any]) -> bool:
    return isinstance(future.exception(10), StoreError)


def set_aside(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.corrupt-*Z"))


def test_while_another_holds_the_lock_records_wait_and_lines_are_refused(store: Store, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.put(Event("tick", 1))
        lines = store.put_lines(RUN, status_lines(1, 3), offset=3, count=3)
        assert failed(lines)
        health = store.health()
        assert (health["ok"], health["lines_waiting"]) == (False, 0)
        assert "locked" in str(health["error"])
        assert failed(store.put_lines(RUN, status_lines(1, 3), offset=3, count=3))
        other.execute("ROLLBACK")
    store.flush().result(10)
    store.put_lines(RUN, status_lines(1, 3), offset=3, count=3).result(10)
    assert rows(path, "SELECT count(*) FROM event WHERE kind = 'tick'") == [(1,)]
    assert rows(path, "SELECT seq FROM status") == [(1,), (2,), (3,)]
    until(
        lambda: len(rows(path, "SELECT id FROM event WHERE kind = 'storage'")) == 2, "failure and recovery are events"
    )
    assert store.health()["ok"]


def test_a_store_that_is_closed_tries_once_more(store: Store, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.put(Event("tick", 1))
        until(lambda: not store.health()["ok"], "storage fails")
        store._health.retry_at = time.monotonic() + 60
        other.execute("ROLLBACK")
    store.close()
    assert rows(path, "SELECT count(*) FROM event WHERE kind = 'tick'") == [(1,)]


def test_what_was_recorded_while_the_database_could_not_be_opened_gets_no_number_that_is_taken(
    store: Store, path: Path, open_store: OpenStore
) -> None:
    for number in range(100):
        store.put(Event("before", number))
    store.flush().result(10)
    store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        later = open_store()
        later.put(Event("meanwhile", 4))
        until(lambda: later._backlog.last_event, "it was tried, with a number")
        until(lambda: len(later._backlog), "it waits again")
        other.execute("ROLLBACK")
    later.flush().result(30)
    assert rows(path, "SELECT count(*) FROM event WHERE kind = 'before'") == [(100,)]
    assert rows(path, "SELECT id > 100 FROM event WHERE kind = 'meanwhile'") == [(1,)]


def test_when_lines_fail_those_behind_them_fail_too(store: Store, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.put(Event("tick", 1))
        waiting = [store.put_lines(RUN, status_lines(n, n), offset=n, count=n, since=n - 1) for n in range(1, 100)]
        assert all(map(failed, waiting))
        other.execute("ROLLBACK")
    store.flush().result(10)
    assert rows(path, "SELECT count(*) FROM status") == [(0,)]


def test_a_reader_in_a_long_transaction_stops_nothing(store: Store, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM status").fetchone() == (0,)
        for number in range(20):
            lines = status_lines(number * 1000 + 1, number * 1000 + 1000)
            store.put_lines(RUN, lines, offset=number, count=number).result(10)
        assert reader.execute("SELECT count(*) FROM status").fetchone() == (0,)
        assert store.health()["wal_bytes"] > 1_000_000  # type: ignore[operator]
    assert rows(path, "SELECT count(*) FROM status") == [(20_000,)]


def test_a_long_write_ahead_log_is_cut_once_its_reader_is_gone(
    path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harnessd.server.database.WAL_LIMIT_BYTES", 1 << 20)
    monkeypatch.setattr("harnessd.server.store.WAL_LOOK_SECONDS", 0.0)
    store = open_store()
    store.put(job_row())
    store.put(run_started())
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM status").fetchone()
        store.put_lines(RUN, status_lines(1, 20_000), offset=1, count=1).result(10)
        assert store.health()["wal_bytes"] > 1 << 20  # type: ignore[operator]
    store.put(Event("tick", 1))
    store.flush().result(10)
    until(lambda: store.health()["wal_bytes"] < 1 << 20, "the log is cut")  # type: ignore[operator]


def test_a_reconnect_keeps_sqlites_locks_so_that_a_reader_who_leaves_does_not_take_the_wal(
    path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harnessd.server.database.BUSY_MS", 50)
    store = open_store()
    store.put(Event("tick", 1))
    store.flush().result(10)
    with store.readers.connect() as reader:
        reader.exec_driver_sql("SELECT 1 FROM job")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.put(Event("tick", 2))
        assert failed(store.put_lines(RUN, status_lines(1, 1), offset=1, count=1))
        other.execute("ROLLBACK")
    store.flush().result(10)
    wal = os.stat(f"{path}-wal").st_ino
    look = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); d.execute('SELECT 1 FROM job').fetchall(); d.close()"
    subprocess.run([sys.executable, "-c", look, path], check=True)
    assert os.stat(f"{path}-wal").st_ino == wal
    store.put(Event("tick", 3))
    store.flush().result(10)
    assert rows(path, "SELECT at_us FROM event WHERE kind = 'tick' ORDER BY id") == [(1,), (2,), (3,)]


def test_after_the_file_is_deleted_a_new_one_begins_with_what_is_known(store: Store, path: Path) -> None:
    store.put(Event("tick", 1))
    store.put_lines(RUN, status_lines(1, 3), offset=30, count=3).result(10)
    path.unlink()
    assert failed(store.put_lines(RUN, status_lines(4, 6), offset=60, count=6))
    store.flush().result(10)
    store.put_lines(RUN, status_lines(4, 6), offset=60, count=6).result(10)
    assert rows(path, "SELECT seq FROM status") == [(4,), (5,), (6,)]
    assert rows(path, "SELECT id, journal_offset FROM run") == [(RUN, 60)]
    assert rows(path, "SELECT name, want FROM job") == [("etl", "up")]
    assert rows(path, "SELECT min(id) > 1000000 FROM event") == [(1,)], "ids go on above those that were given"


def test_a_store_that_is_closed_after_its_file_was_deleted_leaves_a_new_one(store: Store, path: Path) -> None:
    store.put_lines(RUN, status_lines(1, 3), offset=30, count=3).result(10)
    with store.together():  # what is put meets the close
        path.unlink()
        store.put(Event("tick", 1))
        store._closing = True
    store.close()
    assert rows(path, "SELECT name, want FROM job") == [("etl", "up")]
    assert rows(path, "SELECT count(*) FROM event WHERE kind = 'tick'") == [(1,)]


def test_a_damaged_database_is_set_aside_by_name_and_a_new_one_begun(store: Store, path: Path) -> None:
    store.put(RunEnded(RUN, 77))
    store.put_lines(RUN, status_lines(1, 5000), offset=5000, count=5000).result(10)
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.write(b"\x5a" * 4096 * 40)
    until(lambda: store.put(Event("tick", 1)) or set_aside(path), "the damage is noticed")
    store.flush().result(10)
    assert len(set_aside(path)) == 1
    assert rows(path, "SELECT id, ended_us, journal_offset FROM run") == [(RUN, 77, 5000)]
    (data,) = rows(path, "SELECT data FROM event WHERE kind = 'storage' ORDER BY id LIMIT 1")[0]
    assert json.loads(data)["set_aside"] == str(set_aside(path)[0])
    until(lambda: store.health()["ok"], "all is well again")


def test_damage_that_a_reader_meets_is_acted_upon(store: Store, path: Path) -> None:
    error = sqlite3.DatabaseError("database disk image is malformed")
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    store.suspect(error)
    until(lambda: set_aside(path), "it is set aside")
    store.suspect(sqlite3.OperationalError("database is locked"))
    store.flush().result(10)
    assert len(set_aside(path)) == 1


@pytest.mark.parametrize("content", [b"this is no database" * 1000, b"SQLite format 3\0" + b"\x5a" * 8192])
def test_the_daemon_boots_with_a_damaged_database(path: Path, open_store: OpenStore, content: bytes) -> None:
    path.write_bytes(content)
    assert desired.load_fast(path).error
    store = open_store(path)
    store.put(job_row())
    store.flush().result(10)
    assert set_aside(path)[0].read_bytes() == content
    assert rows(path, "SELECT name FROM job") == [("etl",)]


def test_the_daemon_boots_where_no_database_can_be_and_stores_later(path: Path, open_store: OpenStore) -> None:
    path.mkdir()
    store = open_store(path)
    store.put(job_row())
    store.put(run_started())
    assert not store.health()["ok"]
    assert store.load().error
    path.rmdir()
    store.flush().result(10)
    assert rows(path, "SELECT id FROM run") == [(RUN,)]


def test_without_a_file_nothing_is_wanted_and_nothing_is_made(tmp_path: Path) -> None:
    assert desired.load_fast(tmp_path / "no.db") == desired.Loaded()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sqlite3, sys
from harnessd.server.records import RunEnded
from harnessd.server.store import Store
from helpers.rows import RUN, job_row, run_started
store = Store.open(sys.argv[1])
store.put(job_row(want="up", restarts=3)); store.put(run_started()); store.flush().result(10)
sqlite3.connect(sys.argv[1]).execute("PRAGMA wal_checkpoint(TRUNCATE)")  # what comes after it is in the WAL alone
store.put(job_row(want="down", restarts=4)); store.put(RunEnded(RUN, 9)); store.flush().result(10)
os.kill(os.getpid(), signal.SIGKILL)
"""
NO_ROOM = """
import resource, sys
from harnessd.server.desired import load_fast
resource.setrlimit(resource.RLIMIT_FSIZE, (1, -1))
found = load_fast(sys.argv[1])
print([(job.want, job.restarts) for job in found.jobs], len(found.runs), len(found.ended), bool(found.error))
"""


@pytest.fixture
def in_wal(path: Path) -> Path:
    """A database of which a part is in the WAL alone, and whose index is gone."""
    subprocess.run([sys.executable, "-c", KILLED, path], env=ENV, timeout=60)
    path.with_name(f"{path.name}-shm").unlink()
    assert path.with_name(f"{path.name}-wal").stat().st_size
    return path


def without_room(path: Path) -> str:
    argv = [sys.executable, "-c", NO_ROOM, path]
    return subprocess.run(argv, env=ENV, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def test_without_room_for_its_index_the_wal_is_read_all_the_same(in_wal: Path) -> None:
    assert without_room(in_wal) == "[('down', 4)] 0 1 False"


def test_where_the_wal_cannot_be_read_only_what_was_wanted_is_known_and_that_with_the_error(in_wal: Path) -> None:
    with open(in_wal, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, 0x40000000)  # SQLite's own, as another program that is about to write
        assert without_room(in_wal) == "[('up', 0)] 0 0 True"


def test_an_end_that_is_stored_stays_as_it_is(store: Store, path: Path) -> None:
    store.put(job_row())
    store.put(run_started())
    store.put(RunEnded(RUN, 1, exit_code=0, reason="completed"))
    store.put(RunEnded(RUN, 2, reason="lost"))
    store.flush().result(10)
    assert rows(path, "SELECT ended_us, exit_code, reason FROM run") == [(1, 0, "completed")]


def test_desired_state_is_read_without_sqlalchemy() -> None:
    code = "import sys, harnessd.server.desired, harnessd.server.tape; sys.exit('sqlalchemy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENV)


FULL = """
import resource, sys, time
from harnessd.server.store import Store
from harnessd.server.records import Event
from helpers.rows import RUN, job_row, run_started, status_lines
store = Store.open(sys.argv[1])
store.put(job_row()); store.put(run_started()); store.flush().result(10)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, -1))
stored = 0
while store.health()["ok"]:
    future = store.put_lines(RUN, status_lines(stored + 1, stored + 500), stored + 500, stored + 500)
    if future.exception(10):
        break
    stored += 500
store.put(Event("tick", 1))
assert 0 < stored < 100_000, stored
assert not store.health()["ok"]
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
store.flush().result(20)
store.put_lines(RUN, status_lines(stored + 1, stored + 500), stored + 500, stored + 500).result(10)
store.close()
print(stored + 500)
"""


def test_after_a_full_disk_what_waited_is_stored_once(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, path], env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    stored = int(done.stdout)
    assert rows(path, "SELECT count(*), max(seq) FROM status") == [(stored, stored)]
    assert rows(path, "SELECT journal_offset FROM run") == [(stored,)]
    assert rows(path, "SELECT count(*) FROM event WHERE kind = 'tick'") == [(1,)]


READER = """
import sys
from pathlib import Path
from harnessd.server.store import Store
from harnessd.server.tape import Tape
from helpers.rows import RUN, job_row, run_started
store = Store.open(sys.argv[1])
store.put(job_row()); store.put(run_started())
run = (*store.load().runs, run_started())[0]
tape = Tape(Path(sys.argv[2]), RUN, offset=run.journal_offset, lines=run.journal_lines)
while True:
    since = tape.offset
    if lines := tape.read(4096):
        stored = store.put_lines(RUN, lines, tape.offset, tape.lines, since=since)
        stored.add_done_callback(lambda _, offset=tape.offset: tape.give_back(offset))
    elif sys.argv[3] == "final":
        break
store.close()
"""


def test_killed_at_any_moment_every_line_is_stored_once(path: Path, tmp_path: Path) -> None:
    journal, seqs, chance = tmp_path / "journal", 0, random.Random(1)
    journal.touch()

    def write(count: int) -> int:
        with journal.open("a") as file:
            file.writelines(
                f'{{"seq":{seq},"t":1.5,"status":{{"n":{seq}}}}}\n' for seq in range(seqs + 1, seqs + count + 1)
            )
        return seqs + count

    for _ in range(15):
        stored = count(path)
        reader = subprocess.Popen([sys.executable, "-c", READER, path, journal, "on"], env=ENV)
        seqs = write(5_000)
        until(lambda stored=stored: count(path) > stored, "something is stored")  # type: ignore[misc]
        seqs = write(5_000)
        time.sleep(chance.random() * 0.05)
        reader.send_signal(signal.SIGKILL)
        reader.wait(10)
    subprocess.run([sys.executable, "-c", READER, path, journal, "final"], env=ENV, check=True, timeout=60)
    assert rows(path, "SELECT count(*), count(DISTINCT seq), min(seq), max(seq) FROM status") == [(seqs, seqs, 1, seqs)]
    assert rows(path, "SELECT journal_offset, journal_lines, status_rows FROM run") == [
        (journal.stat().st_size, seqs, seqs)
    ]
    assert rows(path, "SELECT count(*) FROM event") == [(0,)], "no line was torn by what was given back"


def count(path: Path) -> int:
    try:
        return int(rows(path, "SELECT count(*) FROM status")[0][0])
    except sqlite3.OperationalError:
        return 0  # not made yet, or being recovered


def test_lines_refused_are_read_again_from_what_was_stored(store: Store, path: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.write_text("".join(f'{{"seq":{seq},"t":1.5,"status":{seq}}}\n' for seq in range(1, 1001)))
    tape = Tape(journal, RUN)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert failed(store.put_lines(RUN, tape.read(), tape.offset, tape.lines))
        other.execute("ROLLBACK")
    tape.rewind(0, 0)
    store.flush().result(10)
    store.put_lines(RUN, tape.read(), tape.offset, tape.lines).result(10)
    assert rows(path, "SELECT count(*), max(seq) FROM status") == [(1000, 1000)]


def test_a_checkpoint_that_fails_ends_nothing(
    path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([sqlite3.OperationalError("disk I/O error")])

    def fail_once(*_: object) -> None:
        if failure := next(failures, None):
            raise failure

    monkeypatch.setattr("harnessd.server.database.Database.bound_wal", fail_once)
    monkeypatch.setattr("harnessd.server.store.WAL_LOOK_SECONDS", 0.0)
    store = open_store()
    for number in range(3):
        store.put(Event("tick", number))
        store.flush().result(10)
    assert next(failures, None) is None
    assert rows(path, "SELECT count(*) FROM event WHERE kind = 'tick'") == [(3,)]


def test_what_is_put_together_is_committed_together(store: Store, path: Path) -> None:
    with store.together():
        store.put(RunEnded(RUN, 77))
        for _ in range(20):  # the store's thread would take it at once
            time.sleep(0.01)
            assert rows(path, "SELECT ended_us FROM run") == [(None,)]
        store.put(job_row(state="exited"))
    store.flush().result(10)
    assert rows(path, "SELECT ended_us FROM run") == [(77,)]
    assert rows(path, "SELECT state FROM job") == [("exited",)]


def test_rows_put_by_whoever_could_not_read_the_database_keep_what_only_those_in_it_say(
    path: Path, tmp_path: Path, open_store: OpenStore
) -> None:
    before, aside = open_store(), tmp_path / "aside.db"
    before.put(job_row(overrides='{"a": 1, "b": 1}', restarts=5, ever_up=True))
    before.close()
    path.rename(aside)
    path.mkdir()
    seen: list[Any] = []
    store = open_store()
    assert store.load().error
    store.unseen(seen.extend)
    store.put(job_row(overrides='{"b": 2}', restarts=1))
    path.rmdir()
    aside.rename(path)
    store.flush().result(30)
    assert rows(path, "SELECT overrides, restarts, ever_up FROM job") == [('{"a": 1, "b": 2}', 6, 1)]
    assert [(row.name, row.restarts) for row in seen] == [("etl", 5)]
    store.put(job_row(restarts=7))
    store.flush().result(10)
    assert rows(path, "SELECT overrides, restarts FROM job") == [("{}", 7)], "whoever puts it now has seen the others"
