"""What the store is told and what it tells, as plain records. Standard library only.

Times are whole microseconds since the epoch, lengths are seconds. A job is named; its number in the database is the
store's own business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EventKind = Literal[
    "adopted",
    "client-dropped",
    "command",
    "config-cleared",
    "error",
    "gap",
    "healthy",
    "hung",
    "hung-over",
    "notified",
    "notify-failed",
    "preload-failed",
    "read",
    "refused",
    "reload",
    "server-start",
    "state",
    "storage",
    "torn",
    "unhealthy",
    "unread",
]


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as it is now. Put again whenever something of it changes; the last one counts."""

    name: str
    spec: str  # JSON
    digest: str
    want: str
    state: str
    changed_us: int
    overrides: str = "{}"  # JSON: the CONFIG that was sent, merged
    restarts: int = 0
    ever_up: bool = False
    failures: int = 0
    removed_us: int | None = None


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run and how far its journal has been read. Put again (after an adoption, say) it changes nothing."""

    id: int
    job: str
    pid: int
    start_ticks: int  # when it began, in the kernel's clock ticks since boot
    mark: int
    spec_digest: str
    started_us: int
    journal: str  # path
    journal_offset: int = 0
    journal_lines: int = 0


@dataclass(frozen=True, slots=True)
class RunEnded:
    run: int
    ended_us: int
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None
    cpu_s: float | None = None
    peak_rss_bytes: int | None = None
    wall_s: float | None = None
    mono_s: float | None = None


@dataclass(frozen=True, slots=True)
class JournalDone:
    """The run has ended and its journal is stored to the last byte."""

    run: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. `id` is given by the store when it is committed, and grows."""

    kind: EventKind
    at_us: int
    job: str | None = None
    run: int | None = None
    actor: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    id: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    job: str
    run: int
    at_us: int
    cpu_percent: float
    rss_bytes: int
    threads: int
    fds: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a receiver is to be told. It stays in the outbox until it was, and what it tells of is over."""

    id: int  # in the order in which they are told
    receiver: str
    job: str
    run_id: int | None
    at_us: int
    kind: str
    body: str  # JSON
    waiting: bool = True  # to be delivered
    lasting: bool = False  # a trouble that is not over


@dataclass(frozen=True, slots=True)
class NoticesDone:
    """They were delivered, or given up."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TroublesOver:
    """What these notices tell of is over."""

    ids: tuple[int, ...]


Record = JobRow | RunStarted | RunEnded | JournalDone | Event | Sample | Notice | NoticesDone | TroublesOver


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a server that starts has to know. `error` says why it knows nothing."""

    jobs: tuple[JobRow, ...] = ()
    runs: tuple[RunStarted, ...] = ()  # of which no end is stored
    unread: tuple[RunStarted, ...] = ()  # ended, but not all of their journal is stored
    ended: frozenset[int] = frozenset()  # the latest runs of which an end is stored
    last_run: int = 0
    last_event: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Keep:
    """How much history stays."""

    days: float = 90
    rows: int = 10_000_000  # statuses of one job
