"""When somebody is told: the edges, with a clock that the test moves."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from harnessd.server.notice_body import LINES, as_lines, headline, message
from harnessd.server.notices import TROUBLES, Edge, Edges, Fact, NoticeKind
from harnessd.server.unsure import Unsure
from harnessd.states import State

S = 1_000_000
ALL: tuple[NoticeKind, ...] = (*TROUBLES, "recovered", "exited", "stopped", "started")
USUAL: tuple[NoticeKind, ...] = ("failed", "backoff", "oom", "hung", "unhealthy", "recovered")


class Told:
    """One receiver, and a job by what happens to it."""

    def __init__(self, on: tuple[NoticeKind, ...] = USUAL, remind_s: int | None = None) -> None:
        self.now_us = 0
        self.over: list[int] = []
        self.edges = Edges(on, remind_s * S if remind_s else None, count(1).__next__)

    def _kinds(self, step: Any) -> list[tuple[str, ...]]:
        self.over += step.over
        return [edge.kinds for edge in step.edges]

    def see(self, state: State, failures: int = 0, run: int | None = 1, oom: bool = False) -> list[tuple[str, ...]]:
        self.now_us += S
        return self._kinds(self.edges.see(Fact("feed", state, failures, run, oom), self.now_us))

    def happened(self, event: str, run: int = 1) -> list[tuple[str, ...]]:
        self.now_us += S
        return self._kinds(self.edges.happened("feed", event, run, self.now_us))

    def remind(self, after_s: int) -> list[Edge]:
        self.now_us += after_s * S
        step = self.edges.remind(self.now_us)
        self.over += step.over
        return step.edges


def test_a_flapping_job_is_told_of_once_until_its_failures_are_forgotten() -> None:
    told = Told()
    found = [told.see(State.RUNNING)]
    for failures in range(1, 50):
        found += [told.see(State.BACKOFF, failures), told.see(State.STARTING, failures)]
        found += [told.see(State.RUNNING, failures)]
    assert [kinds for kinds in found if kinds] == [[("backoff",)]]
    assert told.see(State.RUNNING, 0) == [("recovered",)]
    assert told.over == [1]


def test_more_of_a_trouble_is_told_as_it_comes() -> None:
    told = Told()
    assert told.see(State.BACKOFF, 1) == [("backoff",)]
    assert told.see(State.FAILED, 5) == [("failed",)]
    assert told.see(State.FAILED, 5) == []
    assert told.see(State.STARTING, 0) == [], "it is started, not yet proven"
    assert told.see(State.RUNNING, 0) == [("recovered",)]
    assert told.over == [1, 2]


def test_what_comes_at_once_is_one_notice() -> None:
    told = Told(ALL)
    told.see(State.RUNNING)
    assert told.see(State.BACKOFF, 1, oom=True) == [("oom", "backoff", "crashed")]


def test_a_recovery_is_told_to_those_who_were_told_of_the_trouble() -> None:
    told = Told(("failed", "recovered"))
    assert told.see(State.BACKOFF, 1) == []
    assert told.see(State.RUNNING, 0) == []


def test_a_trouble_outlasts_a_stop_and_ends_with_a_run_that_is_well() -> None:
    told = Told()
    told.see(State.BACKOFF, 1)
    assert told.see(State.STOPPED, 0, run=None) == []
    assert told.see(State.RUNNING, 0, run=2) == [("recovered",)]


def test_to_complete_is_to_recover() -> None:
    told = Told((*USUAL, "exited"))
    told.see(State.BACKOFF, 1)
    assert told.see(State.EXITED) == [("recovered",), ("exited",)]


def test_a_hang_is_over_when_it_is_said_or_another_run_is_well() -> None:
    told = Told()
    told.see(State.RUNNING)
    assert told.happened("hung") == [("hung",)]
    assert told.happened("hung") == []
    assert told.see(State.RUNNING) == [], "it is the same run"
    assert told.happened("hung-over") == [("recovered",)]
    told.happened("hung")
    assert told.see(State.RUNNING, 0, run=2) == [("recovered",)]
    assert told.happened("unhealthy", 2) == [("unhealthy",)]
    assert told.happened("healthy", 2) == [("recovered",)]


def test_one_trouble_of_two_is_no_recovery() -> None:
    told = Told()
    told.happened("hung")
    told.happened("unhealthy")
    assert told.happened("healthy") == []
    assert told.over == [2]
    assert told.happened("hung-over") == [("recovered",)]


def test_changes_of_state_are_told_but_not_what_a_server_finds_when_it_begins() -> None:
    told = Told(ALL)
    assert told.see(State.EXITED) == []
    assert told.see(State.STARTING) == [("started",)]
    told.see(State.RUNNING)
    assert told.see(State.STOPPING) == []
    assert told.see(State.STOPPED, run=None) == [("stopped",)]
    assert told.see(State.STOPPED, run=None) == []
    told.see(State.STARTING)
    assert told.see(State.EXITED) == [("exited",)]


def test_what_lasts_is_told_again_and_again_until_it_is_over_or_the_job_is_stopped() -> None:
    told = Told(remind_s=60)
    told.see(State.BACKOFF, 1)
    assert told.remind(59) == []
    (edge,) = told.remind(1)
    assert edge == Edge(2, "feed", "backoff", ("backoff",), S, reminder=True)
    assert told.over == [1], "the reminder stands for what it reminds of"
    assert told.remind(1) == []
    assert len(told.remind(60)) == 1
    told.see(State.STOPPED, run=None)
    assert told.remind(600) == []
    told.see(State.RUNNING)
    assert told.over == [1, 2, 3]
    assert told.remind(600) == []


def test_a_clock_that_is_set_back_puts_reminders_off_no_longer_than_usual() -> None:
    told = Told(remind_s=60)
    told.now_us = 24 * 3600 * S
    told.see(State.FAILED, 1)
    assert told.remind(-24 * 3600) == []
    assert told.remind(59) == []
    assert len(told.remind(1)) == 1


def test_without_remind_nothing_is_told_twice() -> None:
    told = Told()
    told.see(State.FAILED)
    assert told.remind(10**9) == []


def test_what_an_earlier_server_has_told_is_not_told_again_and_its_end_is() -> None:
    told = Told()
    told.edges.restore(Edge(7, "feed", "backoff", ("backoff",), 5), 5, None)
    assert told.see(State.BACKOFF, 3) == []
    assert told.see(State.RUNNING) == [("recovered",)]
    assert told.over == [7]


def test_a_job_that_is_gone_leaves_nothing() -> None:
    told = Told()
    told.see(State.FAILED)
    assert told.edges.removed("feed").over == [1]
    assert told.edges.removed("feed") == ([], [])
    assert told.see(State.RUNNING) == []


@given(st.lists(st.tuples(st.sampled_from(State), st.integers(0, 3), st.integers(1, 3), st.booleans())))
def test_every_trouble_is_told_once_before_it_is_over(facts: list[tuple[State, int, int, bool]]) -> None:
    told = Told(ALL)
    open_kinds: set[str] = set()
    given_ids = 0
    for state, failures, run, oom in facts:
        for kinds in told.see(state, failures, run, oom):
            given_ids += 1
            if kinds == ("recovered",):
                assert open_kinds
                open_kinds.clear()
            elif set(kinds) <= set(TROUBLES):
                assert open_kinds.isdisjoint(kinds)
                open_kinds |= set(kinds)
    assert sorted(told.over) == sorted(set(told.over))


def test_a_hang_that_an_earlier_server_found_is_over_when_the_run_polls_again() -> None:
    def entry(polls: int, hung: bool = False, run: int = 5) -> Any:
        live = SimpleNamespace(run=run, ended=False, watch=SimpleNamespace(hung=hung), beat=lambda: (polls, False))
        return SimpleNamespace(name="feed", live=live, checked=None)

    unsure = Unsure()
    unsure.add(entry(9), 5, ["hung"])
    assert list(unsure.over(lambda _: entry(9))) == []
    assert list(unsure.over(lambda _: entry(10))) == [("feed", 5, "hung-over")]
    assert list(unsure.over(lambda _: entry(11))) == []
    for other in (entry(9, hung=True), entry(10, run=6), None):
        unsure.add(entry(9), 5, ["hung"])
        assert list(unsure.over(lambda _, other=other: other)) == []
        assert list(unsure.over(lambda _: entry(10))) == [], "it is another's to say"


# what is said


def notice(**more: Any) -> dict[str, Any]:
    ending = {"code": 1, "signal": None, "reason": "crashed"}
    base = {"job": "feed-eu", "kind": "failed", "kinds": ["failed"], "reminder": False, "exit": ending, "restarts": 5}
    return base | {"since": "2026-01-15T12:00:00.000000Z", "why": None, "status": None, "log": []} | more


def test_the_text_says_who_where_what_and_why() -> None:
    assert headline("host1", notice()) == "feed-eu on host1: failed (exit code 1, 5 restarts)"
    reminder = notice(reminder=True, exit={"code": None, "signal": "SIGKILL", "reason": "oom"}, restarts=0)
    assert headline("host1", reminder) == "feed-eu on host1: still failed since 2026-01-15T12:00:00Z (SIGKILL)"
    hung = notice(kind="hung", kinds=["hung"], why="it has not polled for 30 s", restarts=0)
    assert headline("host1", hung) == "feed-eu on host1: hung (it has not polled for 30 s)"


def test_the_text_has_status_and_output_and_calls_nobody() -> None:
    one = notice(status={"at": "<!channel>"}, log=["a & b", "```<!here>"])
    text = message("h", [one], 0)["text"]
    assert text.splitlines()[1:] == [
        'status: {"at": "&lt;!channel&gt;"}',
        "```",
        "a &amp; b",
        "'''&lt;!here&gt;",
        "```",
    ]
    assert message("h", [one] * 4, 0)["text"].splitlines() == [headline("h", one)] * 4


def test_output_is_shown_as_a_person_would_have_seen_it() -> None:
    data = b"\x1b[31mred\x1b[0m\r\n10%\r99%\n\x1b]8;;http://x\x07link\x1b]8;;\x07\nbell\x07 \xff\n\n"
    assert as_lines(data) == ["red", "99%", "link", "bell \N{REPLACEMENT CHARACTER}"]
    assert as_lines(b"") == as_lines(b"\n\n") == []
    assert as_lines(b"\n".join(b"%d" % number for number in range(50))) == [str(n) for n in range(40, 50)]


@given(st.binary())
def test_no_output_is_too_odd(data: bytes) -> None:
    lines = as_lines(data)
    assert len(lines) <= LINES
    assert all(line.replace("\t", "").isprintable() for line in lines)
