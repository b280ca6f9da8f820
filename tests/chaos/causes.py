"""Judges whether each run was asked for, and whether what was to end has ended."""

from __future__ import annotations

from itertools import pairwise
from signal import Signals

from chaos.fleet import may_rest, specs
from chaos.oracle import Verdict
from chaos.story import Event, Run, Story

_ASKED = ("start", "restart")
_CHANGED = (
    "its file has changed",
    "changed while no server was there",
    "its file is gone",  # and back again, before the run had ended
    "its file is back",
    "its file was added",
    "the daemon has started",
)
_AGAIN = "the server was restarted"
_ENDING = ("kill", "restart", "its file has changed", "its file is gone")  # whatever the job makes of it
_ENDS = {"stopped": {"any"}, "killed": {"kill"}, "shutdown": {"the daemon ends"}}  # which `why` or verb a reason needs
_FAILED = ("crashed", "signaled", "completed")
_HOLDS = ("server-stop", "keeper-stop", "fork-cut")
_BACKOFF_S = 5.0  # the longest, and some more
_CLOSE_S = 0.1
_ROUNDED_S = 0.001  # a run's number is whole milliseconds
_NOTED_S = 1.0  # from a run's start until it is stored
_GRACE_S = 4.0  # the longest, and some more
_ENDED_S = 12.0  # the longest grace, a keeper that is stopped and a module that is slow to import


def judge_causes(story: Story, job: str) -> Verdict:
    verdict = Verdict()
    _nobody_asked(story, job, verdict)
    _undone(story, job, verdict)
    _unasked_ends(story, job, verdict)
    _told_otherwise(story, job, verdict)
    _given_up(story, job, verdict)
    return verdict


def _nobody_asked(story: Story, job: str, verdict: Verdict) -> None:
    """A run that ended for good is followed by one only if somebody or something wanted it."""
    restart = specs()[job].get("restart", "on-failure")
    events = story.events_of(job)
    runs = [run for run in story.runs.values() if run.job == job and run.reason != "unstarted"]
    for run, later in pairwise(runs):
        since = _for_good_since(run, restart, events)
        if since is None:
            continue
        launched = [event.at for event in events if _is_launch(event) and run.asked - _CLOSE_S < event.at < run.asked]
        if since == run.asked:  # numbers run ahead of the clock where many are given at once
            since = min([since, *launched[-1:]])
        verdict.looked_at["runs that ended for good"] += 1
        until = later.started + _CLOSE_S
        between = [event for event in events if since < event.at <= until]
        if any(map(_is_cause, between)):
            continue
        # Whoever asks is answered once that is stored; a server that dies before may have had it done.
        launches = (event.data for event in reversed(between) if _is_launch(event) and event.at > run.started)
        launch = next(launches, None)  # not that of the run itself
        unstored = story.storage_failed(since, until) and story.server_died(since, story.stored_by(until))
        may_be_lost = launch is None or launch["from"] == "stopping"
        if launch and launch["why"] == _AGAIN and story.was(("job-remove",), since, until):
            verdict.excused["started by a new server, and its file may have come back before that"] += 1
        elif unstored or (may_be_lost and story.server_died(since, until + _NOTED_S)):
            verdict.excused["started, and the server died before it could store why"] += 1
        else:
            verdict.wrong(f"run that nobody asked for: {job}, {later.id}, after {run.id}: {run.reason} at {run.ended}")


def _is_cause(event: Event) -> bool:
    if event.kind == "server-start":
        return bool(event.data["starts"] == 1)
    if event.kind == "state":
        return event.data["why"] in _CHANGED
    return event.kind == "command" and event.data["verb"] in _ASKED


def _is_launch(event: Event) -> bool:
    return event.kind == "state" and event.data["to"] == "starting"


def _for_good_since(run: Run, restart: str, events: list[Event]) -> float | None:
    """Return from when on something must have asked for the next run; None when the job's own rules do."""
    if run.ended is None or run.reason == "lost":
        return None
    if run.reason in ("stopped", "killed", "shutdown"):  # a start may have come before it had ended
        return max((event.at for event in events if event.run == run.id and _is_end(event)), default=run.asked)
    if restart == "never" or (run.reason == "completed" and restart == "on-failure"):
        return run.ended - _CLOSE_S
    return None


def _is_end(event: Event) -> bool:
    return event.kind == "command" and event.data["verb"] in ("stop", "kill")


def _reasons(why: str) -> tuple[str, ...]:
    return ("killed", "shutdown", "lost") if why == "kill" else ("stopped", "killed", "shutdown", "lost")


def _undone(story: Story, job: str, verdict: Verdict) -> None:
    """A run that is to end by force has ended so, and soon, whoever dies meanwhile."""
    runs = [run for run in story.runs.values() if run.job == job]
    states = [event for event in story.events_of(job) if event.kind == "state"]
    for event, after in zip(states, [*states[1:], None], strict=True):
        if event.data["to"] != "stopping" or event.data["why"] not in _ENDING:
            continue
        if event.run is None and after and after.data["from"] == "stopping" and ":" not in after.data["why"]:
            continue  # no exit code and no signal: it never was a process
        run = story.runs.get(event.run or 0) or next(
            (each for each in reversed(runs) if each.asked <= event.at + _ROUNDED_S), None
        )
        if run is None or run.ended is None or run.ended < event.at - (_CLOSE_S if event.run else _ROUNDED_S):
            continue  # that was the run before
        verdict.looked_at["ends by force"] += 1
        if run.reason not in _reasons(event.data["why"]):
            verdict.wrong(f"end undone: {job}, run {run.id} at {run.ended:.3f}: {run.reason}, after {event.data}")
        elif run.reason != "lost" and run.ended - event.at > _ENDED_S:
            verdict.wrong(f"end late: {job}, run {run.id} at {run.ended:.3f}, asked at {event.at:.3f}: {event.data}")


def _unasked_ends(story: Story, job: str, verdict: Verdict) -> None:
    """A run was stopped, killed or shut down only if something is stored that asked for that."""
    asks = [event for event in story.events_of(job) if _ends(event)]
    for run in (run for run in story.runs.values() if run.job == job and run.ended is not None):
        if (wanted := _ENDS.get(run.reason or "")) is None:
            continue
        verdict.looked_at["ends that were asked for"] += 1
        since, until = run.asked - _CLOSE_S, (run.ended or 0.0) + _GRACE_S  # others of it may live on for a grace
        between = (event for event in asks if since <= event.at <= until)
        if any(wanted & {event.data.get("why"), event.data.get("verb"), "any"} for event in between):
            continue
        if run.reason == "killed":
            since, until = until - 2 * _GRACE_S, until - _GRACE_S + _NOTED_S
        if run.reason != "shutdown" and story.server_died(since, story.stored_by(until)):
            verdict.excused["ended, and the server died before it could store why"] += 1
        else:
            verdict.wrong(f"end that nobody asked for: {job}, run {run.id} at {run.ended:.3f}: {run.reason}")


def _ends(event: Event) -> bool:
    return event.data.get("verb") in ("stop", "kill", "restart") or event.data.get("to") == "stopping"


def _told_otherwise(story: Story, job: str, verdict: Verdict) -> None:
    """A change of state that tells how a run ended tells what the run's row does."""
    runs = [run for run in story.runs.values() if run.job == job and run.ended is not None]
    for event in story.events_of(job):
        if event.kind != "state" or ": " not in event.data["why"]:
            continue
        verdict.looked_at["ends told"] += 1
        last = next((run for run in reversed(runs) if (run.ended or 0.0) <= event.at + _ROUNDED_S), None)
        if last is None or _how(last) != event.data["why"]:
            verdict.wrong(f"end told otherwise: {job} at {event.at:.3f}: {event.data}, and the row: {last}")


def _how(run: Run) -> str:
    end = f"exit code {run.code}" if run.signal is None else f"signal {Signals(run.signal).name}"
    return f"{run.reason}: {end}"


def _given_up(story: Story, job: str, verdict: Verdict) -> None:
    """A run that failed is followed by the next, soon, unless the job's rules say that it is not."""
    spec = specs()[job]
    states = [event for event in story.events_of(job) if event.kind == "state"]
    for event, after in zip(states, [*states[1:], None], strict=True):
        to, how = event.data["to"], event.data["why"].partition(":")[0]
        if how in _FAILED and event.data["from"] in ("starting", "running", "paused"):
            verdict.looked_at["ends by itself"] += 1
            if to not in ("starting", "backoff") and not may_rest(spec, to, how):
                verdict.wrong(f"not started again: {job} at {event.at:.3f}: {event.data}")
        if to == "backoff" and (after is None or after.at - event.at > _BACKOFF_S):
            until = event.at + _BACKOFF_S
            if after and (story.server_died(event.at, story.stored_by(until)) or story.was(_HOLDS, event.at, until)):
                verdict.excused["not started again in time, as a server or the keeper was held up"] += 1
            else:
                verdict.wrong(f"not started again in time: {job}, in backoff since {event.at:.3f}: {after}")
