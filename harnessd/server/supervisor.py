"""The one stateful object: it holds every job, applies the policy, and runs the verbs.

One choke point, `_apply`, takes a step of the policy, records it and then acts; nobody else assigns a state. All of it
runs in the event loop. What is slow or may fail is elsewhere: processes with the host, journals with the reader, the
database with the store's own thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harnessd import tree
from harnessd.errors import (
    BadData,
    KeeperLost,
    MailboxFull,
    NotRead,
    Refused,
    SpawnFailed,
    TooLarge,
    Unavailable,
    WrongState,
)
from harnessd.server import policy
from harnessd.server.adoption import Adopted, unseen_reason
from harnessd.server.checks import Checks
from harnessd.server.definition import Definition
from harnessd.server.entry import Entry, Exit, Live, Queued, Recalled, Unread
from harnessd.server.finding import find
from harnessd.server.hangs import Hangs
from harnessd.server.host import EndNote, Host, LiveRun
from harnessd.server.known import completed
from harnessd.server.places import journal_name, journal_of
from harnessd.server.reading import Reader
from harnessd.server.records import Event, EventKind, JobRow, JournalDone, Record, RunEnded, RunStarted, Sample
from harnessd.server.tape import Line, Tape
from harnessd.states import ExitReason, State
from harnessd.wire import MAX_PACKET_BYTES, ExitRecord, RunSpec, merged, pack_command

_SETTLE_S = 0.5
_FOLLOW_AGAIN_S = 5.0  # until a journal that could not be opened is tried again
T = TypeVar("T")
if TYPE_CHECKING:
    from harnessd.server.logs import Logs  # of files that a script does not have

_SAMPLED_AT_ONCE = 50  # runs: every store of samples is a commit
_OUTBOX = 256  # commands that may wait for a run that is being forked: about what a mailbox holds
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What has become of a verb. `read` is None when nobody waited for it."""

    id: int
    job: str
    verb: str
    state: State
    queued: bool  # it went into the mailbox, or will once the run is there
    read: bool | None = None


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a run's files go. Without `logs` it has the harness's own stdout and stderr."""

    journals: Path
    journal_max_bytes: int
    logs: Logs | None = None


class Supervisor:
    """Holds the jobs. `record` takes what history keeps; it must not block."""

    def __init__(self, host: Host, folders: Folders, record: Callable[[Record], None]) -> None:
        self._host = host
        self._folders = folders
        self.logs = folders.logs
        self.record = record
        self._entries: dict[str, Entry] = {}
        self._by_run: dict[int, Entry] = {}
        self._reader: Reader | None = None
        self._early_exits: dict[int, ExitRecord] = {}  # until the run is attached and there is a reader for it
        self._last_id = 0
        self.default_job: str | None = None
        self.when_stored: Callable[[Callable[[], None]], None] = _at_once  # calls it once all recorded so far is stored
        self.can_store: Callable[[], bool] = lambda: True  # else nobody waits until something is
        self.together: Callable[[], AbstractContextManager[object]] = nullcontext  # recorded in it: one transaction
        self._leaving = asyncio.Event()
        self.ending = False
        self._unheard = False
        self._hangs = Hangs(self._note, self.apply)
        self._checks = Checks(self._note, self.apply)
        self._tasks: set[asyncio.Task[None]] = set()
        host.on_exit = self._on_exit

    # the jobs

    def add(self, definition: Definition, overrides: dict[str, Any] | None = None) -> Entry:
        """Register a job; it is stopped until a verb or `Autostart` says otherwise."""
        entry = Entry(definition, overrides or {})
        self._entries[definition.name] = entry
        return entry

    def redefine(self, entry: Entry, definition: Definition) -> None:
        """Put a changed spec in force: with a new run if that needs one, its config with a CONFIG, the rest at once."""
        before, entry.definition = entry.definition, definition
        entry.withdrawn = False
        if before.digest != definition.digest:
            self.apply(entry, policy.SpecChanged(), "its file has changed")
        elif before.config != definition.config and entry.live:
            with suppress(Refused):  # it finds the new config when it starts
                self._tell_config(entry)
        self._put_job(entry)
        self._arm(entry)

    def change_rate(self, entry: Entry, max_rate: float) -> None:
        """Put a changed `history.max_rate` in force, for the live run too."""
        entry.definition = replace(entry.definition, max_rate=max_rate)
        if self._reader and entry.live:
            self._reader.change_rate(entry.live.run, max_rate)

    def _tell_config(self, entry: Entry) -> None:
        event = policy.ConfigAsked()
        effective = merged(entry.definition.config, entry.overrides)
        self._command(entry, event, effective, "reload")

    def withdraw(self, entry: Entry) -> None:
        """Stop a job whose file is gone, and deregister it once it has no run."""
        entry.withdrawn = True
        self.apply(entry, policy.Withdrawn(), "its file is gone")
        self._forget_withdrawn(entry)

    def _forget_withdrawn(self, entry: Entry) -> None:
        if entry.withdrawn and not entry.job.is_live and not entry.live and self._entries.get(entry.name) is entry:
            del self._entries[entry.name]
            self.record(replace(entry.row(_now_us()), removed_us=_now_us()))

    def shut_down(self) -> None:
        """The keeper ends all runs: nothing is started any more."""
        self.ending = True
        for entry in self._entries.values():
            self.apply(entry, policy.ShutDown(), "the daemon ends")

    def tick(self) -> None:
        """Look at the pulses, the checks and the lengths of the logs; to be called every second."""
        now = time.monotonic()
        for entry in self._entries.values():
            if entry.live:
                entry.live.look_at_pulse()
            self._hangs.look(entry, now)
            self._checks.look(entry, now)
        if self.logs:
            specs = (entry.definition.spec for entry in self._entries.values())
            self.logs.tick([(spec.name, spec.log) for spec in specs if spec])

    def sample(self, part: int, parts: int) -> None:
        """Record what the runs use, of one part of the jobs; of few jobs that is nothing in most parts."""
        now_us = _now_us()
        every = max(1, parts * _SAMPLED_AT_ONCE // max(1, len(self._entries)))
        if part % every:
            return
        samples = []
        for entry in list(self._entries.values())[part // every :: -(-parts // every)]:
            figures = entry.live.sampler.sample() if entry.live else None
            if entry.live and figures:
                used = (figures.cpu_percent, figures.rss_bytes, figures.threads, figures.fds)
                samples.append(Sample(entry.name, entry.live.run, now_us, *used))
        for sample in samples:  # all at once, so that they meet in one commit
            self.record(sample)

    def entries(self) -> Iterable[Entry]:
        return self._entries.values()

    def backlog_bytes(self, entry: Entry) -> int:
        """Return how much the job's run has written that is not stored yet."""
        return self._reader.backlog_bytes(entry.live.run) if self._reader and entry.live else 0

    def find(self, name: str | None) -> Entry:
        """Return the job; without a name the default or only one. Raise NoSuchJob, AmbiguousJob."""
        return find(name, self._entries, self.default_job)

    # the verbs

    async def ask(
        self, entry: Entry, event: policy.Event, *, data: Any = None, actor: str = "", wait_s: float | None = None
    ) -> Receipt:
        """Carry out start, stop, pause, resume or restart. With `wait_s`, wait until the run has read its command.

        Raises WrongState, MailboxFull, MailboxClosed, TooLarge, and NotRead when the time is over.
        """
        return await self._finished(entry, *self._command(entry, event, data, actor), wait_s)

    async def _finished(self, entry: Entry, receipt: Receipt, unread: Unread | None, wait_s: float | None) -> Receipt:
        await self.settle()
        if wait_s is None or not await self._wait_read(entry, unread, receipt.verb, wait_s):
            return receipt
        return replace(receipt, state=entry.job.state, read=True)

    def _command(self, entry: Entry, event: policy.Event, data: Any, actor: str) -> tuple[Receipt, Unread | None]:
        try:
            receipt, unread = self._commanded(entry, event, data, actor)
        except Refused:
            entry.commands["refused"] += 1
            raise
        entry.commands["queued" if unread else "done"] += 1
        return receipt, unread

    def _commanded(self, entry: Entry, event: policy.Event, data: Any, actor: str) -> tuple[Receipt, Unread | None]:
        verb = _verb(event)
        if entry.withdrawn:
            raise WrongState(f"cannot {verb} {entry.name!r}: its file is gone", job=entry.name, state=entry.job.state)
        if self.ending:
            raise Unavailable(f"cannot {verb} {entry.name!r}: the daemon is ending", job=entry.name)
        self._check_heard(entry, verb)
        step = policy.step(entry.job, event, time.monotonic(), entry.definition.rules)
        if step.refused:
            raise WrongState(f"cannot {verb} {entry.name!r}: {step.refused}", job=entry.name, state=entry.job.state)
        number = self.next_id()
        sent = next((action.command for action in step.actions if isinstance(action, policy.Send)), None)
        packet = _packet(entry, sent or verb, data, number)  # what would be too large is not kept either
        unread = Unread(number, sent, data, actor, _now_us()) if sent else None
        if unread:
            launches = any(isinstance(action, policy.Spawn) for action in step.actions)
            self._send(entry, unread, packet, to_next=launches)
        queued = unread is not None
        with self.together():
            told = {"id": number, "verb": verb, "data": data, "queued": queued}
            self._note(entry, "command", actor, told, run=entry.spawning or None)  # of the run that it waits for
            self._take(entry, step, verb)
        return Receipt(number, entry.name, verb, entry.job.state, queued), unread

    def _check_heard(self, entry: Entry, verb: str) -> None:
        """Raise Unavailable when the host does not hear any more of what is asked for."""
        if self._unheard:
            raise Unavailable(f"cannot {verb} {entry.name!r}: the server is leaving; ask again", job=entry.name)

    async def configure(self, entry: Entry, data: Any, *, actor: str = "", wait_s: float | None = None) -> Receipt:
        """Merge the data into the job's config, for this run and all later ones."""
        if not isinstance(data, dict):
            raise BadData(
                f"cannot configure {entry.name!r}: an object is wanted, as in {{'key': value}}", job=entry.name
            )
        with self.together():
            told = self._command(entry, policy.ConfigAsked(), data, actor)
            entry.overrides = merged(entry.overrides, data)
            self._put_job(entry)
        return await self._finished(entry, *told, wait_s)

    async def clear_config(self, entry: Entry, *, actor: str = "") -> None:
        """Forget the overrides; a live run goes on with what it has."""
        entry.overrides = {}
        self._note(entry, "config-cleared", actor, {})
        self._put_job(entry)
        await self.settle()

    async def kill(self, entry: Entry, *, grace_s: float | None, actor: str = "", wait: bool = True) -> Exit | None:
        """End the run's whole tree. Return how it ended once nothing is left of it; None when not waited for."""
        self._check_heard(entry, "kill")
        step = policy.step(entry.job, policy.KillAsked(grace_s), time.monotonic(), entry.definition.rules)
        entry.commands["refused" if step.refused else "done"] += 1
        if step.refused:
            raise WrongState(f"cannot kill {entry.name!r}: {step.refused}", job=entry.name, state=entry.job.state)
        ended = entry.gone()
        with self.together():
            told = {"id": self.next_id(), "verb": "kill", "data": None, "queued": False}
            self._note(entry, "command", actor, told)
            self._take(entry, step, "kill")
        if wait and (entry.live or entry.spawning):
            await self._outcome(entry, ended, "how it ended")
        await self.settle()
        return entry.last_exit if wait else None

    def leave(self) -> None:
        """The server ends before its jobs do: tell whoever waits for one."""
        self._leaving.set()

    def lose_host(self) -> None:
        """The host is out of reach: the server will leave, and takes no more verbs until then."""
        self._unheard = True

    async def _outcome(self, entry: Entry, waits_for: asyncio.Future[T], what: str) -> T:
        """Return the result. Raises Unavailable when the server leaves before."""
        leaving = asyncio.ensure_future(self._leaving.wait())
        try:
            await asyncio.wait((waits_for, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
        if waits_for.done():
            return waits_for.result()
        raise Unavailable(f"cannot tell of {entry.name!r} {what}: the server is leaving; ask again", job=entry.name)

    async def _wait_read(self, entry: Entry, unread: Unread | None, verb: str, wait_s: float) -> bool:
        """Wait until the command is read, or where none is sent, it is a process. Return whether there is a run."""
        waits_for: asyncio.Future[Any] | None = unread.read if unread else entry.spawned() if entry.spawning else None
        if waits_for is None:
            return entry.live is not None
        try:
            if not waits_for.done():  # a timeout of 0 would not look
                async with asyncio.timeout(wait_s):
                    await self._outcome(entry, waits_for, "whether it has read that")
        except TimeoutError:
            raise NotRead(
                f"cannot tell that {entry.name!r} has read {verb}: not within {wait_s:g} s; it is still queued",
                job=entry.name,
                state=entry.job.state,
            ) from None
        if waits_for.result() is False:
            raise WrongState(
                f"cannot tell that {entry.name!r} has read {verb}: its run ended before",
                job=entry.name,
                state=entry.job.state,
            )
        return unread is not None or entry.live is not None

    async def settle(self, within_s: float = _SETTLE_S) -> None:
        """Wait until what was recorded is stored, so that what is told of it survives; not long, if storage fails."""
        if not self.can_store():
            return
        stored = asyncio.Event()
        self.when_stored(stored.set)
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await stored.wait()

    # policy: the one choke point

    def apply(self, entry: Entry, event: policy.Event, why: str) -> None:
        """Let a fact change the job; not if that takes a host that is out of reach: the next server finds it, too."""
        step = policy.step(entry.job, event, time.monotonic(), entry.definition.rules)
        if not (self._unheard and any(isinstance(action, policy.End) for action in step.actions)):
            self._take(entry, step, why)

    def _take(self, entry: Entry, step: policy.Step, why: str) -> None:
        before, entry.job = entry.job, step.job
        with self.together():
            if before.state != step.job.state:
                data = {"from": before.state, "to": step.job.state, "want": step.job.want, "why": why}
                self._note(entry, "state", None, data)
                told = {"job": entry.name, "state": step.job.state, "before": before.state, "why": why}
                _log.info("state", extra=told)
            if before != step.job:
                self._put_job(entry)
            for action in step.actions:  # a server that dies now has done what is stored
                self._act(entry, action)
            if before.want is not step.job.want and not step.actions and step.job.is_forced:
                self._end(entry, None)
        self._arm(entry)

    def _act(self, entry: Entry, action: policy.Action) -> None:
        match action:
            case policy.Spawn():
                self._spawn(entry)
            case policy.End(grace_s):
                self._end(entry, entry.definition.kill_grace_s if grace_s is None else grace_s)
            case policy.Freeze() | policy.Thaw():
                number = signal.SIGSTOP if isinstance(action, policy.Freeze) else signal.SIGCONT
                if entry.live:
                    self._host.signal(entry.live.run, number)
            case policy.Send():
                pass  # the verb itself has put it into the mailbox, before anything was changed

    def _end(self, entry: Entry, grace_s: float | None) -> None:
        assert isinstance(entry.job.life, policy.Stopping)
        note = EndNote(entry.job.life.reason, entry.job.want)
        run = entry.live.run if entry.live else entry.spawning
        if run and (entry.live or entry.requested):
            self._host.end(run, grace_s, note)
        elif run:  # right behind the request for it
            asyncio.get_running_loop().call_soon(self._host.end, run, grace_s, note)

    def _arm(self, entry: Entry) -> None:
        if entry.timer:
            entry.timer.cancel()
            entry.timer = None
        rules = entry.definition.rules
        at = policy.due(entry.job, rules)
        if entry.live and entry.job.state is State.STARTING:  # what counts is its run, however long that took
            at = max(at, time.monotonic() - entry.live.info.uptime_s() + rules.start_seconds)
        if at < float("inf") and not entry.spawning:
            delay_s = max(0.0, at - time.monotonic()) + 0.001  # never early, as loops count in milliseconds
            entry.timer = asyncio.get_running_loop().call_later(delay_s, self._before_due, entry)

    def _before_due(self, entry: Entry) -> None:
        """Hear what the host has to say first: when this loop was held up, the run may have ended before it was due."""
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._on_due, entry, entry.timer)

    def _on_due(self, entry: Entry, timer: asyncio.TimerHandle | None) -> None:
        live = entry.live
        over = live is not None and (live.ended or live.run in self._early_exits)
        if entry.timer is timer and not over:
            entry.timer = None
            self.apply(entry, policy.Due(), "due")

    # runs

    def next_id(self) -> int:
        """Return a number for a run or a command: the time in milliseconds, and always greater than the one before."""
        self._last_id = max(int(time.time() * 1000), self._last_id + 1)
        return self._last_id

    def seen_id(self, number: int) -> None:
        """Never give a number up to this one again."""
        self._last_id = max(self._last_id, number)

    def _spawn(self, entry: Entry) -> None:
        entry.spawning, entry.requested = self.next_id(), False
        task = asyncio.get_running_loop().create_task(self._spawned(entry, entry.spawning))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def forked(self, within_s: float) -> None:
        """Wait until each run that was asked for is a process or cannot be one, or until the time is over."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s)

    async def _spawned(self, entry: Entry, run: int) -> None:
        definition, mark = entry.definition, tree.new_mark()
        output, errors = "", ""
        if self.logs and definition.spec:
            output, errors = self.logs.begin(entry.name, run, definition.spec.log.merge)
        blank = RunSpec(
            run=run,
            job=entry.name,
            mark=mark,
            journal=str(self._folders.journals / journal_name(run, mark, entry.name)),
            journal_max_bytes=self._folders.journal_max_bytes,
            output=output,
            errors=errors,
            config=merged(definition.config, entry.overrides),
            kill_grace=definition.kill_grace_s,
        )
        self._by_run[run] = entry
        try:
            spec = definition.run_spec(blank)
            entry.requested = True
            live = await self._host.spawn(spec)
        except KeeperLost:
            return
        except (SpawnFailed, KeyError) as error:  # KeyError: the job's user is gone
            entry.spawning = 0
            entry.told_spawned()
            del self._by_run[run]
            _log.error("%s", error, extra={"job": entry.name})
            outbox, entry.outbox = entry.outbox, []
            self._left_unread(entry, [unread for unread, _ in outbox], run)
            ended = policy.Ended(None, None, random.uniform(-1, 1))
            unstarted = Exit(run, None, None, policy.reason(entry.job, ended), time.time(), str(error))
            self._over(entry, unstarted, ended)
            if record := self._early_exits.pop(run, None):  # it could not be handed over
                self._on_exit(record)
            return
        if live.limits:
            _log.info("limits", extra={"job": entry.name, "run": run, **live.limits})
        self.attach(entry, live)

    def attach(self, entry: Entry, run: LiveRun, *, offset: int = 0, lines: int = 0, owed: bool = False) -> Live:
        """Take charge of a run that was just spawned, or that an earlier server has left.

        What waited for it is sent before it is stored, as a server that finds the run unstored has it sent (`owed`).
        """
        entry.spawning = 0
        entry.live = live = Live(run)
        self._by_run[run.run] = entry
        self.seen_id(run.run)
        entry.told_spawned()
        outbox, entry.outbox = entry.outbox, []
        for unread, packet in outbox:
            with suppress(Refused):  # a fresh mailbox has room for what was let into the outbox
                self._send(entry, unread, packet)
        live.owed = owed and not live.holds_unread()
        if not live.owed:
            self._store_start(entry, live, offset, lines)
        if self._reader:
            self._follow(entry, live, offset, lines)
        else:
            live.unfollowed = (offset, lines)
        if entry.job.state is State.PAUSED and not entry.definition.rules.messages:  # a pause came, too
            self._host.signal(run.run, signal.SIGSTOP)
        if self._reader and (record := self._early_exits.pop(run.run, None)):
            self._on_exit(record)
        self._arm(entry)
        return live

    def _store_start(self, entry: Entry, live: Live, offset: int = 0, lines: int = 0) -> None:
        run = live.info
        self.record(
            RunStarted(
                id=run.run,
                job=entry.name,
                pid=run.pid,
                start_ticks=run.began_ticks,
                mark=run.mark,
                spec_digest=entry.definition.digest,
                started_us=int(run.started_at * 1e6),
                journal=run.journal,
                journal_offset=offset,
                journal_lines=lines,
            )
        )

    def adopt(self, adopted: Adopted, offset: int, lines: int) -> None:
        """Take over a job with its run from an earlier server: live, or ended while no server was there."""
        entry = self._entries[adopted.name]
        entry.job = adopted.job
        if isinstance(adopted.run, LiveRun):
            live = self.attach(entry, adopted.run, offset=offset, lines=lines, owed=adopted.owed)
            self._note(entry, "adopted", None, {"pid": adopted.run.pid})
            if entry.job.is_forced and not adopted.run.end_note:  # the keeper was not told before
                self._end(entry, entry.definition.kill_grace_s)
        else:
            live = self.attach(entry, self._as_live(adopted.run), offset=offset, lines=lines)
            self._on_exit(adopted.run)
        live.adopted = True
        self._put_job(entry)
        if adopted.outdated:
            self.apply(entry, policy.SpecChanged(), "changed while no server was there")
        if adopted.missed and isinstance(adopted.run, LiveRun):
            with suppress(Refused):
                self._command(entry, adopted.missed, None, "")
        self._arm(entry)

    def _as_live(self, record: ExitRecord) -> LiveRun:
        return LiveRun(
            run=record.run,
            job=record.job,
            mark=0,
            pid=record.pid,
            start_ticks=0,
            began_ticks=0,
            started_at=record.at - record.wall_s,
            journal=str(journal_of(self._folders.journals, record.run)),
            mailbox=-1,
            page=memoryview(bytearray(16)).cast("Q"),
        )

    def recall(self, recalled: Recalled, unstored: Mapping[str, Iterable[int]]) -> None:
        """Give the jobs back what an earlier server knew of them, and the runs the commands that it died with.

        `unstored` are each job's runs of which no end is stored: what came before one of them began was for that one.
        """
        for entry in self._entries.values():
            entry.last_status = entry.last_status or recalled.statuses.get(entry.name)
            entry.last_exit = entry.last_exit or recalled.exits.get(entry.name)
            if entry.live and entry.live.adopted:
                before = [run for run in unstored.get(entry.name, ()) if run < entry.live.run]
                if stored := recalled.exits.get(entry.name):
                    before.append(stored.run)
                since = max(before, default=0)
                self._recall_unread(entry, entry.live, recalled.unread.get(entry.name, {}), since)

    def store_owed(self) -> None:
        """Store the runs that were owed commands: these are sent, or nobody knows of them."""
        for entry in self._entries.values():
            if entry.live and entry.live.owed:
                entry.live.owed = False
                self._store_start(entry, entry.live)

    def _recall_unread(self, entry: Entry, live: Live, queued: Mapping[int, Queued], since: int) -> None:
        """Note which commands the run has not read. `since`: the run before, after which they were for this one."""
        read = live.acknowledged() if live.owed else set()
        for number, (command, data, run) in queued.items():
            if run != live.run and (run is not None or number < since):
                continue
            unread = live.unread.setdefault(number, Unread(number, command, data, "", 0))
            if live.owed and number not in read:  # where its start is not stored, all came before it
                with suppress(Refused):
                    self._send(entry, unread, _packet(entry, command, data, number))

    def resume_idle(self, name: str, job: policy.Job) -> None:
        """Take over a job without a run as an earlier server left it."""
        entry = self._entries[name]
        entry.job = job
        self._put_job(entry)
        self._arm(entry)

    def learn(self, stored: Iterable[JobRow]) -> None:
        """Take what the database has of the jobs and could not be read at the start. Live runs keep their config."""
        for row in stored:
            if entry := self._entries.get(row.name):
                known = completed(entry.row(_now_us()), row)
                entry.overrides = json.loads(known.overrides)
                entry.job = replace(entry.job, restarts=known.restarts, proven=known.ever_up)
                self._put_job(entry)

    def read_with(self, reader: Reader) -> None:
        """Begin to read the journals."""
        self._reader = reader
        for entry in self._entries.values():
            if entry.live and entry.live.unfollowed is not None:
                self._follow(entry, entry.live, *entry.live.unfollowed)
        early, self._early_exits = self._early_exits, {}
        for record in early.values():
            self._on_exit(record)

    def _follow(self, entry: Entry, live: Live, offset: int, lines: int) -> None:
        assert self._reader
        live.unfollowed = None
        path = Path(live.info.journal)
        try:
            tape = Tape(path, live.run, offset=offset, lines=lines, counts_lines=entry.definition.counts_lines)
        except FileNotFoundError:  # an earlier server has stored all of it, and died before it could note so
            self.record(JournalDone(live.run))
            return
        except OSError as error:
            _log.error("cannot read the journal of %r: %s", entry.name, error)
            live.unfollowed = (offset, lines)
            asyncio.get_running_loop().call_later(_FOLLOW_AGAIN_S, self._follow_again, entry, live)
            return
        self._reader.follow(
            live.run, tape, path, lambda found: self._on_lines(entry, live, found), entry.definition.max_rate
        )

    def _follow_again(self, entry: Entry, live: Live) -> None:
        if entry.live is live and live.unfollowed is not None:
            self._follow(entry, live, *live.unfollowed)

    def _on_lines(self, entry: Entry, live: Live, lines: list[Line]) -> None:
        for line in lines:
            if line.kind == "status":
                entry.last_status = line
            elif line.kind == "ack":
                self._on_ack(entry, live, line)
            elif line.kind == "error":
                said = json.loads(line.text)
                live.error = said if isinstance(said, str) else line.text

    def _on_ack(self, entry: Entry, live: Live, line: Line) -> None:
        unread = live.unread.pop(int(line.text), None) if line.text.isdecimal() else None
        if unread is None:
            return
        entry.commands["read"] += 1
        unread.tell(True)
        if entry.live is live:
            self.apply(entry, policy.Read(unread.command), f"read {unread.command}")

    def _send(self, entry: Entry, unread: Unread, packet: bytes, *, to_next: bool = False) -> None:
        if entry.live is None or to_next:
            if len(entry.outbox) >= _OUTBOX:
                raise MailboxFull(
                    f"cannot send to {entry.name!r}: {_OUTBOX} commands wait for its start", job=entry.name
                )
            entry.outbox.append((unread, packet))
            return
        entry.live.send(entry.name, packet, entry.job.state)
        entry.live.unread[unread.id] = unread

    def _on_exit(self, record: ExitRecord) -> None:
        entry = self._by_run.get(record.run)
        if self._reader is None or (entry and entry.spawning):  # it came together with the answer that it was spawned
            self._early_exits[record.run] = record
            return
        self._by_run.pop(record.run, None)
        if entry is None or entry.live is None:  # no file defines the job any more, or it could not be handed over
            self.record(run_started(record, journal_of(self._folders.journals, record.run)))
            self.record(run_ended(record, unseen_reason(record)))
            self.when_stored(lambda: self._host.acknowledge(record.run))
            return
        live = entry.live
        live.ended = True
        self._reader.finish(record.run, lambda: self._conclude(entry, live, record))

    def _conclude(self, entry: Entry, live: Live, record: ExitRecord) -> None:
        """All that the run said is read, and nothing of it is left."""
        ended = policy.Ended(record.code, record.signal, random.uniform(-1, 1), record.mono_s, record.oom)
        why = policy.reason(entry.job, ended)
        live.close()
        with self.together():  # or the next server would take the job to be up, and start it again
            self._left_unread(entry, live.unread.values(), record.run)
            entry.live = None
            self.record(run_ended(record, why))
            self._over(entry, Exit(record.run, record.code, record.signal, why, record.at, live.error), ended)
        self.when_stored(lambda: self._host.acknowledge(record.run))

    def _left_unread(self, entry: Entry, commands: Iterable[Unread], run: int) -> None:
        for unread in commands:
            entry.commands["unread"] += 1
            self._note(entry, "unread", None, {"id": unread.id, "command": unread.command}, run=run)
            unread.tell(False)

    def _over(self, entry: Entry, exit: Exit, ended: policy.Ended) -> None:
        entry.last_exit = exit
        entry.exits[exit.reason] += 1
        _log.info("run ended", extra={"job": entry.name, "run": exit.run, "how": exit.in_words})
        self.apply(entry, ended, exit.in_words)
        entry.told_gone()
        self._forget_withdrawn(entry)

    # history

    def _note(
        self, entry: Entry, kind: EventKind, actor: str | None, data: dict[str, Any], *, run: int | None = None
    ) -> None:
        run = run if run is not None else entry.live.run if entry.live else None
        self.record(Event(kind, _now_us(), entry.name, run, actor or None, data))

    def _put_job(self, entry: Entry) -> None:
        self.record(entry.row(_now_us()))


def run_started(record: ExitRecord, journal: Path) -> RunStarted:
    """Return what is kept of the start of a run of which no more is known than its end."""
    started_us = int((record.at - record.wall_s) * 1e6)
    return RunStarted(record.run, record.job, record.pid, 0, 0, "", started_us, str(journal))


def run_ended(record: ExitRecord, why: ExitReason) -> RunEnded:
    """Return what is kept of the end of a run."""
    return RunEnded(
        run=record.run,
        ended_us=int(record.at * 1e6),
        exit_code=record.code,
        signal=record.signal,
        reason=why,
        cpu_s=record.cpu_s,
        peak_rss_bytes=record.peak_rss_bytes,
        wall_s=record.wall_s,
        mono_s=record.mono_s,
    )


def _at_once(then: Callable[[], None]) -> None:
    then()


def _packet(entry: Entry, command: str, data: Any, number: int) -> bytes:
    packet = pack_command(command, data, number, time.time())
    if len(packet) > MAX_PACKET_BYTES:
        raise TooLarge(
            f"cannot send {len(packet)} bytes with {command}: at most {MAX_PACKET_BYTES} are allowed",
            job=entry.name,
        )
    return packet


def _verb(event: policy.Event) -> str:
    return type(event).__name__.removesuffix("Asked").lower()


def _now_us() -> int:
    return time.time_ns() // 1000
