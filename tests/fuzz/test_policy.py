"""The real supervisor, on a host that is not real and by a clock that the test moves, beside what an operator knows."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fuzz.profile import VALUES, examples
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from harnessd.errors import Refused, SpawnFailed
from harnessd.server import policy, supervisor
from harnessd.server.definition import Definition
from harnessd.server.host import EndNote, LiveRun
from harnessd.server.policy import Rules
from harnessd.server.records import Event, RunEnded, RunStarted
from harnessd.server.supervisor import Folders, Supervisor
from harnessd.server.tape import Line
from harnessd.states import ExitReason, State, Want
from harnessd.wire import ExitRecord, RunSpec, unpack_command

WALL_S = 1_700_000_000.0
RULES = st.builds(
    Rules,
    restart=st.sampled_from(["on-failure", "always", "never"]),
    start_seconds=st.sampled_from([0.0, 1.0, 30.0]),
    max_failures=st.integers(1, 3),
    messages=st.booleans(),
)
VERBS = st.sampled_from(
    [policy.StartAsked, policy.StartAsked, policy.StopAsked, policy.PauseAsked, policy.ResumeAsked, policy.RestartAsked]
)
ENDS = st.sampled_from([(0, None, False), (1, None, False), (None, 9, False), (None, 9, True), (None, 15, False)])
SPANS = st.sampled_from([0.0, 0.05, 0.6, 1.1, 31.0, 61.0, 1e5])


class Clock(asyncio.SelectorEventLoop):
    """An event loop for which time passes only when it is told."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__()

    def time(self) -> float:
        return self.now

    def do(self, function: Callable[..., object], *args: object) -> None:
        """Call it in the loop, and let everything happen that is to happen then."""

        async def called() -> None:
            function(*args)

        self.run_until_complete(called())
        self.settle()

    def settle(self) -> None:
        """Let everything happen that is to happen now."""
        for _ in range(30):
            self.run_until_complete(asyncio.sleep(0))


@dataclass(frozen=True)
class FakeRun(LiveRun):
    clock: Clock = field(kw_only=True)
    since: float = field(kw_only=True)

    def uptime_s(self) -> float:
        return self.clock.now - self.since


@dataclass
class Process:
    run: FakeRun
    theirs: socket.socket
    ending: bool = False
    frozen: bool = False


class FakeHost:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.on_exit: Any = None
        self.asked: list[tuple[RunSpec, asyncio.Future[LiveRun]]] = []
        self.processes: list[Process] = []
        self.acknowledged: list[int] = []
        self.to_end: set[int] = set()
        self.ending = False

    async def spawn(self, spec: RunSpec) -> LiveRun:
        self.asked.append((spec, self.clock.create_future()))
        return await self.asked[-1][1]

    def answer(self) -> None:
        spec, reply = self.asked.pop(0)
        Path(spec.journal).touch()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setblocking(False)
        page = memoryview(bytearray(64)).cast("Q")
        about = (spec.run, spec.job, spec.mark, os.getpid(), 1, 1, WALL_S, spec.journal, ours.detach(), page)
        run = FakeRun(*about, clock=self.clock, since=self.clock.now)
        self.processes.append(Process(run, theirs, ending=self.ending or spec.run in self.to_end))
        reply.set_result(run)

    def fail(self) -> None:
        spec, reply = self.asked.pop(0)
        reply.set_exception(SpawnFailed(f"cannot start {spec.job!r}: no more processes"))

    def shut_down(self) -> None:
        """End and continue all as the keeper does, also what it was asked to start before."""
        self.ending = True
        for process in self.processes:
            process.ending, process.frozen = True, False

    def end(self, run: int, grace_s: float | None, note: EndNote) -> None:
        """End it; one that is no process yet is ended as soon as it is one."""
        assert run in [each.run.run for each in self.processes] + [spec.run for spec, _ in self.asked]
        self.to_end.add(run)
        for process in self.processes:
            if process.run.run == run:
                process.ending, process.frozen = True, False

    def signal(self, run: int, number: signal.Signals) -> None:
        (process,) = [each for each in self.processes if each.run.run == run]
        process.frozen = number == signal.SIGSTOP

    def acknowledge(self, run: int) -> None:
        self.acknowledged.append(run)


class FakeReader:
    def __init__(self) -> None:
        self.on_lines: dict[int, Any] = {}

    def follow(self, run: int, tape: Any, path: Path, on_lines: Any, max_rate: float) -> None:
        tape.close()
        self.on_lines[run] = on_lines

    def finish(self, run: int, on_end: Any) -> None:
        del self.on_lines[run]
        on_end()


class AnyOperatorAndHost(RuleBasedStateMachine):
    @initialize(rules=RULES)
    def begin(self, rules: Rules) -> None:
        self.clock = Clock()
        asyncio.set_event_loop(self.clock)
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        time = SimpleNamespace(
            monotonic=self.clock.time,
            time=lambda: WALL_S + self.clock.now,
            time_ns=lambda: int((WALL_S + self.clock.now) * 1e9),
        )
        self.patch = mock.patch.object(supervisor, "time", time)
        self.patch.start()
        self.host = FakeHost(self.clock)
        self.records: list[Any] = []
        self.supervisor = Supervisor(self.host, Folders(self.folder, 1 << 20), self.records.append)
        self.entry = self.supervisor.add(self.definition(rules, "1"))
        self.supervisor.read_with(FakeReader())  # type: ignore[arg-type]
        self.wanted, self.final = Want.DOWN, False
        self.spawns_when_final = 0
        self.accepted: set[int] = set()  # since the last run has ended
        self.loop_errors: list[Any] = []
        self.clock.set_exception_handler(lambda _, context: self.loop_errors.append(context))

    def definition(self, rules: Rules, digest: str) -> Definition:
        return Definition("etl", rules, 0.1, {}, lambda spec: spec, digest, {"name": "etl"})

    def teardown(self) -> None:
        if not hasattr(self, "clock"):
            return
        while self.host.asked or self.host.processes:
            if self.host.asked:
                self.host.asked.pop(0)[1].cancel()
            else:
                process = self.host.processes.pop()
                process.theirs.close()
                with suppress(OSError):
                    os.close(process.run.mailbox)
        if self.entry.timer:
            self.entry.timer.cancel()
        self.clock.settle()
        self.patch.stop()
        self.clock.close()
        asyncio.set_event_loop(None)
        shutil.rmtree(self.folder)

    @property
    def process(self) -> Process | None:
        return self.host.processes[0] if self.host.processes else None

    # the operator

    @rule(verb=VERBS)
    def ask(self, verb: type[policy.Event]) -> None:
        with suppress(Refused):
            receipt = self.clock.run_until_complete(self.supervisor.ask(self.entry, verb()))
            if receipt.queued:
                self.accepted.add(receipt.id)
            if verb in (policy.StartAsked, policy.RestartAsked):
                self.wanted, self.final = Want.UP, False
            elif verb is policy.StopAsked:
                self.wanted, self.final = Want.DOWN, True
        self.clock.settle()

    @rule(data=st.dictionaries(st.text(max_size=3), VALUES, max_size=2))
    def configure(self, data: dict[str, Any]) -> None:
        before = dict(self.entry.overrides)
        try:
            receipt = self.clock.run_until_complete(self.supervisor.configure(self.entry, data))
            if receipt.queued:
                self.accepted.add(receipt.id)
        except (Refused, ValueError):  # NaN, which the body's parser never lets through
            assert self.entry.overrides == before
        self.clock.settle()

    @rule(grace_s=st.sampled_from([None, 0.0, 5.0]))
    def kill(self, grace_s: float | None) -> None:
        with suppress(Refused):
            self.clock.run_until_complete(self.supervisor.kill(self.entry, grace_s=grace_s, wait=False))
            self.wanted, self.final = Want.DOWN, True
        self.clock.settle()

    @precondition(lambda self: not self.host.ending)
    @rule(rules=RULES, digest=st.sampled_from("12"))
    def change_its_file(self, rules: Rules, digest: str) -> None:
        messages = self.entry.definition.rules.messages  # how it is steered is in the digest
        changed = Rules(rules.restart, rules.start_seconds, rules.max_failures, messages=messages)
        known = set(self.unread_ids())
        self.clock.do(self.supervisor.redefine, self.entry, self.definition(changed, digest))
        self.accepted |= set(self.unread_ids()) - known

    @precondition(lambda self: self.process and not self.host.ending)
    @rule()
    def hang(self) -> None:
        self.clock.do(self.supervisor.apply, self.entry, policy.Hung(ExitReason.HUNG), "hangs")

    @precondition(lambda self: self.clock.now > 1e5)
    @rule()
    def shut_down(self) -> None:
        self.host.shut_down()
        self.clock.do(self.supervisor.shut_down)

    # the host and the job

    @precondition(lambda self: self.host.asked)
    @rule(fails=st.sampled_from([False, False, False, True]))
    def answer_the_spawn(self, fails: bool) -> None:
        if fails:
            self.host.fail()
            self.accepted.clear()
        else:
            self.host.answer()
        self.clock.settle()

    @precondition(lambda self: self.process and not self.process.frozen)
    @rule()
    def read_a_command(self) -> None:
        assert self.process
        with suppress(BlockingIOError):
            command = unpack_command(self.process.theirs.recv(1 << 18))
            assert command["id"] in self.accepted, "a command that was for another run, or nobody's"
            self.accepted.discard(command["id"])
            reader: Any = self.supervisor._reader
            run = self.process.run.run
            self.clock.do(reader.on_lines[run], [Line(run, 1, 1, "ack", str(command["id"]))])

    @precondition(lambda self: self.process)
    @rule(end=ENDS)
    def end(self, end: tuple[int | None, int | None, bool]) -> None:
        assert self.process
        code, number, oom = end
        process = self.host.processes.pop()
        process.theirs.close()
        age_s = process.run.uptime_s()
        about = (process.run.run, "etl", 1, code, number, False, WALL_S, age_s, age_s, 0.0, 0, 0, oom)
        self.accepted.clear()
        self.clock.do(self.host.on_exit, ExitRecord(*about))
        assert process.run.run in self.host.acknowledged

    @rule(span_s=SPANS)
    def pass_time(self, span_s: float) -> None:
        self.clock.now += span_s
        self.clock.settle()

    # what holds at every moment

    def unread_ids(self) -> list[int]:
        live = self.entry.live
        return [unread.id for unread, _ in self.entry.outbox] + (list(live.unread) if live else [])

    def of_kind(self, kind: type) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]

    @invariant()
    def nothing_was_raised_in_the_loop(self) -> None:
        assert self.loop_errors == []

    @invariant()
    def there_is_one_run_at_most_and_it_is_known(self) -> None:
        runs = len(self.host.asked) + len(self.host.processes)
        assert runs <= 1, "two live runs of a job"
        assert self.entry.job.is_live == (runs == 1)
        assert bool(self.entry.spawning) == (len(self.host.asked) == 1)
        assert (self.entry.live is not None) == (self.process is not None)

    @invariant()
    def what_is_wanted_is_what_was_asked_for(self) -> None:
        assert self.entry.job.want is self.wanted
        if self.entry.job.state in (State.STARTING, State.RUNNING, State.PAUSED, State.BACKOFF):
            assert self.wanted is Want.UP

    @invariant()
    def a_spawn_is_for_a_job_that_is_wanted(self) -> None:
        if self.host.asked and self.final:
            assert self.entry.job.state is State.STOPPING, "started after a stop or a kill"
        if self.host.ending and not self.process and not self.host.asked:
            assert not self.entry.job.is_live

    @invariant()
    def the_events_are_a_path_to_the_state(self) -> None:
        state = State.STOPPED
        for event in self.of_kind(Event):
            if event.kind == "state":
                assert event.data["from"] == state
                assert event.data["to"] != state
                state = event.data["to"]
        assert self.entry.job.state == state

    @invariant()
    def every_run_that_is_over_has_one_end(self) -> None:
        started = [record.id for record in self.of_kind(RunStarted)]
        ended = [record.run for record in self.of_kind(RunEnded)]
        assert len(set(started)) == len(started)
        assert ended == started[: len(ended)]
        assert started[len(ended) :] == [process.run.run for process in self.host.processes]
        assert [*map(int, self.host.acknowledged)] == ended

    @invariant()
    def a_command_waits_or_was_read_or_is_noted_as_unread(self) -> None:
        counts: Counter[str] = self.entry.commands
        assert set(self.unread_ids()) == self.accepted
        assert counts["queued"] + counts["reload"] == counts["read"] + counts["unread"] + len(self.accepted)

    @invariant()
    def what_is_due_has_a_timer(self) -> None:
        rules = self.entry.definition.rules
        due = policy.due(self.entry.job, rules) < float("inf") and not self.entry.spawning
        assert (self.entry.timer is not None) == due

    @invariant()
    def a_run_is_being_ended_exactly_while_its_job_is_stopping_by_force(self) -> None:
        life = self.entry.job.life
        if self.process:
            assert self.process.ending == (isinstance(life, policy.Stopping) and life.forced)
            if not self.entry.definition.rules.messages:
                assert self.process.frozen == (life.state is State.PAUSED)


AnyOperatorAndHost.TestCase.settings = examples(40, stateful_step_count=30)
TestAnyOperatorAndHost = AnyOperatorAndHost.TestCase


def test_a_command_for_a_run_that_could_not_be_started_is_not_handed_to_a_later_one() -> None:
    machine = AnyOperatorAndHost()
    machine.begin(Rules())
    try:
        machine.ask(policy.StartAsked)
        machine.ask(policy.PauseAsked)
        machine.answer_the_spawn(fails=True)
        machine.ask(policy.StopAsked)
        machine.ask(policy.StartAsked)
        machine.answer_the_spawn(fails=False)
        machine.read_a_command()
        machine.read_a_command()
        assert machine.entry.job.state is State.RUNNING
        assert machine.entry.commands["unread"] == 2
        assert machine.entry.commands["read"] == 1
    finally:
        machine.teardown()
