"""The supervisor between two servers, with a host that does what the test says."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import RUN, job_row, run_started

from harnessd import tree
from harnessd.errors import SpawnFailed, TooLarge, Unavailable
from harnessd.server import policy
from harnessd.server.adoption import Adopted, plan
from harnessd.server.definition import Definition
from harnessd.server.entry import Exit, Queued, Recalled
from harnessd.server.host import EndNote, LiveRun
from harnessd.server.reading import Reader
from harnessd.server.records import Event, JobRow, JournalDone, Loaded, Record, RunEnded, RunStarted
from harnessd.server.supervisor import Folders, Supervisor, run_ended
from harnessd.server.supervisor import run_started as start_of
from harnessd.states import Command, ExitReason, State, Want
from harnessd.wire import ExitRecord, RunSpec, unpack_command

DEFINITION = Definition("etl", policy.Rules(restart="never"), 1.0, {}, lambda run: run, "d1", {"name": "etl"})


class Host:
    """Forks nothing; a run is there when `forked` says so."""

    on_exit: Callable[[ExitRecord], None]

    def __init__(self) -> None:
        self.asked: asyncio.Queue[RunSpec] = asyncio.Queue()
        self.forked: asyncio.Queue[LiveRun | SpawnFailed] = asyncio.Queue()
        self.acknowledged: list[int] = []
        self.ended: list[tuple[int, float | None, str]] = []

    async def spawn(self, spec: RunSpec) -> LiveRun:
        self.asked.put_nowait(spec)
        forked = await self.forked.get()
        if isinstance(forked, SpawnFailed):
            raise forked
        return forked

    def end(self, run: int, grace_s: float | None, note: EndNote) -> None:
        self.ended.append((run, grace_s, note.want))

    def signal(self, run: int, number: int) -> None: ...

    def acknowledge(self, run: int) -> None:
        self.acknowledged.append(run)


def ended(run: int) -> ExitRecord:
    return ExitRecord(run, "etl", 42, 0, None, False, 1_700_000_009.0, 8.0, 8.0, 0.1, 1 << 20, 0)


def live(spec: RunSpec) -> LiveRun:
    page: Any = memoryview(bytearray(64)).cast("Q")
    ticks = tree.start_ticks(os.getpid())
    return LiveRun(spec.run, spec.job, spec.mark, os.getpid(), ticks, ticks, 1.0, spec.journal, -1, page)


def write(journal: str) -> None:
    Path(journal).write_text('{"seq":1,"t":1.5,"status":"said"}\n')


async def adopt_an_exit(supervisor: Supervisor) -> None:
    supervisor.add(DEFINITION)
    job = policy.Job(Want.UP, policy.Running(0.0), proven=True)
    supervisor.adopt(Adopted("etl", job, ended(RUN), outdated=False), 99, 3)
    reader = Reader(None, lambda _: None)
    supervisor.read_with(reader)
    reader.close()


def test_an_adopted_exit_whose_journal_is_gone_counts_as_read(tmp_path: Path) -> None:
    records: list[Record] = []
    host = Host()
    asyncio.run(adopt_an_exit(Supervisor(host, Folders(tmp_path, 1 << 20), records.append)))
    assert JournalDone(RUN) in records
    assert [record.run for record in records if isinstance(record, RunEnded)] == [RUN]
    assert host.acknowledged == [RUN]


def test_a_run_that_was_being_forked_when_the_server_leaves_is_left_to_the_next(tmp_path: Path) -> None:
    records: list[Record] = []
    host = Host()

    async def leaves() -> Path:
        supervisor = Supervisor(host, Folders(tmp_path, 1 << 20), records.append)
        entry = supervisor.add(DEFINITION)
        reader = Reader(None, lambda _: None)
        supervisor.read_with(reader)
        supervisor.apply(entry, policy.Autostart(), "the test")
        spec = await host.asked.get()
        reader.close()
        write(spec.journal)
        spawned = entry.spawned()
        host.forked.put_nowait(live(spec))
        await spawned
        host.on_exit(ended(spec.run))
        return Path(spec.journal)

    journal = asyncio.run(leaves())
    assert journal.read_text().endswith('"said"}\n')
    assert not any(isinstance(record, RunEnded) for record in records)
    assert host.acknowledged == []


@pytest.mark.parametrize("state", [State.STOPPING, State.PAUSED])
def test_what_is_stored_of_a_run_is_not_taken_for_the_state_of_the_next_which_is_not_stored_yet(state: State) -> None:
    def adopted(known: Loaded) -> policy.Job:
        (found,) = plan({"etl": DEFINITION}, known, [in_memory()], [], cold=False, now=1000.0).adopted
        return found.job

    jobs = (job_row(state=state, ever_up=True),)
    assert adopted(Loaded(jobs=jobs, runs=(run_started(),))).state is state
    assert adopted(Loaded(jobs=jobs, runs=(run_started(RUN - 1),))).state is State.RUNNING


def test_the_end_of_a_run_and_of_its_job_are_recorded_together(tmp_path: Path) -> None:
    records: list[Record] = []
    together: list[list[str]] = []

    @contextmanager
    def group() -> Iterator[None]:
        before = len(records)
        yield
        together.append([type(record).__name__ for record in records[before:]])

    supervisor = Supervisor(Host(), Folders(tmp_path, 1 << 20), records.append)
    supervisor.together = group
    asyncio.run(adopt_an_exit(supervisor))
    assert together[-1] == ["RunEnded", "Event", "JobRow"]


def in_memory(run: int = RUN) -> LiveRun:
    page: Any = memoryview(bytearray(64)).cast("Q")
    ticks = tree.start_ticks(os.getpid())
    return LiveRun(run, "etl", 3, os.getpid(), ticks, ticks, 1.0, "/j/1", -1, page)


@pytest.mark.parametrize(
    ("state", "want", "missed"),
    [
        (State.STOPPING, Want.DOWN, policy.StopAsked()),
        (State.STOPPING, Want.UP, policy.RestartAsked()),
        (State.PAUSED, Want.UP, policy.PauseAsked()),
        (State.STARTING, Want.UP, None),
    ],
)
def test_what_was_asked_of_a_job_while_its_run_was_forked_is_asked_again(
    state: State, want: Want, missed: policy.Event | None
) -> None:
    row = job_row(state=state, want=want, changed_us=RUN * 1000 + 5000)
    (found,) = plan({"etl": DEFINITION}, Loaded(jobs=(row,)), [in_memory()], [], cold=False, now=1000.0).adopted
    assert found.missed == missed


def test_a_run_that_was_to_end_while_it_was_forked_and_has_ended_is_not_started_again() -> None:
    def adopted(changed_us: int) -> policy.Job:
        row = job_row(state=State.STOPPING, want=Want.DOWN, changed_us=changed_us)
        (found,) = plan({"etl": DEFINITION}, Loaded(jobs=(row,)), [], [ended(RUN)], cold=False, now=1000.0).adopted
        return found.job

    job = adopted(changed_us=RUN * 1000 + 5000)
    assert (job.state, job.want) == (State.STOPPING, Want.DOWN)
    assert adopted(changed_us=RUN * 1000).state is State.RUNNING  # that was the run before


@pytest.mark.parametrize(("state", "reason"), [(State.STOPPING, "stopped"), (State.RUNNING, "completed")])
def test_why_a_run_ended_that_the_next_has_followed_already_is_told_by_what_was_stored(
    state: State, reason: str
) -> None:
    known = Loaded(jobs=(job_row(state=state),), runs=(run_started(),))
    found = plan({"etl": DEFINITION}, known, [in_memory(RUN + 1)], [ended(RUN)], cold=False, now=1000.0)
    assert [passed.reason for passed in found.passed.values()] == [reason]
    assert [adopted.run.run for adopted in found.adopted] == [RUN + 1]


@pytest.mark.parametrize("row", [None, job_row(), job_row(state=State.STOPPING)])
@pytest.mark.parametrize("is_live", [True, False])
def test_why_a_run_ends_and_whether_its_job_is_wanted_is_known_from_its_host(row: JobRow | None, is_live: bool) -> None:
    note = EndNote(ExitReason.HUNG, Want.DOWN).to_frame()
    known = Loaded(jobs=(row,) if row else (), runs=(run_started(),))
    lives, exits = (
        ([replace(in_memory(), end_note=note)], []) if is_live else ([], [replace(ended(RUN), end_note=note)])
    )
    (adopted,) = plan({"etl": DEFINITION}, known, lives, exits, cold=False, now=1000.0).adopted
    assert adopted.missed is None and adopted.job.want is Want.DOWN
    assert isinstance(adopted.job.life, policy.Stopping)
    assert adopted.job.life.forced and adopted.job.life.reason is ExitReason.HUNG


def test_what_is_wanted_after_a_run_was_told_to_end_is_told_to_its_host(tmp_path: Path) -> None:
    host = Host()

    async def restarts_and_stops() -> None:
        supervisor = Supervisor(host, Folders(tmp_path, 1 << 20), lambda _: None)
        entry = supervisor.add(DEFINITION)
        supervisor.adopt(Adopted("etl", policy.Job(Want.UP, policy.Running(0.0)), in_memory(), outdated=False), 0, 0)
        for event in (policy.RestartAsked(), policy.StopAsked(), policy.StopAsked(), policy.StartAsked()):
            supervisor.apply(entry, event, "the test")

    asyncio.run(restarts_and_stops())
    assert host.ended == [(RUN, 1.0, "up"), (RUN, None, "down"), (RUN, None, "up")]


def test_the_exit_of_a_run_that_could_not_be_handed_over_is_stored(tmp_path: Path) -> None:
    records: list[Record] = []
    host = Host()

    async def fails() -> int:
        supervisor = Supervisor(host, Folders(tmp_path, 1 << 20), records.append)
        reader = Reader(None, lambda _: None)
        supervisor.read_with(reader)
        entry = supervisor.add(DEFINITION)
        supervisor.apply(entry, policy.Autostart(), "the test")
        spec = await host.asked.get()
        host.on_exit(ended(spec.run))  # it comes together with the answer
        host.forked.put_nowait(SpawnFailed("cannot start 'etl': no descriptor is left"))
        await entry.spawned()
        await asyncio.sleep(0)
        reader.close()
        return spec.run

    run = asyncio.run(fails())
    assert [type(record).__name__ for record in records if getattr(record, "run", 0) == run][-1] == "RunEnded"
    assert any(isinstance(record, RunStarted) and record.id == run for record in records)
    assert host.acknowledged == [run]


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not yet"])
@pytest.mark.parametrize(
    ("owed", "read", "sent"),
    [(True, False, [2, 3, 4]), (True, True, [3, 4]), (False, False, [])],
    ids=["all", "rest", "none"],
)
def test_a_run_gets_the_commands_that_the_server_it_was_forked_for_had_not_sent(
    tmp_path: Path, stored: bool, owed: bool, read: bool, sent: list[int]
) -> None:
    journal = tmp_path / "journal"
    journal.write_text('{"seq":1,"t":1.5,"ack":2}\n' if read else "")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    queued = {
        1: Queued(Command.START, None, None),  # for the run before
        2: Queued(Command.PAUSE, None, None),
        3: Queued(Command.CONFIG, {"n": 1}, None),
        4: Queued(Command.RESUME, None, RUN),
        5: Queued(Command.RESUME, None, RUN - 1),
    }

    records: list[Record] = []

    def starts() -> int:
        return sum(isinstance(record, RunStarted) for record in records)

    async def adopts() -> list[int]:
        supervisor = Supervisor(Host(), Folders(tmp_path, 1 << 20), records.append)
        entry = supervisor.add(DEFINITION)
        run = replace(in_memory(), mailbox=ours.detach(), journal=str(journal))
        job = policy.Job(Want.UP, policy.Running(0.0))
        supervisor.adopt(Adopted("etl", job, run, outdated=False, owed=owed), 0, 0)
        assert starts() == (not owed), "one that is stored is owed nothing, should this server end as well"
        exits = {"etl": Exit(2, 0, None, ExitReason.COMPLETED, 1.0)} if stored else {}
        unstored = {} if stored else {"etl": [2, RUN], "feed": [5]}
        supervisor.recall(Recalled(exits=exits, unread={"etl": queued}), unstored)
        supervisor.store_owed()
        assert starts() == 1
        assert entry.live
        unread = list(entry.live.unread)
        entry.live.close()
        return unread

    with theirs:
        assert asyncio.run(adopts()) == [2, 3, 4]
        packets = iter(lambda: theirs.recv(1 << 16), b"")
        assert [unpack_command(packet)["id"] for packet in packets] == sent


def test_a_kill_reaches_the_host_before_it_can_be_stored(tmp_path: Path) -> None:
    host, ended = Host(), list[int]()

    @contextmanager
    def together() -> Iterator[None]:
        yield
        ended.append(len(host.ended))

    async def kills() -> None:
        supervisor = Supervisor(host, Folders(tmp_path, 1 << 20), lambda _: None)
        entry = supervisor.add(DEFINITION)
        supervisor.apply(entry, policy.Autostart(), "the test")
        spec = await host.asked.get()
        supervisor.together = together
        supervisor.apply(entry, policy.KillAsked(0.0), "kill")
        host.forked.put_nowait(live(spec))
        await entry.spawned()

    asyncio.run(kills())
    assert ended[0] == 1


def test_a_command_for_a_run_that_is_being_forked_is_noted_as_that_runs(tmp_path: Path) -> None:
    host, records = Host(), list[Record]()

    async def starts() -> int:
        supervisor = Supervisor(host, Folders(tmp_path, 1 << 20), records.append)
        entry = supervisor.add(DEFINITION)
        supervisor.apply(entry, policy.Autostart(), "the test")
        await supervisor.ask(entry, policy.StartAsked())
        spec = await host.asked.get()
        spawned = entry.spawned()
        host.forked.put_nowait(SpawnFailed("cannot start 'etl': the test"))
        await spawned
        return spec.run

    run = asyncio.run(starts())
    assert [record.run for record in records if isinstance(record, Event) and record.kind == "command"] == [run]


def test_a_server_without_its_keeper_takes_no_verb(tmp_path: Path) -> None:
    async def asks() -> None:
        supervisor = Supervisor(Host(), Folders(tmp_path, 1 << 20), lambda _: None)
        entry = supervisor.add(DEFINITION)
        supervisor.adopt(Adopted("etl", policy.Job(Want.UP, policy.Running(0.0)), in_memory(), outdated=False), 0, 0)
        supervisor.lose_host()
        with pytest.raises(Unavailable, match="cannot restart 'etl': the server is leaving; ask again"):
            await supervisor.ask(entry, policy.RestartAsked())
        with pytest.raises(Unavailable, match="cannot kill 'etl'"):
            await supervisor.kill(entry, grace_s=None)
        supervisor.apply(entry, policy.SpecChanged(), "its file has changed")
        assert entry.job.state is State.RUNNING

    asyncio.run(asks())


def test_a_wait_of_no_time_sees_that_a_command_is_read_already(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def pauses() -> bool | None:
        supervisor = Supervisor(Host(), Folders(tmp_path, 1 << 20), lambda _: None)
        entry = supervisor.add(DEFINITION)
        job = policy.Job(Want.UP, policy.Running(0.0))
        run = replace(in_memory(), mailbox=ours.detach())
        supervisor.adopt(Adopted("etl", job, run, outdated=False), 0, 0)
        assert entry.live
        unread = entry.live.unread

        def stored(then: Callable[[], None]) -> None:
            unread.popitem()[1].tell(True)
            then()

        supervisor.when_stored = stored
        receipt = await supervisor.ask(entry, policy.PauseAsked(), wait_s=0.0)
        entry.live.close()
        return receipt.read

    with theirs:
        assert asyncio.run(pauses()) is True


def test_while_nothing_can_be_stored_a_verb_leaves_nothing_behind_that_waits_for_it(tmp_path: Path) -> None:
    async def clears() -> None:
        supervisor = Supervisor(Host(), Folders(tmp_path, 1 << 20), lambda _: None)
        entry, waiting = supervisor.add(DEFINITION), list[Callable[[], None]]()
        supervisor.when_stored = waiting.append
        supervisor.can_store = lambda: False
        await supervisor.clear_config(entry)
        assert not waiting

    asyncio.run(clears())


def test_what_waited_for_a_run_is_sent_before_the_run_is_stored(tmp_path: Path) -> None:
    host, sent = Host(), list[int]()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)

    def stored(record: Record) -> None:
        if isinstance(record, RunStarted):
            sent.append(unpack_command(theirs.recv(1 << 16, socket.MSG_DONTWAIT))["id"])

    async def forks() -> int | None:
        supervisor = Supervisor(host, Folders(tmp_path, 1 << 20), stored)
        entry = supervisor.add(DEFINITION)
        supervisor.apply(entry, policy.Autostart(), "the test")
        receipt = await supervisor.ask(entry, policy.StartAsked(), data={"n": 1})
        spawned = entry.spawned()
        host.forked.put_nowait(replace(live(await host.asked.get()), mailbox=ours.detach()))
        await spawned
        assert entry.live
        entry.live.close()
        return receipt.id

    with theirs:
        assert [asyncio.run(forks())] == sent


def test_why_a_run_ended_whose_job_is_gone_is_known_from_its_host() -> None:
    record = replace(ended(RUN), end_note=EndNote(ExitReason.KILLED, Want.DOWN).to_frame())
    known = Loaded(runs=(run_started(),))
    assert plan({}, known, [], [record], cold=False, now=1000.0).passed[RUN].reason is ExitReason.KILLED


def test_the_exit_of_a_run_whose_job_no_file_defines_is_stored_as_it_was(tmp_path: Path) -> None:
    records: list[Record] = []
    host = Host()

    async def ends() -> None:
        supervisor = Supervisor(host, Folders(tmp_path, 1 << 20), records.append)
        reader = Reader(None, lambda _: None)
        supervisor.read_with(reader)
        host.on_exit(ended(RUN))
        reader.close()

    asyncio.run(ends())
    assert records == [start_of(ended(RUN), tmp_path / f"{RUN}.jsonl"), run_ended(ended(RUN), ExitReason.COMPLETED)]
    assert host.acknowledged == [RUN]


def test_a_stop_that_the_run_was_not_told_of_reaches_it(tmp_path: Path) -> None:
    host = Host()

    async def adopts() -> None:
        supervisor = Supervisor(host, Folders(tmp_path, 1 << 20), lambda _: None)
        entry = supervisor.add(replace(DEFINITION, rules=policy.Rules(messages=False)))
        job = policy.Job(Want.UP, policy.Running(0.0), proven=True)
        supervisor.adopt(Adopted("etl", job, in_memory(), outdated=False, missed=policy.StopAsked()), 0, 0)
        assert (entry.job.state, entry.job.want) == (State.STOPPING, Want.DOWN)

    asyncio.run(adopts())
    assert host.ended == [(RUN, 1.0, "down")]


@pytest.mark.parametrize("messages", [True, False])
def test_what_is_too_large_for_a_mailbox_is_not_kept_of_a_job_without_one_either(
    tmp_path: Path, messages: bool
) -> None:
    recorded: list[Record] = []

    async def starts() -> None:
        supervisor = Supervisor(Host(), Folders(tmp_path, 1 << 20), recorded.append)
        entry = supervisor.add(replace(DEFINITION, rules=policy.Rules(messages=messages)))
        with pytest.raises(TooLarge, match="at most 131072"):
            await supervisor.ask(entry, policy.StartAsked(), data="x" * (128 << 10))
        assert entry.job.state is State.STOPPED

    asyncio.run(starts())
    assert recorded == []


def test_the_end_of_a_run_that_was_begun_is_asked_for_again(tmp_path: Path) -> None:
    host = Host()

    async def adopts() -> None:
        supervisor = Supervisor(host, Folders(tmp_path, 1 << 20), lambda _: None)
        supervisor.add(DEFINITION)
        job = policy.Job(Want.DOWN, policy.Stopping(0.0, ExitReason.STOPPED, forced=True), proven=True)
        supervisor.adopt(Adopted("etl", job, in_memory(), outdated=False), 0, 0)

    asyncio.run(adopts())
    assert host.ended == [(RUN, 1.0, "down")]
