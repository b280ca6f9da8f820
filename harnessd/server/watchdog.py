"""Whether a job hangs, and whether its check fails: decided from what was seen and when. No clock, no I/O.

What counts is the time in which it was looked at: a look that comes late, as the host was suspended or the server was
held up, adds no more than `MOST_STEP_S`, and a new server begins anew. A run is judged from its first poll on: one that
is still loading, or that never polls at all, is not taken for hung.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MOST_STEP_S = 3.0  # between two looks; usually it is one second


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of a run."""

    polls: int
    waiting: bool  # it is in get_msg
    exempt: bool = False  # paused, stopping, or stopped by a signal


@dataclass(frozen=True, slots=True)
class Watch:
    """What is known of a run's pulse. Times in seconds."""

    polls: int = 0
    quiet_s: float = 0.0  # for how long it has not polled, though it might have
    at: float | None = None  # of the last look, monotonic
    hung: bool = False


def look(watch: Watch, sight: Sight, now: float, limit_s: float) -> Watch:
    """Return what is known after this look; `hung` when the run has been quiet for `limit_s`."""
    polled = sight.polls != watch.polls or sight.waiting
    if watch.hung and not polled and sight.exempt:
        return replace(watch, at=now)  # it hangs on until it polls
    if watch.at is None or polled or sight.exempt or not sight.polls:
        return Watch(sight.polls, at=now)
    quiet_s = watch.quiet_s + min(max(0.0, now - watch.at), MOST_STEP_S)
    return Watch(sight.polls, quiet_s, now, quiet_s >= limit_s)


@dataclass(frozen=True, slots=True)
class Checked:
    """What a job's checks have said. All but `ill` is of one run."""

    run: int
    ok: bool | None = None  # the last one; None before the first
    failures: int = 0  # one after the other
    last_error: str | None = None  # of the last one, when it failed
    at: float | None = None  # of the last one, epoch seconds
    due: float | None = None  # of the next one, monotonic
    told: bool = False  # that this run is unhealthy
    ill: bool = False  # that it was told, of this run or one before, and nothing good since


def of_run(checked: Checked | None, run: int) -> Checked:
    """Return what is known of the run, which may be a new one."""
    if checked and checked.run == run:
        return checked
    return Checked(run, ill=checked.ill if checked else False)


def heard(checked: Checked, error: str | None, limit: int, at: float) -> Checked:
    """Return what is known after a check; `told` becomes true with `limit` failures in a row, `ill` false with none."""
    if error is None:
        return replace(checked, ok=True, failures=0, last_error=None, at=at, told=False, ill=False)
    failures = checked.failures + 1
    told = checked.told or failures >= limit
    return replace(checked, ok=False, failures=failures, last_error=error, at=at, told=told, ill=checked.ill or told)
