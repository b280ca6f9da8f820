"""Tells those that the settings name what happens to the jobs: sees records, finds the edges, fills the outboxes."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from harnessd.errors import NoSuchJob
from harnessd.server.courier import courier
from harnessd.server.entry import Entry
from harnessd.server.logs import Logs
from harnessd.server.notice_body import describe, last_lines, message
from harnessd.server.notices import EVENTS, Edge, Edges, Fact, Step
from harnessd.server.outbox import Outbox
from harnessd.server.records import Event, JobRow, Notice, NoticesDone, Record, TroublesOver
from harnessd.server.settings import Notify
from harnessd.server.shapes import ReceiverHealth
from harnessd.server.supervisor import Supervisor
from harnessd.server.timespan import iso
from harnessd.server.unsure import Unsure
from harnessd.states import ExitReason

_LOOK_S = 1.0
_CLOSE_S = 2.0
_SETTLE_S = 1.0


class _Receiver:
    """One table of the settings, and what goes with it."""

    def __init__(self, settings: Notify, edges: Edges, outbox: Outbox) -> None:
        self.settings = settings
        self.edges = edges
        self.outbox = outbox

    def wants(self, entry: Entry) -> bool:
        chosen = any(fnmatchcase(entry.name, pattern) for pattern in self.settings.jobs)
        tags = self.settings.tags
        return chosen and (not tags or not set(tags).isdisjoint(entry.definition.tags))

    def change(self, settings: Notify) -> None:
        """Go by these settings from now on, with the same queue and what was told before."""
        self.settings = settings
        self.edges.change(settings.on, _remind_us(settings))
        self.outbox.change(courier(settings), settings.window)


class Notifier:
    """See the module. `observe` is told every record, in the event loop; nothing here blocks it."""

    def __init__(self, supervisor: Supervisor, logs: Logs, record: Callable[[Record], None]) -> None:
        self._supervisor = supervisor
        self._logs = logs
        self._record = record
        self._host = socket.gethostname()
        self._receivers: dict[str, _Receiver] = {}
        self._last_id = 0
        self._unsure = Unsure()
        self._looking = asyncio.get_running_loop().create_task(self._look())

    def restore(self, stored: Iterable[Notice], receivers: Sequence[Notify]) -> None:
        """Begin with what an earlier server has left in the outbox; what is there for others is forgotten."""
        self._receivers = {settings.receiver: self._begin(settings) for settings in receivers}
        forgotten: list[int] = []
        for notice in stored:
            self._last_id = max(self._last_id, notice.id)
            receiver = self._receivers.get(notice.receiver)
            if receiver is None:
                forgotten.append(notice.id)
                continue
            if notice.lasting:
                self._resume(receiver, notice)
            if notice.waiting:
                receiver.outbox.put(notice)
        self._forget(forgotten)
        self._see_all()

    def _resume(self, receiver: _Receiver, notice: Notice) -> None:
        body = json.loads(notice.body)
        edge = Edge(notice.id, notice.job, body["kind"], tuple(body["kinds"]), body["since_us"])
        receiver.edges.restore(edge, notice.at_us, notice.run_id)
        if entry := self._entry(notice.job):
            self._unsure.add(entry, notice.run_id, edge.kinds)
        else:
            self._over(receiver.edges.removed(notice.job).over)

    def use(self, receivers: Sequence[Notify]) -> None:
        """Tell these from now on. A receiver goes by its name: it keeps its queue when the rest of it changes."""
        before, self._receivers = self._receivers, {}
        for settings in receivers:
            receiver = before.pop(settings.receiver, None)
            if receiver is None:
                receiver = self._begin(settings)
            elif receiver.settings != settings:
                receiver.change(settings)
            self._receivers[settings.receiver] = receiver
        for gone in before.values():
            gone.outbox.stop()
            self._forget([*gone.outbox.drop(), *gone.edges.forget()])
        self._see_all()

    def observe(self, record: Record) -> None:
        """Look whether there is something to be told."""
        if isinstance(record, JobRow):
            if record.removed_us is not None:
                for receiver in self._receivers.values():
                    self._over(receiver.edges.removed(record.name).over)
            elif entry := self._entry(record.name):
                self._see(entry)
        elif isinstance(record, Event) and record.kind in EVENTS and record.job:
            self._happened(record.job, record.kind, record.run, record.data)

    def health(self) -> list[ReceiverHealth]:
        """Return what waits for each receiver, and why it was not delivered."""
        return [receiver.outbox.health() for receiver in self._receivers.values()]

    async def close(self) -> None:
        """End it. What is not delivered is in the database; the next server goes on with it."""
        self._looking.cancel()
        stopped = [receiver.outbox.stop() for receiver in self._receivers.values()]
        await asyncio.wait([self._looking, *stopped], timeout=_CLOSE_S)

    def _begin(self, settings: Notify) -> _Receiver:
        edges = Edges(settings.on, _remind_us(settings), self._number)
        outbox = Outbox(settings.receiver, courier(settings), settings.window, self._write, self._record)
        return _Receiver(settings, edges, outbox)

    def _number(self) -> int:
        self._last_id = max(_now_us(), self._last_id + 1)
        return self._last_id

    def _entry(self, name: str) -> Entry | None:
        try:
            return self._supervisor.find(name)
        except NoSuchJob:  # it has been removed
            return None

    # what happens

    def _see_all(self) -> None:
        for entry in self._supervisor.entries():
            self._see(entry)

    def _see(self, entry: Entry) -> None:
        if self._supervisor.ending:  # it stops because the daemon does
            return
        oom = entry.last_exit is not None and entry.last_exit.reason is ExitReason.OOM
        run = entry.live.run if entry.live else None
        fact = Fact(entry.name, entry.job.state, entry.job.failures, run, oom)
        for receiver in self._receivers.values():
            if receiver.wants(entry):
                self._take(receiver, entry, receiver.edges.see(fact, _now_us()))
            else:
                self._over(receiver.edges.removed(entry.name).over)

    def _happened(self, job: str, kind: str, run: int | None, data: Mapping[str, Any]) -> None:
        if entry := self._entry(job):
            for receiver in self._receivers.values():
                if receiver.wants(entry):
                    step = receiver.edges.happened(job, kind, run, _now_us())
                    self._take(receiver, entry, step, _why(kind, data))

    def _take(self, receiver: _Receiver, entry: Entry, step: Step, why: str | None = None) -> None:
        for edge in step.edges:
            at_us = _now_us()
            known = describe(entry, self._logs)
            body = {
                "id": edge.id,
                "job": edge.job,
                "kind": edge.kind,
                "kinds": edge.kinds,
                "reminder": edge.reminder,
                "at": iso(at_us),
                "since": iso(edge.since_us),
                "since_us": edge.since_us,
                "why": why,
                **known,
            }
            text = json.dumps(body, default=str)
            notice = Notice(
                edge.id, receiver.outbox.receiver, edge.job, known["run"], at_us, edge.kind, text, lasting=edge.lasts
            )
            self._record(notice)
            receiver.outbox.put(notice)
        self._over(step.over)

    def _over(self, ids: Sequence[int]) -> None:
        if ids:
            self._record(TroublesOver(tuple(ids)))

    def _forget(self, ids: Sequence[int]) -> None:
        if ids:
            self._record(NoticesDone(tuple(ids)))
            self._over(ids)

    async def _look(self) -> None:
        """Remind of what lasts, unless the receiver has not even taken what it was told before."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for job, run, kind in self._unsure.over(self._entry):
                self._happened(job, kind, run, {})
            for receiver in self._receivers.values():
                if not receiver.outbox.waiting and not self._supervisor.ending:
                    self._remind(receiver)

    def _remind(self, receiver: _Receiver) -> None:
        step = receiver.edges.remind(_now_us())
        for edge in step.edges:
            if entry := self._entry(edge.job):
                self._take(receiver, entry, Step([edge], []))
        self._over(step.over)

    async def _write(self, bodies: Sequence[dict[str, Any]]) -> bytes:
        def read() -> list[list[str]]:
            return [last_lines(self._logs, body["job"], body["run"], body["log_ends"]) for body in bodies]

        await self._supervisor.settle(_SETTLE_S)  # or, after a kill, the next server would tell it again
        lines = await self._logs.in_thread(read)
        notices = [
            {key: value for key, value in body.items() if key not in ("log_ends", "since_us")} | {"log": log}
            for body, log in zip(bodies, lines, strict=True)
        ]
        return json.dumps(message(self._host, notices, time.time())).encode()


def _why(kind: str, data: Mapping[str, Any]) -> str | None:
    if kind == "hung" and "age_s" in data:
        return f"it has not polled for {data['age_s']:g} s"
    return str(data["error"])[:200] if kind == "unhealthy" and data.get("error") else None


def _remind_us(settings: Notify) -> int | None:
    return int(settings.remind * 1e6) if settings.remind else None


def _now_us() -> int:
    return time.time_ns() // 1000
