from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harnessd.errors import ConfigError
from harnessd.server import policy
from harnessd.server.jobspec import Check, JobSpec, Watchdog
from harnessd.server.policy import End, Ended, Hung, Job, Rules, Running, Spawn, step
from harnessd.server.watchdog import MOST_STEP_S, Checked, Sight, Watch, heard, look, of_run
from harnessd.states import ExitReason, State, Want

LIMIT_S = 30.0
PAUSED = Sight(polls=5, waiting=False, exempt=True)
QUIET = Sight(polls=5, waiting=False)


def watched(*sights: Sight, every_s: float = 1.0, watch: Watch | None = None, now: float = 1000.0) -> Watch:
    """Return what is known after these looks."""
    for number, sight in enumerate(sights, 1):
        watch = look(watch or Watch(), sight, now + number * every_s, LIMIT_S)
    assert watch
    return watch


def test_a_job_that_has_not_polled_for_the_limit_hangs() -> None:
    assert not watched(*[QUIET] * 30).hung
    found = watched(*[QUIET] * 31)
    assert found.hung and found.quiet_s == LIMIT_S


def test_a_poll_begins_the_count_anew_and_ends_a_hang() -> None:
    hung = watched(*[QUIET] * 40)
    polled = look(hung, replace(QUIET, polls=6), hung.at or 0, LIMIT_S)
    assert (polled.hung, polled.quiet_s) == (False, 0.0)


def test_a_job_that_waits_for_a_command_does_not_hang() -> None:
    assert not watched(*[replace(QUIET, waiting=True)] * 100).hung


def test_a_job_that_has_never_polled_is_not_judged() -> None:
    assert not watched(*[Sight(polls=0, waiting=False)] * 100).hung


def test_what_is_paused_stopping_or_stopped_does_not_hang_and_counts_anew_afterwards() -> None:
    assert not watched(*[PAUSED] * 100).hung
    after = watched(*[QUIET] * 20, *[PAUSED] * 100, *[QUIET] * 29)
    assert (after.hung, after.quiet_s) == (False, 29.0)


def test_a_hang_goes_on_while_it_is_paused_or_stopped_and_ends_with_a_poll() -> None:
    paused = watched(*[QUIET] * 40, *[PAUSED] * 100)
    assert paused.hung
    assert not look(paused, replace(PAUSED, polls=6), paused.at or 0, LIMIT_S).hung
    assert look(paused, QUIET, paused.at or 0, LIMIT_S).hung


def test_time_in_which_nobody_looked_does_not_count() -> None:
    quiet = watched(*[QUIET] * 20)
    late = look(quiet, QUIET, (quiet.at or 0) + 3600, LIMIT_S)
    assert late.quiet_s == quiet.quiet_s + MOST_STEP_S
    assert look(late, QUIET, (late.at or 0) - 5, LIMIT_S).quiet_s == late.quiet_s


def test_a_new_server_begins_anew() -> None:
    assert watched(QUIET).quiet_s == 0.0


# what the checks have said


def test_failures_in_a_row_make_unhealthy_once() -> None:
    checked = Checked(run=1)
    told = []
    for _ in range(4):
        checked = heard(checked, "answered 500", 3, at=9.0)
        told.append(checked.told)
    assert told == [False, False, True, True]
    assert (checked.ok, checked.failures, checked.last_error, checked.at) == (False, 4, "answered 500", 9.0)


def test_one_good_check_ends_the_row() -> None:
    checked = heard(heard(Checked(run=1), "no", 2, at=1.0), None, 2, at=2.0)
    assert (checked.ok, checked.failures, checked.last_error) == (True, 0, None)
    assert not heard(checked, "no", 2, at=3.0).told


def test_a_new_run_begins_with_no_failures_and_is_ill_until_a_good_check() -> None:
    ill = heard(Checked(run=1), "no", 1, at=1.0)
    fresh = of_run(ill, 2)
    assert (fresh.failures, fresh.ok, fresh.told, fresh.ill) == (0, None, False, True)
    assert not heard(fresh, None, 1, at=2.0).ill
    assert of_run(fresh, 2) is fresh and not of_run(None, 3).ill


# what the policy makes of it

NOW = 1000.0
UP = Job(Want.UP, Running(NOW - 10), proven=True)


@pytest.mark.parametrize("reason", [ExitReason.HUNG, ExitReason.UNHEALTHY])
def test_a_job_that_hangs_is_ended_and_started_again_at_once_the_first_time(reason: ExitReason) -> None:
    ending = step(UP, Hung(reason), NOW, Rules())
    assert ending.actions == (End(None),)
    ended = Ended(0, None, up_s=10.0)  # it obeyed SIGTERM: nevertheless it has failed
    assert policy.reason(ending.job, ended) is reason
    again = step(ending.job, ended, NOW, Rules())
    assert again.actions == (Spawn(),)
    assert (again.job.failures, again.job.restarts) == (1, 1)


def test_a_job_that_hangs_again_and_again_waits_longer_and_longer() -> None:
    hung = step(replace(UP, failures=3), Hung(), NOW, Rules()).job
    ended = step(hung, Ended(None, 9, up_s=10.0), NOW, Rules())
    assert ended.job.life == policy.Backoff(NOW + 2.0) and ended.job.failures == 4


def test_a_job_that_is_not_to_be_restarted_fails_when_it_hangs() -> None:
    rules = Rules(restart="never")
    assert step(step(UP, Hung(), NOW, rules).job, Ended(0, None), NOW, rules).job.state is State.FAILED


@pytest.mark.parametrize(
    ("event", "reason", "state"),
    [
        (policy.StopAsked(), ExitReason.HUNG, State.STOPPED),
        (policy.KillAsked(), ExitReason.KILLED, State.STOPPED),
        (policy.RestartAsked(), ExitReason.STOPPED, State.STARTING),
        (policy.ShutDown(), ExitReason.SHUTDOWN, State.STOPPED),
    ],
)
def test_what_an_operator_asks_of_a_job_that_is_being_ended_counts(
    event: policy.Event, reason: ExitReason, state: State
) -> None:
    job = step(step(UP, Hung(), NOW, Rules()).job, event, NOW, Rules()).job
    ended = Ended(None, 15, up_s=10.0)
    assert policy.reason(job, ended) is reason
    assert step(job, ended, NOW, Rules()).job.state is state


@pytest.mark.parametrize("life", [policy.Paused(NOW), policy.Stopping(NOW, ExitReason.STOPPED, False)])
def test_a_job_that_was_paused_or_stopped_meanwhile_is_left_alone(life: policy.Life) -> None:
    job = replace(UP, life=life)
    assert step(job, Hung(), NOW, Rules()) == policy.Step(job)


# what a file may say


def spec(text: dict[str, object], command: bool = True) -> JobSpec:
    runs = {"command": ["true"]} if command else {"entrypoint": "a.b:C"}
    return JobSpec.parse({"name": "a", "file": Path("/a.toml"), **runs, **text}, "it")


@pytest.mark.parametrize(
    "check",
    [
        {},
        {"http": "http://127.0.0.1/", "command": ["true"]},
        {"http": "127.0.0.1:8000"},
        {"http": "ftp://host/"},
        {"http": "http://me:secret@host/"},
        {"http": "http://host:99999/"},
        {"command": []},
        {"command": ["true"], "failures": 0},
        {"command": ["true"], "action": "reboot"},
    ],
)
def test_a_check_that_cannot_be_meant_is_refused(check: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        spec({"check": check})


def test_a_command_has_no_pulse_to_watch() -> None:
    with pytest.raises(ConfigError, match="no pulse"):
        spec({"watchdog": {}})


def test_the_defaults_are_those_of_the_page() -> None:
    assert spec({"watchdog": {}}, command=False).watchdog == Watchdog(pulse_seconds=30, action="restart")
    check = spec({"check": {"command": ["true"]}}).check
    assert check == Check(command=["true"], every=10, timeout=3, failures=3, action="restart")


def test_neither_needs_a_new_run_when_it_changes() -> None:
    assert spec({}).digest == spec({"check": {"command": ["true"]}}).digest
    assert spec({}, command=False).digest == spec({"watchdog": {"pulse_seconds": 5}}, command=False).digest
