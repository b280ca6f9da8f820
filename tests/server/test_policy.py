from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from harnessd.server import policy
from harnessd.server.policy import (
    LIVE,
    TABLE,
    Autostart,
    Backoff,
    ConfigAsked,
    Due,
    End,
    Ended,
    Exited,
    Failed,
    Freeze,
    Job,
    KillAsked,
    Life,
    PauseAsked,
    Paused,
    Read,
    RestartAsked,
    ResumeAsked,
    Rules,
    Running,
    Send,
    ShutDown,
    Spawn,
    SpecChanged,
    StartAsked,
    Starting,
    Step,
    StopAsked,
    Stopped,
    Stopping,
    Thaw,
    Withdrawn,
    delay_s,
    due,
    reason,
    step,
)
from harnessd.states import Command, ExitReason, State, Want

NOW = 1000.0
RULES = Rules()
SIGNALS = Rules(messages=False)
DOWN = Job()
UP = Job(Want.UP, Running(NOW - 10), proven=True)
CRASH = Ended(code=1, signal=None)
SUCCESS = Ended(code=0, signal=None)
FORCED = Stopping(NOW - 10, ExitReason.STOPPED, forced=True)
ASKED = replace(FORCED, forced=False)

LIVES: dict[State, Life] = {
    State.STOPPED: Stopped(),
    State.STARTING: Starting(NOW - 0.5),
    State.RUNNING: Running(NOW - 10),
    State.PAUSED: Paused(NOW - 10),
    State.STOPPING: ASKED,
    State.BACKOFF: Backoff(NOW + 5),
    State.EXITED: Exited(),
    State.FAILED: Failed(),
}
EXAMPLES: dict[type, policy.Event] = {
    **{kind: kind() for kind in get_args(policy.Event) if kind not in (Read, Ended)},
    Read: Read(Command.CONFIG),
    Ended: CRASH,
}


def job_in(state: State, **changes: Any) -> Job:
    wanted = state not in (State.STOPPED, State.STOPPING)
    return replace(Job(Want.UP if wanted else Want.DOWN, LIVES[state]), **changes)


def after(job: Job, *events: policy.Event, now: float = NOW, rules: Rules = RULES) -> Step:
    """Return the last step."""
    for event in events:
        taken = step(job, event, now, rules)
        job = taken.job
    return taken


# the table


def test_every_state_has_an_entry_for_every_event() -> None:
    assert set(TABLE) == set(product(State, get_args(policy.Event)))


def test_every_state_has_one_kind_of_life() -> None:
    assert sorted(life.state for life in get_args(Life)) == sorted(State)


@pytest.mark.parametrize("rules", [RULES, SIGNALS, Rules(restart="never"), Rules(restart="always")])
@pytest.mark.parametrize(("state", "kind"), sorted(TABLE, key=lambda key: (key[0], key[1].__name__)))
def test_every_entry_answers_and_a_refusal_changes_nothing(state: State, kind: type, rules: Rules) -> None:
    job = job_in(state)
    taken = step(job, EXAMPLES[kind], NOW, rules)
    if taken.refused:
        assert (taken.job, taken.actions) == (job, ())
    if taken.job.state is State.BACKOFF:
        assert taken.job.want is Want.UP
    spawns = taken.actions.count(Spawn())
    assert spawns == (taken.job.is_live and (not job.is_live or kind is Ended))


@pytest.mark.parametrize("state", State)
def test_only_what_a_verb_asks_for_is_ever_refused(state: State) -> None:
    facts = (Autostart(), Read(Command.STOP), CRASH, SUCCESS, Due(), SpecChanged(), Withdrawn(), ShutDown())
    assert not any(step(job_in(state), fact, NOW, RULES).refused for fact in facts)


# starting


@pytest.mark.parametrize("state", [State.STOPPED, State.BACKOFF, State.EXITED, State.FAILED])
def test_start_launches_a_job_without_a_process_and_clears_its_failures(state: State) -> None:
    taken = step(job_in(state, failures=7), StartAsked(), NOW, RULES)
    assert taken.job == Job(Want.UP, Starting(NOW))
    assert taken.actions == (Spawn(), Send(Command.START))


@pytest.mark.parametrize("state", [State.STARTING, State.RUNNING, State.PAUSED])
def test_start_is_told_to_a_job_that_has_a_process(state: State) -> None:
    taken = step(job_in(state), StartAsked(), NOW, RULES)
    assert (taken.job, taken.actions) == (job_in(state), (Send(Command.START),))


def test_the_daemon_starts_a_stopped_job_without_telling_it_anything() -> None:
    taken = step(DOWN, Autostart(), NOW, RULES)
    assert (taken.job, taken.actions) == (Job(Want.UP, Starting(NOW)), (Spawn(),))


@pytest.mark.parametrize("state", [state for state in State if state is not State.STOPPED])
def test_the_daemon_starts_no_other(state: State) -> None:
    assert step(job_in(state), Autostart(), NOW, RULES) == Step(job_in(state))


def test_a_job_has_come_up_after_start_seconds() -> None:
    job = step(DOWN, Autostart(), NOW, RULES).job
    assert due(job, RULES) == NOW + 1
    assert step(job, Due(), NOW + 0.9, RULES) == Step(job)
    assert step(job, Due(), NOW + 1, RULES).job == Job(Want.UP, Running(NOW), proven=True)


@pytest.mark.parametrize("command", [Command.START, Command.RESUME, Command.CONFIG])
def test_a_job_that_reads_a_command_runs_and_still_has_to_last_to_have_come_up(command: Command) -> None:
    job = after(job_in(State.STARTING), Read(command)).job
    assert job == Job(Want.UP, Running(NOW - 0.5))
    assert not step(job, CRASH, NOW, RULES).job.proven


# restarting


def test_a_run_that_was_up_and_fails_is_started_again_at_once() -> None:
    taken = step(UP, CRASH, NOW, RULES)
    assert taken == Step(Job(Want.UP, Starting(NOW), failures=1, restarts=1, proven=True), (Spawn(),))


def test_repeated_failures_wait_longer_and_longer_up_to_the_limit() -> None:
    job, waits = UP, []
    for _ in range(12):
        job = step(job, CRASH, NOW, RULES).job
        if isinstance(job.life, Backoff):
            waits.append(job.life.until - NOW)
        job = replace(job, life=Running(NOW - 2))
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_the_first_wait_of_a_run_that_never_came_up_is_the_first_of_the_backoff() -> None:
    taken = step(job_in(State.STARTING), CRASH, NOW, RULES)
    assert taken == Step(Job(Want.UP, Backoff(NOW + 0.5), failures=1))


@pytest.mark.parametrize(("jitter", "wait_s"), [(-1.0, 0.4), (0.0, 0.5), (1.0, 0.6)])
def test_a_wait_is_jittered(jitter: float, wait_s: float) -> None:
    life = step(job_in(State.STARTING), replace(CRASH, jitter=jitter), NOW, RULES).job.life
    assert isinstance(life, Backoff)
    assert life.until - NOW == pytest.approx(wait_s)


def test_a_wait_stays_finite_after_a_year_of_failures() -> None:
    assert delay_s(10**9, 1.0, replace(RULES, factor=100.0)) == 60 * 1.2


def test_a_job_in_backoff_spawns_when_its_time_has_come_and_not_before() -> None:
    job = job_in(State.BACKOFF, failures=3)
    assert step(job, Due(), NOW + 4.9, RULES) == Step(job)
    taken = step(job, Due(), NOW + 5, RULES)
    assert taken == Step(Job(Want.UP, Starting(NOW + 5), failures=3, restarts=1), (Spawn(),))


def test_failures_are_forgotten_after_a_minute_up() -> None:
    job = replace(UP, failures=4)
    assert due(job, RULES) == NOW - 10 + 60
    assert step(job, Due(), NOW + 49, RULES) == Step(job)
    assert step(job, Due(), NOW + 50, RULES).job == replace(job, failures=0)
    assert step(job, CRASH, NOW + 50, RULES).job.failures == 1


def test_a_job_without_failures_wants_nothing_done_while_it_runs() -> None:
    assert due(UP, RULES) == math.inf


def test_success_is_final_unless_restart_is_always() -> None:
    assert step(UP, SUCCESS, NOW, RULES) == Step(replace(UP, life=Exited()))
    assert step(UP, SUCCESS, NOW, replace(RULES, restart="always")).actions == (Spawn(),)


@pytest.mark.parametrize(("ended", "life"), [(SUCCESS, Exited()), (CRASH, Failed()), (Ended(None, 9), Failed())])
def test_with_restart_never_every_exit_is_final(ended: Ended, life: Life) -> None:
    assert step(UP, ended, NOW, replace(RULES, restart="never")) == Step(replace(UP, life=life))


def test_a_run_that_could_not_be_started_is_tried_again() -> None:
    assert step(job_in(State.STARTING), Ended(None, None), NOW, RULES).job.state is State.BACKOFF


def test_a_job_that_never_came_up_fails_after_max_failures() -> None:
    job = job_in(State.STARTING, failures=3)
    assert step(job, CRASH, NOW, RULES).job.state is State.BACKOFF
    assert step(replace(job, failures=4), CRASH, NOW, RULES) == Step(Job(Want.UP, Failed(), failures=5))


def test_a_job_that_has_been_up_retries_for_ever() -> None:
    assert step(replace(UP, failures=10**6), CRASH, NOW, RULES).job.state is State.BACKOFF


def test_a_run_that_was_up_counts_even_if_nobody_saw_it_come_up() -> None:
    job = Job(Want.UP, Starting(NOW - 30), failures=9)
    assert step(job, CRASH, NOW, RULES).job.state is State.BACKOFF


# stopping


@pytest.mark.parametrize("state", [State.STARTING, State.RUNNING, State.PAUSED])
def test_stop_is_told_to_the_job_and_its_exit_is_final_whatever_the_code(state: State) -> None:
    taken = step(job_in(state), StopAsked(), NOW, RULES)
    assert taken.actions == (Send(Command.STOP),)
    assert (taken.job.want, taken.job.state) == (Want.DOWN, State.STOPPING)
    for ended in (SUCCESS, CRASH, Ended(None, 11)):
        assert reason(taken.job, ended) is ExitReason.STOPPED
        assert step(taken.job, ended, NOW, replace(RULES, restart="always")) == Step(replace(taken.job, life=Stopped()))


def test_stop_in_backoff_gives_up() -> None:
    assert step(job_in(State.BACKOFF, failures=3), StopAsked(), NOW, RULES) == Step(DOWN)


@pytest.mark.parametrize("state", [State.STOPPED, State.EXITED, State.FAILED])
@pytest.mark.parametrize("event", [StopAsked(), PauseAsked(), ResumeAsked(), KillAsked()])
def test_what_has_no_process_and_awaits_none_cannot_be_stopped(state: State, event: policy.Event) -> None:
    assert step(job_in(state), event, NOW, RULES).refused == f"it is {state}"


def test_a_job_that_is_stopped_twice_is_told_twice() -> None:
    assert step(job_in(State.STOPPING), StopAsked(), NOW, RULES).actions == (Send(Command.STOP),)
    assert step(Job(life=FORCED), StopAsked(), NOW, RULES).actions == ()


def test_a_stopping_job_that_is_started_runs_on_when_it_reads_that() -> None:
    taken = step(job_in(State.STOPPING), StartAsked(), NOW, RULES)
    assert taken.actions == (Send(Command.START),)
    assert (taken.job.want, taken.job.state) == (Want.UP, State.STOPPING)
    assert step(taken.job, Read(Command.STOP), NOW, RULES).job == taken.job
    assert step(taken.job, Read(Command.START), NOW, RULES).job.state is State.RUNNING


def test_a_stopping_job_that_is_started_and_ends_is_launched_again_as_was_asked() -> None:
    taken = after(job_in(State.STOPPING), StartAsked(), SUCCESS)
    assert taken == Step(Job(Want.UP, Starting(NOW)), (Spawn(),))


def test_a_start_that_was_overtaken_by_a_stop_does_not_revive() -> None:
    assert after(UP, StartAsked(), StopAsked(), Read(Command.START)).job.state is State.STOPPING


def test_a_stop_that_was_overtaken_by_a_start_still_counts_when_it_is_read_late() -> None:
    told = after(UP, StopAsked(), StartAsked(), StopAsked(), StartAsked(), Read(Command.STOP), Read(Command.START))
    assert told.job.state is State.RUNNING
    stopping = step(told.job, Read(Command.STOP), NOW, RULES).job
    assert stopping.state is State.STOPPING
    assert step(stopping, SUCCESS, NOW, RULES).actions == (Spawn(),)
    assert step(stopping, Read(Command.START), NOW, RULES).job.state is State.RUNNING


@pytest.mark.parametrize(("event", "command"), [(PauseAsked(), Command.PAUSE), (ResumeAsked(), Command.RESUME)])
def test_a_job_that_was_asked_to_stop_and_goes_on_is_still_told_things(event: policy.Event, command: Command) -> None:
    job = job_in(State.STOPPING)
    assert step(job, event, NOW, RULES) == Step(job, (Send(command),))
    assert step(job, Read(command), NOW, RULES) == Step(job)
    assert step(Job(life=FORCED), event, NOW, RULES).refused


# killing


@pytest.mark.parametrize("state", sorted(LIVE))
def test_kill_ends_the_run_and_nothing_comes_after(state: State) -> None:
    taken = step(job_in(state), KillAsked(2.5), NOW, RULES)
    assert taken.actions == (End(2.5),)
    assert reason(taken.job, SUCCESS) is ExitReason.KILLED
    assert after(taken.job, Read(Command.START), Due(), Ended(None, 9)).job == DOWN


def test_kill_in_backoff_gives_up() -> None:
    assert step(job_in(State.BACKOFF), KillAsked(), NOW, RULES) == Step(DOWN)


@pytest.mark.parametrize("later", [StopAsked(), RestartAsked(), SpecChanged(), Withdrawn()])
def test_a_killed_run_stays_a_killed_one(later: policy.Event) -> None:
    assert reason(after(UP, KillAsked(), later).job, Ended(None, 15)) is ExitReason.KILLED


def test_a_run_that_is_being_ended_and_is_killed_was_killed() -> None:
    assert reason(after(UP, RestartAsked(), KillAsked(0)).job, Ended(None, 9)) is ExitReason.KILLED


def test_a_killed_job_that_is_started_before_it_is_gone_is_launched_afterwards() -> None:
    told = after(UP, KillAsked(), StartAsked())
    assert told.actions == ()
    assert step(told.job, Ended(None, 9), NOW, RULES).actions == (Spawn(),)


# restart


@pytest.mark.parametrize("state", sorted(LIVE))
def test_restart_ends_the_run_and_launches_the_next_one_when_nothing_is_left(state: State) -> None:
    taken = step(job_in(state), RestartAsked(), NOW, RULES)
    assert taken.actions == (End(),)
    assert step(taken.job, Ended(None, 15), NOW, RULES).actions == (Spawn(),)


def test_a_restart_that_was_asked_for_is_not_counted() -> None:
    assert after(UP, RestartAsked(), SUCCESS).job.restarts == 0


@pytest.mark.parametrize("state", sorted(set(State) - LIVE))
def test_restart_launches_a_job_without_a_process(state: State) -> None:
    assert step(job_in(state), RestartAsked(), NOW, RULES).actions == (Spawn(),)


# pausing


def test_a_job_is_paused_once_it_has_read_that() -> None:
    asked = step(UP, PauseAsked(), NOW, RULES)
    assert asked == Step(UP, (Send(Command.PAUSE),))
    paused = after(asked.job, Read(Command.PAUSE)).job
    assert paused.state is State.PAUSED
    assert after(paused, PauseAsked()) == Step(paused, (Send(Command.PAUSE),))
    assert after(paused, Read(Command.CONFIG), Read(Command.PAUSE)).job == paused
    assert after(paused, ResumeAsked()) == Step(paused, (Send(Command.RESUME),))


@pytest.mark.parametrize("command", [Command.RESUME, Command.START])
def test_a_paused_job_runs_once_it_has_read_resume_or_start(command: Command) -> None:
    assert after(job_in(State.PAUSED), Read(command)).job.state is State.RUNNING


def test_a_resume_goes_to_a_running_job_too_as_its_pause_may_be_unread() -> None:
    assert step(UP, ResumeAsked(), NOW, RULES) == Step(UP, (Send(Command.RESUME),))


def test_a_paused_job_that_fails_is_restarted_like_any_other() -> None:
    assert step(job_in(State.PAUSED), CRASH, NOW, RULES).actions == (Spawn(),)


# control by signals


def test_by_signals_start_launches_stop_ends_pause_freezes_and_resume_thaws() -> None:
    assert step(DOWN, StartAsked(), NOW, SIGNALS).actions == (Spawn(),)
    assert step(UP, StartAsked(), NOW, SIGNALS) == Step(UP)
    assert step(UP, StopAsked(), NOW, SIGNALS) == Step(Job(Want.DOWN, FORCED, proven=True), (End(),))
    assert step(UP, PauseAsked(), NOW, SIGNALS) == Step(replace(UP, life=Paused(NOW - 10)), (Freeze(),))
    for event in (ResumeAsked(), StartAsked()):
        assert after(UP, PauseAsked(), event, rules=SIGNALS) == Step(UP, (Thaw(),))


def test_by_signals_what_is_so_already_needs_no_signal() -> None:
    assert step(UP, ResumeAsked(), NOW, SIGNALS) == Step(UP)
    assert step(job_in(State.PAUSED), PauseAsked(), NOW, SIGNALS) == Step(job_in(State.PAUSED))


@pytest.mark.parametrize("state", State)
def test_by_signals_a_config_cannot_be_sent(state: State) -> None:
    assert "signals" in step(job_in(state), ConfigAsked(), NOW, SIGNALS).refused


def test_a_pause_by_signal_proves_nothing() -> None:
    resumed = after(job_in(State.STARTING), PauseAsked(), ResumeAsked(), rules=SIGNALS).job
    assert resumed == job_in(State.STARTING)


# config


@pytest.mark.parametrize("state", State)
def test_a_config_goes_to_a_live_job_and_waits_for_any_other(state: State) -> None:
    taken = step(job_in(state), ConfigAsked(), NOW, RULES)
    assert taken == Step(job_in(state), (Send(Command.CONFIG),) if state in LIVE else ())


# the file


@pytest.mark.parametrize("state", [State.STARTING, State.RUNNING, State.PAUSED])
def test_a_changed_spec_gets_a_new_run_and_a_new_chance(state: State) -> None:
    job = job_in(state, failures=3, proven=True)
    taken = step(job, SpecChanged(), NOW, RULES)
    assert taken.actions == (End(),)
    relaunched = step(taken.job, Ended(None, 15), NOW, RULES)
    assert relaunched == Step(Job(Want.UP, Starting(NOW)), (Spawn(),))


@pytest.mark.parametrize("state", [State.BACKOFF, State.FAILED])
def test_a_changed_spec_launches_what_could_not_be_kept_up(state: State) -> None:
    taken = step(job_in(state, failures=5, proven=True), SpecChanged(), NOW, RULES)
    assert taken == Step(Job(Want.UP, Starting(NOW)), (Spawn(),))
    failed = Job(Want.DOWN, Failed(), failures=5)
    assert step(failed, SpecChanged(), NOW, RULES) == Step(Job(Want.DOWN, Failed()))


@pytest.mark.parametrize("state", [State.STOPPED, State.EXITED])
def test_a_changed_spec_of_an_idle_job_has_to_prove_itself_when_it_is_started(state: State) -> None:
    assert step(job_in(state, proven=True), SpecChanged(), NOW, RULES) == Step(job_in(state))


def test_a_changed_spec_ends_a_run_that_was_asked_to_stop_so_that_no_start_revives_the_old_one() -> None:
    taken = after(job_in(State.STOPPING), SpecChanged(), StartAsked(), Read(Command.START))
    assert taken.job == Job(Want.UP, FORCED)


@pytest.mark.parametrize("state", State)
def test_a_withdrawn_job_is_ended_for_good(state: State) -> None:
    taken = step(job_in(state), Withdrawn(), NOW, RULES)
    assert taken.actions == ((End(),) if state in LIVE else ())
    assert after(taken.job, CRASH, Due()).job == DOWN


# the daemon's end


@pytest.mark.parametrize("state", State)
def test_nothing_is_started_once_the_daemon_ends_but_what_was_wanted_is_kept(state: State) -> None:
    job = job_in(state)
    taken = step(job, ShutDown(), NOW, RULES)
    assert taken.actions == ()
    over = step(taken.job, Ended(None, 15), NOW, RULES)
    assert over.actions == ()
    assert over.job.want is job.want
    assert not over.job.is_live and due(over.job, RULES) == math.inf


@pytest.mark.parametrize("later", [RestartAsked(), SpecChanged(), StartAsked(), KillAsked()])
def test_no_verb_brings_a_job_back_that_ends_with_the_daemon(later: policy.Event) -> None:
    ending = after(UP, ShutDown(), later).job
    assert reason(ending, CRASH) is ExitReason.SHUTDOWN
    assert step(ending, CRASH, NOW, RULES).actions == ()


# why a run ended


@pytest.mark.parametrize(
    ("ended", "why"),
    [
        (SUCCESS, ExitReason.COMPLETED),
        (CRASH, ExitReason.CRASHED),
        (Ended(None, 11), ExitReason.SIGNALED),
        (Ended(None, None), ExitReason.UNSTARTED),
    ],
)
def test_a_run_that_nobody_ended_tells_by_its_code_why(ended: Ended, why: ExitReason) -> None:
    assert reason(UP, ended) is why


# any sequence of events


@dataclass
class Run:
    """A process, as the host would hold it."""

    since: float
    mailbox: list[Command] = field(default_factory=list)
    frozen: bool = False
    ending: bool = False
    told_to_stop: bool = False  # by the last command of that kind that it has read
    told_to_pause: bool = False

    def read(self) -> Command:
        command = self.mailbox.pop(0)
        if command in (Command.START, Command.STOP):
            self.told_to_stop = command is Command.STOP
        if command in (Command.START, Command.PAUSE, Command.RESUME):
            self.told_to_pause = command is Command.PAUSE
        return command


RULE_SETS = st.builds(
    Rules,
    restart=st.sampled_from(["on-failure", "always", "never"]),
    start_seconds=st.sampled_from([0.0, 1.0, 30.0]),
    max_failures=st.integers(1, 4),
    first_s=st.sampled_from([0.1, 0.5, 5.0]),
    factor=st.sampled_from([1.0, 2.0, 100.0]),
    max_s=st.sampled_from([5.0, 60.0]),
    jitter=st.sampled_from([0.0, 0.2, 0.9]),
    reset_after_s=st.sampled_from([0.5, 60.0]),
)
OFTEN = [StartAsked, StopAsked, PauseAsked, ResumeAsked]
VERBS = st.sampled_from([*OFTEN, *OFTEN, ConfigAsked, RestartAsked, KillAsked])
ROUNDING_S = 1e-3
LATER_S = 100.0  # by then there was a life to be ended
SPANS = st.sampled_from([0.0, 0.05, 0.4, 1.0, 3.0, 31.0, 61.0, 1e6])


class AnySequenceOfEvents(RuleBasedStateMachine):
    """A job, an operator, and a host on which runs come and go; the clock is an argument."""

    @initialize(rules=RULE_SETS, messages=st.booleans())
    def begin(self, rules: Rules, messages: bool) -> None:
        self.begin_anew(rules, messages)

    @precondition(lambda self: (self.ending or self.withdrawn) and self.run is None)
    @rule(rules=RULE_SETS, messages=st.booleans())
    def begin_anew(self, rules: Rules, messages: bool) -> None:
        self.rules = replace(rules, messages=messages)
        self.job = Job()
        self.now = 0.0
        self.run: Run | None = None
        self.wanted = Want.DOWN  # what the operator last asked for
        self.proven = False  # a run has come up since the file changed, and the policy was told
        self.maybe_proven = False  # one has, whether or not it was told
        self.restarts = 0
        self.ending = self.withdrawn = False

    def take(self, event: policy.Event) -> Step:
        before = self.job
        self.note_up(event)
        taken = step(before, event, self.now, self.rules)
        self.job = taken.job
        if taken.refused:
            assert taken == Step(before, refused=taken.refused)
        unasked = isinstance(event, Due) or (isinstance(event, Ended) and not isinstance(before.life, Stopping))
        for action in taken.actions:
            self.act(action, unasked)
        self.check_life(before)
        return taken

    def note_up(self, event: policy.Event) -> None:
        if self.run is None or self.run.ending:
            return
        beyond_s = self.now - self.run.since - self.rules.start_seconds
        self.maybe_proven = self.maybe_proven or beyond_s >= -ROUNDING_S
        told = isinstance(event, Ended) or (isinstance(event, Due) and self.job.state is State.STARTING)
        if beyond_s >= ROUNDING_S and told and self.job.state in (State.STARTING, State.RUNNING, State.PAUSED):
            self.proven = True

    def act(self, action: policy.Action, unasked: bool) -> None:
        match action:
            case Spawn():
                assert self.run is None, "two live runs of a job"
                assert self.wanted is Want.UP, "a restart of a job that is not wanted"
                assert not self.ending
                self.run = Run(self.now)
                self.restarts += unasked
            case Send(command):
                assert self.run and self.rules.messages
                self.run.mailbox.append(command)
            case End():
                assert self.run
                self.run.ending, self.run.frozen = True, False
            case Freeze() | Thaw():
                assert self.run and not self.run.ending and not self.rules.messages
                self.run.frozen = isinstance(action, Freeze)

    def check_life(self, before: Job) -> None:
        life = self.job.life
        if isinstance(life, Backoff) and life != before.life:
            assert 0 < life.until - self.now <= self.rules.max_s * (1 + self.rules.jitter) + ROUNDING_S
        if isinstance(life, Failed) and not isinstance(before.life, Failed):
            assert self.rules.restart == "never" or not self.proven, "given up though it has been up"

    # the operator

    def open_to_verbs(self) -> bool:
        return not self.withdrawn and (not self.ending or self.run is not None)

    @precondition(open_to_verbs)
    @rule(verb=VERBS)
    def ask(self, verb: type) -> None:
        if verb in (StartAsked, RestartAsked):
            self.wanted = Want.UP
        taken = self.take(verb())
        if verb in (StopAsked, KillAsked) and not taken.refused:
            self.wanted = Want.DOWN

    @precondition(lambda self: not self.ending and not self.withdrawn)
    @rule()
    def autostart(self) -> None:
        if self.job.state is State.STOPPED:
            self.wanted = Want.UP
        self.take(Autostart())

    @precondition(open_to_verbs)
    @rule()
    def change_spec(self) -> None:
        self.proven = self.maybe_proven = False
        self.take(SpecChanged())

    @precondition(lambda self: not self.withdrawn)
    @rule(rules=RULE_SETS)
    def change_rules(self, rules: Rules) -> None:
        self.rules = replace(rules, messages=self.rules.messages)

    @precondition(lambda self: self.now > LATER_S)
    @rule()
    def withdraw(self) -> None:
        self.withdrawn, self.wanted = True, Want.DOWN
        self.take(Withdrawn())

    @precondition(lambda self: self.now > LATER_S)
    @rule()
    def shut_down(self) -> None:
        self.ending = True
        self.take(ShutDown())
        if self.run:
            self.run.ending, self.run.frozen = True, False

    # the host

    @precondition(lambda self: self.run is not None and self.run.mailbox and not self.run.frozen)
    @rule()
    def read_a_command(self) -> None:
        assert self.run
        self.take(Read(self.run.read()))  # it runs, and still has to last to have come up

    @precondition(lambda self: self.run is not None)
    @rule(
        end=st.sampled_from([(0, None), (1, None), (None, 9), (None, 15), (None, None)]),
        jitter=st.floats(-1, 1, allow_nan=False),
    )
    def end(self, end: tuple[int | None, int | None], jitter: float) -> None:
        assert self.run
        ended = Ended(*end, jitter)
        self.note_up(ended)
        self.run = None
        self.take(ended)

    # the clock

    @rule(span_s=SPANS)
    def pass_time(self, span_s: float) -> None:
        self.now += span_s

    @rule()
    def deliver_due_at_any_time(self) -> None:
        before, early = self.job, self.now < due(self.job, self.rules)
        taken = self.take(Due())
        if early:
            assert taken == Step(before)

    @precondition(lambda self: due(self.job, self.rules) < math.inf)
    @rule(late_s=SPANS)
    def deliver_due_in_time(self, late_s: float) -> None:
        state = self.job.state
        self.now = max(self.now, due(self.job, self.rules)) + late_s
        taken = self.take(Due())
        if state is State.BACKOFF:
            assert taken.actions == (Spawn(),)
        else:
            assert self.job.state is State.RUNNING

    # what holds at every moment

    @invariant()
    def a_job_is_live_while_it_has_a_run(self) -> None:
        assert self.job.is_live == (self.run is not None), "a lost exit, or a run that nobody started"

    @invariant()
    def what_is_wanted_is_what_was_last_asked_for(self) -> None:
        assert self.job.want is self.wanted

    @invariant()
    def the_restarts_are_those_that_nobody_asked_for(self) -> None:
        assert self.job.restarts == self.restarts

    @invariant()
    def nothing_is_proven_that_was_never_up(self) -> None:
        assert self.job.proven <= self.maybe_proven

    @invariant()
    def what_waits_has_a_time(self) -> None:
        longest_s = max(60 * 1.9, self.rules.start_seconds)  # the rules may have been others when the wait began
        if self.job.state in (State.STARTING, State.BACKOFF):
            assert due(self.job, self.rules) - self.now <= longest_s

    @invariant()
    def only_a_wanted_job_is_up_or_waits(self) -> None:
        if self.job.state in (State.STARTING, State.RUNNING, State.PAUSED, State.BACKOFF):
            assert self.wanted is Want.UP

    @invariant()
    def a_run_is_stopped_by_signal_exactly_while_its_job_is_paused_by_signal(self) -> None:
        if self.run and not self.rules.messages:
            assert self.run.frozen == (self.job.state is State.PAUSED)

    @invariant()
    def a_wanted_job_that_is_stopping_will_be_back(self) -> None:
        if isinstance(self.job.life, Stopping) and self.wanted is Want.UP:
            assert self.run
            assert self.job.life.forced or Command.START in self.run.mailbox

    @invariant()
    def a_job_that_was_told_to_stop_or_pause_is_known_to_be(self) -> None:
        if self.run and self.rules.messages:
            assert self.job.state is State.STOPPING or not self.run.told_to_stop
            assert self.job.state is State.STOPPING or self.run.told_to_pause == (self.job.state is State.PAUSED)

    @invariant()
    def only_a_run_that_is_being_ended_is_said_to_be(self) -> None:
        if self.run:
            assert self.run.ending == (isinstance(self.job.life, Stopping) and self.job.life.forced)


AnySequenceOfEvents.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestAnySequenceOfEvents = AnySequenceOfEvents.TestCase
