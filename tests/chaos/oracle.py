"""Compares what the jobs noted with what harnessd has kept. What it finds wrong is a sentence in `Verdict.found`."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from chaos.story import Fact, Run, Story
from chaos.witness import checksum

_CLOSE_S = 2.0  # between a process's end and what it did last, on a host that is busy
_TICK_S = 0.011  # a shell knows the time to a hundredth
_NEVER = ("oom", "hung", "unhealthy")  # no job has a limit, a watchdog or a check
_HIT_S = 5.0  # from a signal that the driver sends to the end, with a keeper that is stopped meanwhile
_SEEN_S = 3.0  # from an exit until the keeper has seen it and all that it has left behind is gone
_EARLY_S = 0.5  # clocks do not differ by more
_UP_S = 10.0  # until a new server serves
_SIGKILL = 9
_HOLDS = ("keeper-stop", "fork-cut", "job-stop", "spare-stop")  # what keeps a keeper from seeing an end


@dataclass
class Verdict:
    found: list[str] = field(default_factory=list)
    excused: Counter[str] = field(default_factory=Counter)
    looked_at: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def wrong(self, what: str) -> None:
        self.found.append(what)

    def merge(self, other: Verdict) -> None:
        self.found += other.found
        self.excused += other.excused
        self.looked_at += other.looked_at
        self.notes += other.notes


def judge_job(story: Story, job: str) -> Verdict:
    """Judge the statuses, runs and commands of one job."""
    verdict, facts = Verdict(), story.facts(job)
    runs = {run.id: run for run in story.runs.values() if run.job == job}
    _statuses(story, job, facts, verdict)
    _numbers(story, job, facts, verdict)
    _starts_and_ends(story, job, facts, runs, verdict)
    _one_at_a_time(job, facts, verdict)
    _commands(story, job, facts, runs, verdict)
    return verdict


def _statuses(story: Story, job: str, facts: list[Fact], verdict: Verdict) -> None:
    said, refused, last = defaultdict(set), defaultdict(set), Counter[tuple[int, str]]()
    sums = dict[tuple[int, str, int], int | None]()
    for fact in facts:
        if fact["f"] in ("said", "refused"):
            voice = (fact["run"], fact["w"])
            (said if fact["f"] == "said" else refused)[voice].add(fact["n"])
            last[voice] = max(last[voice], fact["n"])
            sums[*voice, fact["n"]] = fact.get("sum")  # a shell has none
    stored = defaultdict(list)
    for run, status in story.statuses(job):
        stored[run, status["w"]].append(status["n"])
        if (sent := sums.get((run, status["w"], status["n"]))) and sent != checksum(status):
            verdict.wrong(f"status changed: {job}, run {run}: {str(status)[:200]}")
    for voice in {*said, *refused, *stored}:
        numbers = stored.get(voice, [])
        where = f"{job}, run {voice[0]}, voice {voice[1]}"
        if any(later <= earlier for earlier, later in pairwise(numbers)):
            verdict.wrong(f"statuses doubled or out of order: {where}: {_doubled(numbers)}")
        if lost := said[voice].difference(numbers):
            verdict.wrong(f"statuses lost: {where}: {_some(lost)} of {last[voice]}")
        if invented := {n for n in numbers if n > last[voice] + 1} | refused[voice].intersection(numbers):
            verdict.wrong(f"statuses stored that were refused, or never sent: {where}: {_some(invented)}")
        verdict.looked_at["statuses"] += len(numbers)
        verdict.looked_at["statuses refused"] += len(refused[voice])


def _numbers(story: Story, job: str, facts: list[Fact], verdict: Verdict) -> None:
    """A run's lines are numbered from 1; a number without a status is one of another line, or one that was not written.

    Whoever is killed may have taken one and not have written it.
    """
    others = Counter(event.run for event in story.events_of(job) if event.kind in ("error", "torn"))
    others.update(fact["run"] for fact in facts if fact["f"] in ("refused", "start", "child", "grandchild"))
    reads = {(event.run, event.data["id"]) for event in story.events_of(job) if event.kind == "read"}
    reads.update((fact["run"], fact["id"]) for fact in facts if fact["f"] == "read")
    others.update(run for run, _ in reads)
    query = (
        "SELECT run_id, count(*), count(DISTINCT seq), min(seq), max(seq) "
        "FROM status JOIN job ON job.id = job_id WHERE name = ? GROUP BY run_id"
    )
    for run, rows, numbers, least, most in story.rows(query, job):
        if rows != numbers or least < 1 or most - rows > others[run]:
            verdict.wrong(
                f"statuses numbered wrong: {job}, run {run}: {rows} of {least} to {most}, {others[run]} others"
            )


def _starts_and_ends(story: Story, job: str, facts: list[Fact], runs: dict[int, Run], verdict: Verdict) -> None:
    starts = {fact["run"]: fact for fact in facts if fact["f"] == "start"}
    exits = {fact["run"]: fact for fact in facts if fact["f"] == "exit"}
    verdict.looked_at["runs"] += len(runs)
    verdict.looked_at["exits chosen"] += len(exits)
    for run, fact in starts.items():
        if run not in runs:
            verdict.wrong(f"run lost: {job}, run {run}, started at {fact['t']:.3f}: harnessd has no row of it")
        elif runs[run].pid not in (fact["pid"], 0):
            verdict.wrong(f"pid wrong: {job}, run {run}: {runs[run].pid}, it was {fact['pid']}")
    for run in runs.values():
        if run.ended is None:
            verdict.wrong(f"exit lost: {job}, run {run.id} has no end")
        elif why := _inconsistent(story, run, starts.get(run.id), exits.get(run.id), verdict):
            verdict.wrong(f"exit wrong: {job}, {_shown(run)}: {why}")
        if not run.journal_done:
            verdict.wrong(f"journal not stored to its end: {job}, run {run.id}")


def _inconsistent(story: Story, run: Run, start: Fact | None, exit: Fact | None, verdict: Verdict) -> str | None:
    """Return what contradicts the row of a run that has ended."""
    assert run.ended is not None
    if run.reason in _NEVER:
        return "no job is ended so"
    if run.reason == "unstarted":
        if start and run.signal == _SIGKILL and story.was(("descriptors-out",), run.asked, run.ended, after_s=_CLOSE_S):
            verdict.excused["ended at once, as the server had no descriptor for it"] += 1
            return None
        return "it was started" if start else None
    if run.reason == "lost":
        return _unlost(story, run, exit, verdict)
    if not run.pid:
        return "it has no process"
    if run.started < run.asked - _EARLY_S:
        return f"it was asked for at {run.asked:.3f}"
    seen_soon = not exit or -_EARLY_S <= run.ended - exit["t"] <= _SEEN_S
    if exit and not seen_soon and not story.was(_HOLDS, exit["t"] - _SEEN_S, run.ended):
        return f"it exited at {exit['t']:.3f}"
    if {"completed": run.code != 0, "crashed": not run.code, "signaled": run.signal is None}.get(run.reason or ""):
        return "the reason does not fit"
    if run.code is not None:
        return _code_unchosen(story, run, start, exit)
    if exit and exit.get("signal") == run.signal:
        return None
    if exit and "code" in exit:
        verdict.excused["killed between its last note and its exit"] += 1
    if run.reason == "signaled" and not _explained(story, run):
        return "nobody sent it a signal"
    return None


def _unlost(story: Story, run: Run, exit: Fact | None, verdict: Verdict) -> str | None:
    """Return why the run's end should be known."""
    ended = run.ended or 0.0
    spans = [span for span in story.spans if span.kind in ("keeper-kill", "down")]
    killed = min(
        (span.since for span in spans if span.since <= ended + 1 and span.until >= run.started - 1), default=None
    )
    if killed is None:
        return "no keeper was killed"
    if exit and exit["t"] < killed - _CLOSE_S:  # the keeper tells of it, if there is a server that stores it
        before = (exit["t"] - _UP_S, killed - _CLOSE_S)
        if not (story.was(_HOLDS, *before) or story.storage_failed(*before) or story.server_died(*before)):
            return f"it exited at {exit['t']:.3f}, and the keeper was killed at {killed:.3f}"
    verdict.excused["ends unknown since the keeper was killed"] += 1
    return None


def _code_unchosen(story: Story, run: Run, start: Fact | None, exit: Fact | None) -> str | None:
    if exit and exit.get("code") == run.code:
        return None
    if run.code == 120 and story.was(("disk-full",), run.started, (run.ended or 0) + 1):
        return None  # Python could not flush its output
    chosen = f"it chose {exit.get('code')}, signal {exit.get('signal')}" if exit else "it chose no exit"
    return chosen if start or exit else f"{chosen} and noted no start"


def _explained(story: Story, run: Run) -> bool:
    """Return whether somebody other than harnessd ended it by a signal."""
    ended = run.ended or 0.0
    return run.signal == _SIGKILL and any(-_CLOSE_S <= ended - at <= _HIT_S for at in story.kills.get(run.id, ()))


def _one_at_a_time(job: str, facts: list[Fact], verdict: Verdict) -> None:
    first, last = dict[int, Fact](), dict[int, Fact]()
    for fact in facts:
        if fact["f"] == "twice":
            verdict.wrong(f"two at once: {job}, run {fact['run']} found the lock held at {fact['t']:.3f}")
        first.setdefault(fact["run"], fact)
        last[fact["run"]] = fact
    order = sorted(first, key=lambda run: first[run]["t"])
    for earlier, later in pairwise(order):
        overlap = last[earlier]["t"] - first[later]["t"]
        if overlap > (_TICK_S if job.startswith("shell") else 0):
            verdict.wrong(f"two at once: {job}, runs {earlier} and {later} for {overlap:.3f} s: {last[earlier]}")


def _commands(story: Story, job: str, facts: list[Fact], runs: dict[int, Run], verdict: Verdict) -> None:
    noted = [(fact["run"], fact["id"], fact) for fact in facts if fact["f"] == "read"]
    events = [event for event in story.events_of(job) if event.kind in ("read", "command")]
    read = [(event.run, event.data["id"], event) for event in events if event.kind == "read"]
    commands = {event.data["id"]: event.data for event in events if event.kind == "command"}
    verdict.looked_at["commands"] += len(commands)
    verdict.looked_at["commands read"] += len(read)
    for name, pairs in (("noted", noted), ("stored", read)):
        if doubled := [number for number, times in Counter(number for _, number, _ in pairs).items() if times > 1]:
            verdict.wrong(f"commands read twice ({name}): {job}: {_some(doubled)}")
    if len(commands) < (rows := sum(event.kind == "command" for event in events)):
        verdict.wrong(f"commands doubled: {job}: {len(commands)} in {rows} rows")
    for _, number, fact in noted:
        command = commands.get(number)
        if command and (fact["cmd"], fact.get("data", command["data"])) != (command["verb"].upper(), command["data"]):
            verdict.wrong(f"another command read: {job}: {fact}, and sent was {command}")
    stored = {(run, number) for run, number, _ in read}
    for run, number, fact in noted:
        if (run, number) in stored:
            continue
        if story.was(("journals-full",), fact["t"] - _CLOSE_S, fact["t"]):
            verdict.excused["acknowledgements for which there was no room"] += 1
        else:
            verdict.wrong(f"reading lost: {job}, run {run}, {fact['cmd']} {number} at {fact['t']:.3f}")
    told = {(run, number) for run, number, _ in noted}
    for run, number, event in read:
        if (run, number) not in told:
            if _cut_short(story, runs.get(run or 0), event.at):
                verdict.excused["killed between its reading and its note"] += 1
            else:
                verdict.wrong(f"read by nobody: {job}, run {run}, command {number} at {event.at:.3f}")
    sent = {number: fact["sent"] - story.wall_offset for _, number, fact in noted}
    for _, number, event in read:
        if number not in commands:
            at = sent.get(number, event.at)
            soon = at + _CLOSE_S
            by = story.stored_by(soon) if story.storage_failed(at, soon) else soon
            if story.server_died(at, by):
                verdict.excused["commands that a server sent and could not store before its death"] += 1
            else:
                verdict.wrong(f"read and never sent: {job}, command {number} at {event.at:.3f}")


def _cut_short(story: Story, run: Run | None, at: float) -> bool:
    """Return whether the process that read then may have ended right after it."""
    if run is None or run.ended is None or run.ended <= at + _CLOSE_S:
        return True
    return any(abs(hit - at) <= _CLOSE_S for hit in story.hits.get(run.id, ()))


def _shown(run: Run) -> str:
    end = f"{run.started:.3f} to {run.ended:.3f}" if run.ended else f"from {run.started:.3f}"
    return f"run {run.id} ({end}, {run.reason}, code {run.code}, signal {run.signal})"


def _doubled(numbers: list[int]) -> str:
    times = Counter(numbers)
    doubled = [n for n in times if times[n] > 1]
    return f"doubled {_some(doubled)}" if doubled else f"order {numbers[:20]}"


def _some(values: set[int] | list[int]) -> str:
    shown = sorted(values)
    return f"{shown[:8]}{f' and {len(shown) - 8} more' if len(shown) > 8 else ''}"
