"""What a job does next: `step(job, event, now, rules) -> Step`. No clock, no randomness, no I/O.

`want` is the operator's and `state` is the job's. A verb changes `want`, a fact changes `state`, and the table below
says for every pair of state and event what is done. Times are monotonic seconds. Each job has one due time (`due`); an
event `Due` that comes early or late does no harm.

The restart rules are OTP's idea of intensity, counted for each job: a run that came up and then failed is started again
at once, further failures wait longer and longer, and a job that never came up since its spec changed is given up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from harnessd.states import Command, ExitReason, State, Want

_SIGKILL = 9
_HUNG = (ExitReason.HUNG, ExitReason.UNHEALTHY)  # the harness ended it for what it did, which is a failure

# What a job is. A state carries only what is valid in it.


@dataclass(frozen=True, slots=True)
class Stopped:
    state: ClassVar = State.STOPPED


@dataclass(frozen=True, slots=True)
class Starting:
    state: ClassVar = State.STARTING
    since: float


@dataclass(frozen=True, slots=True)
class Running:
    state: ClassVar = State.RUNNING
    since: float  # the start of the run, not of the state


@dataclass(frozen=True, slots=True)
class Paused:
    state: ClassVar = State.PAUSED
    since: float


@dataclass(frozen=True, slots=True)
class Stopping:
    state: ClassVar = State.STOPPING
    since: float
    reason: ExitReason
    forced: bool  # its processes are being ended; otherwise it was asked by a message and may go on


@dataclass(frozen=True, slots=True)
class Backoff:
    state: ClassVar = State.BACKOFF
    until: float


@dataclass(frozen=True, slots=True)
class Exited:
    state: ClassVar = State.EXITED


@dataclass(frozen=True, slots=True)
class Failed:
    state: ClassVar = State.FAILED


Life = Stopped | Starting | Running | Paused | Stopping | Backoff | Exited | Failed
_Live = Starting | Running | Paused | Stopping
LIVE = frozenset({State.STARTING, State.RUNNING, State.PAUSED, State.STOPPING})


@dataclass(frozen=True, slots=True)
class Job:
    """All that the policy knows of a job."""

    want: Want = Want.DOWN
    life: Life = Stopped()
    failures: int = 0  # one after the other; what decides the backoff
    restarts: int = 0  # in the job's lifetime, those that nobody asked for
    proven: bool = False  # a run has come up since the spec last changed

    @property
    def state(self) -> State:
        return self.life.state

    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    @property
    def is_forced(self) -> bool:
        """Whether its processes are being ended."""
        return isinstance(self.life, Stopping) and self.life.forced


@dataclass(frozen=True, slots=True)
class Rules:
    """What a job's spec says about restarting and control. Times in seconds."""

    restart: Literal["on-failure", "always", "never"] = "on-failure"
    start_seconds: float = 1.0
    max_failures: int = 5
    first_s: float = 0.5
    factor: float = 2.0
    max_s: float = 60.0
    jitter: float = 0.2  # the share of a delay that it may be shorter or longer by
    reset_after_s: float = 60.0
    messages: bool = True  # it has a Cradle; otherwise start, stop, pause and resume are signals


# What happens to a job.


@dataclass(frozen=True, slots=True)
class StartAsked:
    pass


@dataclass(frozen=True, slots=True)
class StopAsked:
    pass


@dataclass(frozen=True, slots=True)
class PauseAsked:
    pass


@dataclass(frozen=True, slots=True)
class ResumeAsked:
    pass


@dataclass(frozen=True, slots=True)
class ConfigAsked:
    pass


@dataclass(frozen=True, slots=True)
class RestartAsked:
    pass


@dataclass(frozen=True, slots=True)
class KillAsked:
    grace_s: float | None = None  # None: the job's own


@dataclass(frozen=True, slots=True)
class Autostart:
    """The daemon has started, or the job was added to it."""


@dataclass(frozen=True, slots=True)
class Read:
    """The run has read a command."""

    command: Command


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing is left of the run. `jitter` is in -1 .. 1; both `code` and `signal` are None when it never started."""

    code: int | None
    signal: int | None
    jitter: float = 0.0
    up_s: float | None = None  # how long it lasted; None: until now
    oom: bool = False  # the kernel has killed of it for want of memory


@dataclass(frozen=True, slots=True)
class Hung:
    """It has stopped polling, or its check fails: it is to be ended and started again, and that is a failure."""

    reason: ExitReason = ExitReason.HUNG


@dataclass(frozen=True, slots=True)
class Due:
    """The job's due time has come."""


@dataclass(frozen=True, slots=True)
class SpecChanged:
    """Its file has changed in a way that needs a new run."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Its file is gone."""


@dataclass(frozen=True, slots=True)
class ShutDown:
    """The daemon ends; the keeper ends the runs."""


Event = (
    StartAsked
    | StopAsked
    | PauseAsked
    | ResumeAsked
    | ConfigAsked
    | RestartAsked
    | KillAsked
    | Autostart
    | Read
    | Ended
    | Hung
    | Due
    | SpecChanged
    | Withdrawn
    | ShutDown
)

# What is to be done.


@dataclass(frozen=True, slots=True)
class Spawn:
    """Fork a run."""


@dataclass(frozen=True, slots=True)
class Send:
    """Put a command into the mailbox."""

    command: Command


@dataclass(frozen=True, slots=True)
class End:
    """SIGTERM to the whole tree, SIGKILL after the grace."""

    grace_s: float | None = None


@dataclass(frozen=True, slots=True)
class Freeze:
    """SIGSTOP to the whole tree."""


@dataclass(frozen=True, slots=True)
class Thaw:
    """SIGCONT to the whole tree."""


Action = Spawn | Send | End | Freeze | Thaw


@dataclass(frozen=True, slots=True)
class Step:
    """What has become of the job and what is to be done; or why the verb is refused."""

    job: Job
    actions: tuple[Action, ...] = ()
    refused: str = ""


def step(job: Job, event: Event, now: float, rules: Rules) -> Step:
    """Return the step that the event makes of the job."""
    return TABLE[job.state, type(event)](job, event, now, rules)


def due(job: Job, rules: Rules) -> float:
    """Return when the job wants an event `Due`; infinity when never."""
    match job.life:
        case Starting(since):
            return since + rules.start_seconds
        case Running(since) if job.failures:
            return since + rules.reset_after_s
        case Backoff(until):
            return until
    return math.inf


def reason(job: Job, ended: Ended) -> ExitReason:
    """Return why the run ended that the job had."""
    if isinstance(job.life, Stopping):
        return job.life.reason
    if ended.oom and (ended.signal == _SIGKILL or ended.code == 128 + _SIGKILL):
        return ExitReason.OOM
    if ended.signal is not None:
        return ExitReason.SIGNALED
    if ended.code is None:
        return ExitReason.UNSTARTED
    return ExitReason.COMPLETED if ended.code == 0 else ExitReason.CRASHED


# The table's entries.

_Handler = Callable[[Job, Event, float, Rules], Step]


def _ignore(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return Step(job)


def _refuse(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return Step(job, refused=f"it is {job.state}")


def _launch(job: Job, event: Event, now: float, rules: Rules) -> Step:
    """Start it afresh, whatever its history of failures."""
    return Step(replace(job, want=Want.UP, life=Starting(now), failures=0), (Spawn(),))


def _launch_and_tell(job: Job, event: Event, now: float, rules: Rules) -> Step:
    launched = _launch(job, event, now, rules)
    return replace(launched, actions=(*launched.actions, Send(Command.START))) if rules.messages else launched


def _launch_if_wanted(job: Job, event: Event, now: float, rules: Rules) -> Step:
    fresh = _unproven(job)
    return _launch(fresh, event, now, rules) if job.want is Want.UP else Step(fresh)


def _start_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return Step(replace(job, want=Want.UP), (Send(Command.START),) if rules.messages else ())


def _start_paused(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return _start_live(job, event, now, rules) if rules.messages else _resume_paused(job, event, now, rules)


def _start_stopping(job: Job, event: Event, now: float, rules: Rules) -> Step:
    """It runs on if it reads START before it ends, and is started again if it ends."""
    return Step(replace(job, want=Want.UP), () if job.is_forced else (Send(Command.START),))


def _stop_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    if not rules.messages:
        return _end(job, now, ExitReason.STOPPED, want=Want.DOWN)
    stopping = Stopping(_since(job), ExitReason.STOPPED, forced=False)
    return Step(replace(job, want=Want.DOWN, life=stopping), (Send(Command.STOP),))


def _stop_stopping(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return Step(replace(job, want=Want.DOWN), () if job.is_forced else (Send(Command.STOP),))


def _give_up(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return Step(replace(job, want=Want.DOWN, life=Stopped(), failures=0))


def _pause_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    if rules.messages:  # it is paused once it has read that
        return Step(job, (Send(Command.PAUSE),))
    return Step(replace(job, life=Paused(_since(job))), (Freeze(),))


def _pause_paused(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return Step(job, (Send(Command.PAUSE),) if rules.messages else ())


def _resume_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    """A PAUSE may be waiting to be read, so a message goes; a process that is not stopped needs no SIGCONT."""
    return Step(job, (Send(Command.RESUME),) if rules.messages else ())


def _resume_paused(job: Job, event: Event, now: float, rules: Rules) -> Step:
    if rules.messages:
        return Step(job, (Send(Command.RESUME),))
    up = now - _since(job) >= rules.start_seconds
    life = Running(_since(job)) if up else Starting(_since(job))
    return Step(replace(job, life=life, proven=job.proven or up), (Thaw(),))


def _tell_stopping(job: Job, event: Event, now: float, rules: Rules) -> Step:
    """It was asked to stop and may go on instead, so it is still to be told."""
    if job.is_forced:
        return _refuse(job, event, now, rules)
    return Step(job, (Send(Command.PAUSE if isinstance(event, PauseAsked) else Command.RESUME),))


def _config_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    if not rules.messages:
        return Step(job, refused="it is controlled by signals and reads no messages")
    return Step(job, (Send(Command.CONFIG),))


def _config_down(job: Job, event: Event, now: float, rules: Rules) -> Step:
    """Nothing to send to; it finds the new config when it starts."""
    return Step(job) if rules.messages else _config_live(job, event, now, rules)


def _restart_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return _end(job, now, ExitReason.STOPPED, want=Want.UP)


def _kill_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    grace_s = event.grace_s if isinstance(event, KillAsked) else None
    return _end(job, now, ExitReason.KILLED, want=Want.DOWN, grace_s=grace_s)


def _end_hung(job: Job, event: Event, now: float, rules: Rules) -> Step:
    assert isinstance(event, Hung)
    return _end(job, now, event.reason, want=job.want)


def _withdraw_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return _end(job, now, ExitReason.STOPPED, want=Want.DOWN)


def _replace_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return _end(_unproven(job), now, ExitReason.STOPPED, want=job.want)


def _replace_ended(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return Step(_unproven(job))


def _unproven(job: Job) -> Job:
    return replace(job, proven=False, failures=0)


def _shut_down_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return Step(replace(job, life=Stopping(_since(job), ExitReason.SHUTDOWN, forced=True)))


def _shut_down_waiting(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return Step(replace(job, life=Stopped()))


def _read_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    """A job that reads commands runs. A STOP that is read here was followed by a START, still unread."""
    assert isinstance(event, Read)
    since = _since(job)
    life: Life = Running(since)
    match event.command:
        case Command.STOP:
            life = Stopping(since, ExitReason.STOPPED, forced=False)
        case Command.PAUSE:
            life = Paused(since)
        case Command.CONFIG if isinstance(job.life, Paused):
            life = job.life
    return Step(replace(job, life=life))


def _read_stopping(job: Job, event: Event, now: float, rules: Rules) -> Step:
    stopping = job.life
    started = isinstance(event, Read) and event.command is Command.START and job.want is Want.UP
    if started and isinstance(stopping, Stopping) and not stopping.forced:
        return Step(replace(job, life=Running(stopping.since)))
    return Step(job)


def _come_up(job: Job, event: Event, now: float, rules: Rules) -> Step:
    if now < due(job, rules):
        return Step(job)
    return Step(replace(job, life=Running(_since(job)), proven=True))


def _forget_failures(job: Job, event: Event, now: float, rules: Rules) -> Step:
    return Step(replace(job, failures=0)) if now >= due(job, rules) else Step(job)


def _retry(job: Job, event: Event, now: float, rules: Rules) -> Step:
    if now < due(job, rules):
        return Step(job)
    return Step(replace(job, life=Starting(now), restarts=job.restarts + 1), (Spawn(),))


def _end_live(job: Job, event: Event, now: float, rules: Rules) -> Step:
    """A run has ended that nobody asked to end; one that had to be ended, as it hung, has failed."""
    assert isinstance(event, Ended)
    success = event.code == 0 and not isinstance(job.life, Stopping)
    up_s = now - _since(job) if event.up_s is None else event.up_s
    job = replace(job, proven=job.proven or up_s >= rules.start_seconds)
    if rules.restart == "never" or (success and rules.restart == "on-failure"):
        return Step(replace(job, life=Exited() if success else Failed(), failures=0))
    failures = (0 if up_s >= rules.reset_after_s else job.failures) + 1
    job = replace(job, failures=failures)
    if failures == 1 and up_s >= rules.start_seconds:
        return Step(replace(job, life=Starting(now), restarts=job.restarts + 1), (Spawn(),))
    if failures >= rules.max_failures and not job.proven:
        return Step(replace(job, life=Failed()))
    waits = failures - 1 if job.proven else failures  # the first failure of a job that has come up was not waited for
    return Step(replace(job, life=Backoff(now + delay_s(max(1, waits), event.jitter, rules))))


def _end_stopping(job: Job, event: Event, now: float, rules: Rules) -> Step:
    why = job.life.reason if isinstance(job.life, Stopping) else ExitReason.STOPPED
    if job.want is Want.UP and why in _HUNG:
        return _end_live(job, event, now, rules)
    if job.want is Want.UP and why is not ExitReason.SHUTDOWN:
        return Step(replace(job, life=Starting(now)), (Spawn(),))
    return Step(replace(job, life=Stopped(), failures=0))


def delay_s(failures: int, jitter: float, rules: Rules) -> float:
    """Return how long to wait after so many failures, with its jitter of -1 .. 1."""
    exponent = min(failures - 1, 64)  # far beyond any `max_s`, and no float overflows there
    return min(rules.max_s, rules.first_s * rules.factor**exponent) * (1 + rules.jitter * jitter)


def _end(job: Job, now: float, why: ExitReason, *, want: Want, grace_s: float | None = None) -> Step:
    stopping = Stopping(_since(job), _overall(job, why), forced=True)
    return Step(replace(job, want=want, life=stopping), (End(grace_s),))


def _overall(job: Job, why: ExitReason) -> ExitReason:
    """Return why the run ends when more than one thing ends it: the daemon's end counts most, then a kill."""
    reasons = {why, job.life.reason} if isinstance(job.life, Stopping) else {why}
    return next(one for one in (ExitReason.SHUTDOWN, ExitReason.KILLED, ExitReason.STOPPED, *_HUNG) if one in reasons)


def _since(job: Job) -> float:
    assert isinstance(job.life, _Live)
    return job.life.since


_HANDLERS: dict[type, dict[State, _Handler]] = {
    StartAsked: {
        State.STARTING: _start_live,
        State.RUNNING: _start_live,
        State.PAUSED: _start_paused,
        State.STOPPING: _start_stopping,
        **dict.fromkeys((State.STOPPED, State.BACKOFF, State.EXITED, State.FAILED), _launch_and_tell),
    },
    StopAsked: {
        **dict.fromkeys((State.STARTING, State.RUNNING, State.PAUSED), _stop_live),
        State.STOPPING: _stop_stopping,
        State.BACKOFF: _give_up,
        **dict.fromkeys((State.STOPPED, State.EXITED, State.FAILED), _refuse),
    },
    PauseAsked: {
        **dict.fromkeys((State.STARTING, State.RUNNING), _pause_live),
        State.PAUSED: _pause_paused,
        State.STOPPING: _tell_stopping,
        **dict.fromkeys((State.STOPPED, State.BACKOFF, State.EXITED, State.FAILED), _refuse),
    },
    ResumeAsked: {
        **dict.fromkeys((State.STARTING, State.RUNNING), _resume_live),
        State.PAUSED: _resume_paused,
        State.STOPPING: _tell_stopping,
        **dict.fromkeys((State.STOPPED, State.BACKOFF, State.EXITED, State.FAILED), _refuse),
    },
    ConfigAsked: {
        **dict.fromkeys(LIVE, _config_live),
        **dict.fromkeys((State.STOPPED, State.BACKOFF, State.EXITED, State.FAILED), _config_down),
    },
    RestartAsked: {
        **dict.fromkeys(LIVE, _restart_live),
        **dict.fromkeys((State.STOPPED, State.BACKOFF, State.EXITED, State.FAILED), _launch),
    },
    KillAsked: {
        **dict.fromkeys(LIVE, _kill_live),
        State.BACKOFF: _give_up,
        **dict.fromkeys((State.STOPPED, State.EXITED, State.FAILED), _refuse),
    },
    Autostart: {
        State.STOPPED: _launch,
        **dict.fromkeys((*LIVE, State.BACKOFF, State.EXITED, State.FAILED), _ignore),
    },
    Read: {
        **dict.fromkeys((State.STARTING, State.RUNNING, State.PAUSED), _read_live),
        State.STOPPING: _read_stopping,
        **dict.fromkeys((State.STOPPED, State.BACKOFF, State.EXITED, State.FAILED), _ignore),
    },
    Ended: {
        **dict.fromkeys((State.STARTING, State.RUNNING, State.PAUSED), _end_live),
        State.STOPPING: _end_stopping,
        **dict.fromkeys((State.STOPPED, State.BACKOFF, State.EXITED, State.FAILED), _ignore),
    },
    Hung: {
        **dict.fromkeys((State.STARTING, State.RUNNING), _end_hung),
        State.PAUSED: _ignore,
        State.STOPPING: _ignore,
        **dict.fromkeys((State.STOPPED, State.BACKOFF, State.EXITED, State.FAILED), _ignore),
    },
    Due: {
        State.STARTING: _come_up,
        State.RUNNING: _forget_failures,
        State.BACKOFF: _retry,
        **dict.fromkeys((State.PAUSED, State.STOPPING, State.STOPPED, State.EXITED, State.FAILED), _ignore),
    },
    SpecChanged: {
        **dict.fromkeys(LIVE, _replace_live),
        **dict.fromkeys((State.BACKOFF, State.FAILED), _launch_if_wanted),
        **dict.fromkeys((State.STOPPED, State.EXITED), _replace_ended),
    },
    Withdrawn: {
        **dict.fromkeys(LIVE, _withdraw_live),
        **dict.fromkeys((State.STOPPED, State.BACKOFF, State.EXITED, State.FAILED), _give_up),
    },
    ShutDown: {
        **dict.fromkeys(LIVE, _shut_down_live),
        State.BACKOFF: _shut_down_waiting,
        **dict.fromkeys((State.STOPPED, State.EXITED, State.FAILED), _ignore),
    },
}

TABLE: dict[tuple[State, type], _Handler] = {
    (state, event): handler for event, handlers in _HANDLERS.items() for state, handler in handlers.items()
}
