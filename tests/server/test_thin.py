from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from harnessd.server.tape import Line
from harnessd.server.thin import Pace, thin

RUN = 7
SECOND_US = 1_000_000


def statuses(first: int, count: int, at_us: int = 0, span_us: int = 0) -> list[Line]:
    return [
        Line(RUN, first + number, at_us + span_us * number // max(1, count - 1), "status", "1")
        for number in range(count)
    ]


def seqs(lines: list[Line]) -> list[int]:
    return [line.seq for line in lines if line.kind == "status"]


def test_a_job_within_its_rate_is_not_thinned() -> None:
    pace = Pace(RUN)
    for second in range(10):
        lines = statuses(second * 200, 200, second * SECOND_US, 995_000)
        result = thin(lines, 200, pace)
        assert (result.lines, result.dropped) == (lines, 0)
        pace = result.pace


def test_first_last_and_evenly_between_are_kept() -> None:
    result = thin(statuses(1, 901), 10, Pace(RUN))
    assert seqs(result.lines) == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    assert result.dropped == 891


def test_a_backlog_of_many_seconds_is_thinned_over_all_of_them() -> None:
    result = thin(statuses(1, 10_000, 0, 99 * SECOND_US), 10, Pace(RUN))
    assert len(seqs(result.lines)) == 1000


def test_the_gap_is_told_of_with_its_count_when_the_storm_is_over() -> None:
    first = thin(statuses(1, 100), 10, Pace(RUN))
    assert all(line.kind == "status" for line in first.lines)
    after = thin(statuses(101, 1, 5 * SECOND_US), 10, first.pace)
    gap = after.lines[-1]
    assert (gap.kind, json.loads(gap.text)) == ("gap", {"count": 90, "first_seq": 2, "last_seq": 99})
    assert not thin(statuses(102, 1, 6 * SECOND_US), 10, after.pace).lines[1:]


def test_in_a_long_storm_a_gap_is_told_of_every_ten_seconds() -> None:
    pace, gaps = Pace(RUN), list[Line]()
    for tick in range(600):
        result = thin(statuses(tick * 100, 100, tick * 50_000, 49_000), 100, pace)
        pace = result.pace
        gaps += [line for line in result.lines if line.kind == "gap"]
    assert len(gaps) == 2


def test_a_gap_is_told_of_at_the_end_though_nothing_more_is_said() -> None:
    storm = thin(statuses(1, 100), 10, Pace(RUN))
    (gap,) = thin([], 10, storm.pace, final=True).lines
    assert json.loads(gap.text)["count"] == 90


def test_without_a_rate_nothing_is_left_out() -> None:
    pace = Pace(RUN)
    for _ in range(3):
        result = thin(statuses(1, 1000), math.inf, pace)
        pace = result.pace
        assert result.dropped == 0


def test_what_is_no_status_is_never_left_out() -> None:
    lines = [line._replace(kind="ack") for line in statuses(1, 100)]
    assert thin(lines, 1, Pace(RUN)).lines == lines


@given(
    batches=st.lists(st.tuples(st.integers(1, 80), st.integers(-2 * SECOND_US, 3 * SECOND_US)), max_size=20),
    rate=st.integers(1, 50),
)
def test_the_newest_is_kept_and_nothing_vanishes_uncounted(batches: list[tuple[int, int]], rate: int) -> None:
    pace, said, stored, counted, at_us = Pace(RUN), 0, 0, 0, 10 * SECOND_US
    for count, step_us in batches:
        at_us = max(0, at_us + step_us)
        lines = statuses(said + 1, count, at_us, 50_000)
        said += count
        result = thin(lines, rate, pace)
        pace = result.pace
        assert seqs(result.lines)[-1] == said
        assert seqs(result.lines) == sorted(set(seqs(result.lines)))
        stored += len(seqs(result.lines))
        counted += sum(json.loads(line.text)["count"] for line in result.lines if line.kind == "gap")
    counted += sum(json.loads(line.text)["count"] for line in thin([], rate, pace, final=True).lines)
    assert stored + counted == said
