"""When somebody is to be told of a job: at the edges alone. No clock, no I/O; times are microseconds since the epoch.

A trouble begins when a job fails, and lasts until it is well again: it is up and its failures are forgotten, or it has
completed. So a job that starts and fails over and over is one trouble, however often its state changes. What is told
of a trouble is told once; more of it (first `backoff`, later `failed`) is told as it comes, and all of it again after
`remind`. The other kinds are told when the state changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from harnessd.states import State

NoticeKind = Literal[
    "failed", "oom", "hung", "unhealthy", "backoff", "crashed", "recovered", "exited", "stopped", "started"
]
TROUBLES: tuple[NoticeKind, ...] = (
    "failed",
    "oom",
    "hung",
    "unhealthy",
    "backoff",
    "crashed",
)  # most telling first

_OF_A_RUN = frozenset({"hung", "unhealthy"})  # another run begins without them
_BEGINS: dict[str, NoticeKind] = {"hung": "hung", "unhealthy": "unhealthy"}
ENDS: dict[str, NoticeKind] = {"hung-over": "hung", "healthy": "unhealthy"}
EVENTS = _BEGINS.keys() | ENDS.keys()
_DOWN = frozenset({State.STOPPED, State.EXITED, State.FAILED})


@dataclass(frozen=True, slots=True)
class Fact:
    """What a job is."""

    job: str
    state: State
    failures: int  # in a row, not yet forgotten
    run: int | None = None  # that is live
    oom: bool = False  # its last run was ended for want of memory

    @property
    def is_well(self) -> bool:
        """Return whether it has proven itself, or is done."""
        up = self.state in (State.RUNNING, State.PAUSED)
        return (up and not self.failures) or self.state is State.EXITED

    def troubles(self) -> set[NoticeKind]:
        """Return what is wrong with it."""
        failing = self.failures > 0 or self.state is State.FAILED
        holds: dict[NoticeKind, bool] = {
            "failed": self.state is State.FAILED,
            "backoff": self.state is State.BACKOFF,
            "crashed": failing,
            "oom": failing and self.oom,
        }
        return {kind for kind, true in holds.items() if true}


class Edge(NamedTuple):
    """Something to be told."""

    id: int
    job: str
    kind: NoticeKind  # the most telling of `kinds`
    kinds: tuple[NoticeKind, ...]
    since_us: int  # the beginning of the trouble
    reminder: bool = False

    @property
    def lasts(self) -> bool:
        """Return whether it is of a trouble that begins or goes on."""
        return self.kind in TROUBLES


class Step(NamedTuple):
    """What is to be told, and the ids of what was told of troubles that are over."""

    edges: list[Edge]
    over: list[int]


class _Told(NamedTuple):
    kinds: tuple[NoticeKind, ...]
    run: int | None


@dataclass(slots=True)
class _Trouble:
    since_us: int
    told_us: int
    told: dict[int, _Told] = field(default_factory=dict)

    def kinds(self) -> set[NoticeKind]:
        return {kind for each in self.told.values() for kind in each.kinds}


class Edges:
    """Finds the edges for one receiver. `number` gives the ids, each greater than the one before."""

    def __init__(self, on: Collection[NoticeKind], remind_us: int | None, number: Callable[[], int]) -> None:
        self._on = frozenset(on)
        self._remind_us = remind_us
        self._number = number
        self._open: dict[str, _Trouble] = {}
        self._states: dict[str, State] = {}

    def change(self, on: Collection[NoticeKind], remind_us: int | None) -> None:
        """Go by other settings, for what comes."""
        self._on, self._remind_us = frozenset(on), remind_us

    def forget(self) -> list[int]:
        """Forget all troubles; return the ids of what was told of them."""
        ids = [number for trouble in self._open.values() for number in trouble.told]
        self._open.clear()
        return ids

    def restore(self, edge: Edge, at_us: int, run: int | None) -> None:
        """Take up a trouble of which an earlier server has told."""
        trouble = self._open.setdefault(edge.job, _Trouble(edge.since_us, at_us))
        trouble.told_us = max(trouble.told_us, at_us)
        trouble.told[edge.id] = _Told(edge.kinds, run)

    def see(self, fact: Fact, now_us: int) -> Step:
        """Take what the job is now."""
        before = self._states.get(fact.job)
        self._states[fact.job] = fact.state
        step = self._well(fact, now_us) if fact.is_well else self._worse(fact.job, fact.troubles(), fact.run, now_us)
        if before is not None and (kind := _change(before, fact.state)) in self._on:
            step.edges.append(Edge(self._number(), fact.job, kind, (kind,), now_us))
        return step

    def happened(self, job: str, event: str, run: int | None, now_us: int) -> Step:
        """Take an event of `EVENTS`."""
        if event in _BEGINS:
            return self._worse(job, {_BEGINS[event]}, run, now_us)
        return self._better(job, now_us, lambda told: ENDS[event] in told.kinds)

    def removed(self, job: str) -> Step:
        """The job is no more: what was told of it is over, and nobody is told so."""
        self._states.pop(job, None)
        trouble = self._open.pop(job, None)
        return Step([], list(trouble.told) if trouble else [])

    def remind(self, now_us: int) -> Step:
        """Tell again of the troubles of which nothing was told for so long, unless somebody has stopped the job."""
        step = Step([], [])
        for job, trouble in self._open.items():
            trouble.told_us = min(trouble.told_us, now_us)  # or a clock that was set back would put it off
            if self._due_us(job, trouble) <= now_us:
                kinds = tuple(kind for kind in TROUBLES if kind in trouble.kinds())
                run = max((told.run for told in trouble.told.values() if told.run), default=None)
                edge = Edge(self._number(), job, kinds[0], kinds, trouble.since_us, reminder=True)
                step.over.extend(trouble.told)
                trouble.told, trouble.told_us = {edge.id: _Told(kinds, run)}, now_us
                step.edges.append(edge)
        return step

    def _due_us(self, job: str, trouble: _Trouble) -> float:
        idle = self._states.get(job) in (None, State.STOPPED, State.EXITED)
        return float("inf") if idle or self._remind_us is None else trouble.told_us + self._remind_us

    def _worse(self, job: str, kinds: Collection[NoticeKind], run: int | None, now_us: int) -> Step:
        trouble = self._open.get(job) or _Trouble(now_us, now_us)
        new = tuple(kind for kind in TROUBLES if kind in kinds and kind in self._on and kind not in trouble.kinds())
        if not new:
            return Step([], [])
        edge = Edge(self._number(), job, new[0], new, trouble.since_us)
        trouble.told[edge.id], trouble.told_us = _Told(new, run), now_us
        self._open[job] = trouble
        return Step([edge], [])

    def _well(self, fact: Fact, now_us: int) -> Step:
        ended = fact.state is State.EXITED
        return self._better(
            fact.job, now_us, lambda told: ended or told.run != fact.run or not _OF_A_RUN.issuperset(told.kinds)
        )

    def _better(self, job: str, now_us: int, is_over: Callable[[_Told], bool]) -> Step:
        trouble = self._open.get(job)
        if trouble is None:
            return Step([], [])
        over = [number for number, told in trouble.told.items() if is_over(told)]
        for number in over:
            del trouble.told[number]
        if trouble.told:
            return Step([], over)
        del self._open[job]
        recovered = Edge(self._number(), job, "recovered", ("recovered",), trouble.since_us)
        return Step([recovered] if "recovered" in self._on else [], over)


def _change(before: State, after: State) -> NoticeKind | None:
    """Return what a change of the state is to somebody who is not interested in troubles."""
    if before is after:
        return None
    if after is State.STARTING and before in _DOWN:
        return "started"
    match after:
        case State.EXITED:
            return "exited"
        case State.STOPPED:
            return "stopped"
    return None
