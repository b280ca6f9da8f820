"""Judges what concerns the daemon as a whole: states, answers, growth, its log."""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from signal import SIGKILL
from statistics import median

from chaos.oracle import Verdict
from chaos.story import SERVER_ENDS, SETTLE_S, Fact, Story

_WARM_S, _LIFE_S = 15.0, 45.0  # a process is measured from the first on, if it lived for the second
_LONG_S = 300.0  # a course that is longer has lives to measure; a life that is longer has settled
_FDS = {"keeper": 60, "server": 120}  # allowed from early to late: some 30 runs more or less, and connections
_ANON_KB = {"keeper": 4_000, "server": 60_000}  # the writer's cache alone may take 32 MiB
_SETTLED_FDS, _SETTLED_KB = 30, 8_000  # the same, of a life that is long
IDLE_FDS = {"keeper": 40, "server": 60}  # with no run left
_COLD = "the daemon has started"
# What a new server does before it notes its start.
_NEW_SERVER = (_COLD, "the server was restarted", "changed while no server was there", "its file is gone")
_ENDED = ("backoff", "exited", "failed")
_LEADS_TO = {
    "stopped": ("starting",),
    "starting": ("running", "paused", "stopping", *_ENDED),
    "running": ("starting", "paused", "stopping", *_ENDED),
    "paused": ("starting", "running", "stopping", *_ENDED),
    "stopping": ("starting", "running", "stopped"),
    "backoff": ("starting", "stopped"),
    "exited": ("starting", "stopped"),
    "failed": ("starting", "stopped"),
}
_NO_START = ("server-kill", "server-replace", "fork-cut", "descriptors-out", "disk-full", "settings-break", "preload")
_CLOSE_S = 2.0
_LEAVES_S = 10.0  # a server that was replaced has left by then
_UP_S = 10.0  # a new server serves within that, however loaded the machine is
# Python takes its own datetime where the fast one cannot be opened, and any error for a lack of temporary directories.
_STARVED = ("Too many open files", "datetime_CAPI", "No usable temporary directory")
_FIELD = re.compile(r' traceback=("(?:[^"\\]|\\.)*")')
_CHAINED = r"\n\n(?:During handling|The above exception)"
_LOGGED = re.compile(rf"^time=(\S+)|^Traceback .*\n(?:[ \t].*\n|\n)+(\S.*)$(?!{_CHAINED})", re.MULTILINE)
_END = "\ntime=9999-01-01T00:00:00Z"


def judge_daemon(story: Story) -> Verdict:
    verdict = Verdict()
    for job in story.jobs:
        _states(story, job, verdict)
        _launches(story, job, verdict)
    _answers(story, verdict)
    _growth(story, verdict)
    _log(story, verdict)
    _daemon_ends(story, verdict)
    for event in story.events:
        if event.kind == "storage" and "set_aside" in event.data:
            verdict.wrong(f"the database was taken for damaged at {event.at:.3f}: {event.data}")
    for fact in story.driver:
        if fact["f"] == "two-runs":
            verdict.wrong(f"two at once: {fact['job']} at {fact['t']:.3f}: processes {fact['pids']}")
    verdict.looked_at["server starts"] = sum(event.kind == "server-start" for event in story.events)
    verdict.looked_at["daemon starts"] = sum(fact["f"] == "daemon-started" for fact in story.driver)
    verdict.looked_at["torn lines"] = sum(event.kind == "torn" for event in story.events)
    return verdict


def _states(story: Story, job: str, verdict: Verdict) -> None:
    """Each change begins where the one before it has led; a new server may have found the job elsewhere."""
    state, fresh, cold = "stopped", True, True
    for event in story.events_of(job):
        if event.kind == "server-start":
            fresh, cold = True, event.data["starts"] == 1
        elif event.kind == "adopted":  # and may be asked again for what it missed, before the start is noted
            fresh = True
        elif event.kind == "state":
            verdict.looked_at["changes of state"] += 1
            begins, why = event.data["from"], event.data["why"]
            fresh, cold = fresh or why in _NEW_SERVER, cold or why == _COLD
            if event.data["to"] not in _LEADS_TO[begins]:
                verdict.wrong(f"state that does not follow: {job} at {event.at:.3f}: {event.data}")
            if begins == state:
                pass
            elif not fresh or (cold and begins != "stopped"):
                verdict.wrong(f"state unexplained: {job} at {event.at:.3f}: {begins}, it was {state}: {event.data}")
            else:
                verdict.excused[f"a new {'keeper' if cold else 'server'} finds {state} as {begins}"] += 1
            state, fresh, cold = event.data["to"], False, False
    ((row,),) = story.rows("SELECT state FROM job WHERE name = ?", job)
    if row != state:
        verdict.wrong(f"state unexplained: {job} is {row}, its last change led to {state}")


def _launches(story: Story, job: str, verdict: Verdict) -> None:
    """What is said to start has a run, soon, unless it is said at once that it has none."""
    asked = sorted(run.asked for run in story.runs.values() if run.job == job)
    states = [event for event in story.events_of(job) if event.kind == "state"]
    for event, after in zip(states, [*states[1:], None], strict=True):
        if event.data["to"] != "starting" or event.data["from"] == "paused":
            continue
        verdict.looked_at["launches"] += 1
        at = bisect_left(asked, event.at - _CLOSE_S)
        has_run = at < len(asked) and asked[at] <= event.at + _CLOSE_S
        untold = after is not None and after.data["from"] == "starting" and ":" not in after.data["why"]
        if not has_run and not untold and not story.server_died(event.at, event.at + _UP_S):
            verdict.wrong(f"launched, and there is no run: {job} at {event.at:.3f}: {event.data}")


def _answers(story: Story, verdict: Verdict) -> None:
    commands = {event.data["id"] for event in story.events if event.kind == "command"}
    read = {event.data["id"] for event in story.events if event.kind == "read"}
    last_facts = {fact["run"]: fact["t"] for job in story.jobs for fact in story.facts(job)}
    codes: Counter[int] = Counter()
    for fact in story.answers:
        if fact["f"] == "unanswered":
            _unanswered(story, fact, verdict)
            continue
        results = fact.get("results") or [[fact["job"], fact["code"], fact]]
        for job, code, body in results:
            codes[code] += 1
            if code >= 500 and code not in (503, 504):
                verdict.wrong(f"answer {code}: {fact}")
            if "problem" in body and "kind" not in body["problem"]:
                verdict.wrong(f"no problem+json: {fact}")
            if "id" in body and body["id"] not in commands:
                _unstored(story, fact, f"command {body['id']} to {job}", verdict)
            if body.get("read") and body.get("queued") and body["id"] not in read:
                _unstored(story, fact, f"the reading of {body['id']} by {job}", verdict)
            if "ended" in body and last_facts.get(body["ended"], 0) > fact["t"]:
                verdict.wrong(
                    f"killed, and went on: {job}, run {body['ended']}: {last_facts[body['ended']]:.3f}: {fact}"
                )
    for fact in story.driver:
        if fact["f"] == "accepted":
            verdict.looked_at["answers to the driver"] += 1
            if fact["id"] not in commands:
                _unstored(story, fact, f"command {fact['id']}", verdict)
    verdict.looked_at.update({f"answers {code}": times for code, times in sorted(codes.items())})


def _unstored(story: Story, fact: Fact, what: str, verdict: Verdict) -> None:
    if story.storage_failed(fact["since"], fact["t"]) and story.server_died(fact["since"], story.stored_by(fact["t"])):
        verdict.excused["answered while nothing could be stored, and the server died before it could"] += 1
    else:
        verdict.wrong(f"answered and not stored: {what}: {fact}")


def _unanswered(story: Story, fact: Fact, verdict: Verdict) -> None:
    verdict.looked_at["requests unanswered"] += 1
    error, direct = fact["error"], fact["way"] != "proxy"
    if "Refused" in error and direct and not story.was(("down",), fact["since"] - 0.1, fact["t"] + 0.1, after_s=0.5):
        verdict.wrong(f"connection refused while the keeper lived: {fact}")
    elif "imeout" in error or "timed out" in error:
        if _none_came_up(story, fact):
            verdict.excused["no answer: one server after the other was killed before it served"] += 1
        else:
            verdict.wrong(f"no answer for {fact['t'] - fact['since']:.1f} s: {fact}")
    elif direct and story.was(("descriptors-out",), fact["since"], fact["t"], after_s=_CLOSE_S):
        verdict.excused["connections for which there was no descriptor"] += 1
    elif direct and story.was(("server-replace",), fact["since"] - _LEAVES_S, fact["t"]):
        verdict.excused["connections that a server that was replaced had accepted and heard nothing from"] += 1
    elif direct and not story.server_died(fact["since"] - _CLOSE_S, fact["t"] + _CLOSE_S):
        verdict.wrong(f"connection lost while the server lived: {fact}")


def _none_came_up(story: Story, fact: Fact) -> bool:
    """Return whether servers were killed at the beginning of the wait and towards its end."""
    return all(story.was(SERVER_ENDS, at, at + _UP_S) for at in (fact["since"], fact["t"] - _UP_S))


def _growth(story: Story, verdict: Verdict) -> None:
    sizes: dict[tuple[str, str], list[Fact]] = {}
    measured = Counter({"keeper": 0, "server": 0})
    for fact in story.driver:
        if fact["f"] == "size":
            sizes.setdefault((fact["role"], fact["life"]), []).append(fact)
        if fact["f"] == "idle" and fact["fds"] > IDLE_FDS[fact["role"]]:
            verdict.wrong(f"descriptors leak: the {fact['role']} has {fact['fds']} with no run left")
    for (role, life), seen in sizes.items():
        warm = [fact for fact in seen if fact["t"] >= seen[0]["t"] + _WARM_S]
        if not warm or warm[-1]["t"] - seen[0]["t"] < _LIFE_S:
            continue
        part = max(1, len(warm) // 4)
        measured[role] += 1
        lasted_s = warm[-1]["t"] - warm[0]["t"]
        settled = lasted_s > _LONG_S  # what fills up at first has done so in the second quarter
        for key, bound, close in (("fds", _FDS[role], _SETTLED_FDS), ("anon_kb", _ANON_KB[role], _SETTLED_KB)):
            parts = (warm[part : 2 * part] if settled else warm[:part], warm[-part:])
            early, late = (median(fact[key] for fact in some) for some in parts)
            grown = f"{role} {life}: {key} {early:g} -> {late:g} in {lasted_s:.0f} s"
            verdict.notes.append(grown)
            if late - early > (min(bound, close) if settled else bound):
                verdict.wrong(f"growth: {grown}")
    for role, lives in measured.items():
        verdict.looked_at[f"lives of a {role} measured"] += lives
        if not lives and story.driver[-1]["t"] - story.driver[0]["t"] > _LONG_S:
            verdict.wrong(f"no life of a {role} was measured")


def _daemon_ends(story: Story, verdict: Verdict) -> None:
    """The daemon ends by itself only when it cannot begin."""
    started, served = 0.0, False
    for fact in story.driver:
        if fact["f"] == "daemon-started":
            started, served = fact["t"], False
        elif fact["f"] == "serving":
            served = True
        elif fact["f"] == "daemon-ended" and fact["code"]:
            killed = fact["code"] == -SIGKILL and story.was(
                ("keeper-kill",), fact["t"] - _CLOSE_S, fact["t"] + _CLOSE_S
            )
            if not killed and (served or not story.was(_NO_START, started, fact["t"])):
                verdict.wrong(f"the daemon ended by itself: with {fact['code']} at {fact['t']:.3f}")


def _log(story: Story, verdict: Verdict) -> None:
    """An exception that nobody has caught is a defect, whatever came of it."""
    text = story.log.read_text(errors="replace")
    errors: Counter[str] = Counter()
    for since, until, error in _raised(text, story.wall_offset):
        if any(sign in error for sign in _STARVED) and story.was(("descriptors-out",), since, until, after_s=SETTLE_S):
            verdict.excused["exceptions for want of descriptors"] += 1
        else:
            errors[error] += 1
    for error, times in errors.items():
        verdict.wrong(f"exception in the daemon's log, {times} times: {error}")
    verdict.looked_at["log lines"] = text.count("\n")


def _raised(text: str, wall_offset: float) -> Iterator[tuple[float, float, str]]:
    """Yield between which times each exception was logged, and what it was; a bare traceback has no time of its own."""
    at, errors = 0.0, list[str]()
    for found in _LOGGED.finditer(_FIELD.sub(lambda field: f"\n{json.loads(field[1])}\n", text) + _END):
        if found[2]:
            errors.append(found[2])
        elif found[1]:
            later = datetime.fromisoformat(found[1]).timestamp() - wall_offset
            yield from ((at, later, error) for error in errors)
            at, errors = later, []


def left_behind(token: str, members: list[int]) -> list[str]:
    """Return the processes that are left of the daemon, by its brand and by its environment."""
    found = {str(pid) for pid in members}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/stat", "rb") as stat:
                if token.encode() in environ.read() and stat.read().rpartition(b") ")[2][:1] not in b"ZX":
                    found.add(pid)
        except OSError:
            continue  # it has gone meanwhile
    return sorted(found)
