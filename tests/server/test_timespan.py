from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harnessd.errors import BadRequest
from harnessd.server.timespan import LATEST_US, iso, moment_us, span_us

NOW_US = 1_768_471_200_000_000  # 2026-01-15T10:00:00Z


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("now", 0),
        ("-15m", -900),
        ("-1.5h", -5400),
        ("-500ms", -0.5),
        ("-7d", -604_800),
        ("-1w", -604_800),
        ("2026-01-15T10:00:00Z", 0),
        ("2026-01-15T10:00:01", 1),
        ("2026-01-15 10:00", 0),
        ("2026-01-15T11:00:00+01:00", 0),
        ("2026-01-15T11:00:00.5 01:00", 0.5),
        ("2026-01-15", -36_000),
        ("20260115T100000Z", 0),
        ("1768471200", 0),
        ("1768471200.000001", 0.000001),
    ],
)
def test_a_moment_is_iso_epoch_or_a_time_ago(text: str, seconds: float) -> None:
    assert moment_us(text, NOW_US, "since") == NOW_US + round(seconds * 1e6)


@pytest.mark.parametrize(
    "text", ["", "-", "soon", "-15", "-15y", "1768471200000", "2026-13-01", "10000-01-01", "²", "1 ", "-1e3s"]
)
def test_what_is_no_moment_is_refused_by_the_parameters_name(text: str) -> None:
    with pytest.raises(BadRequest, match="cannot use until="):
        moment_us(text, NOW_US, "until")


def test_a_length_without_its_minus_gets_a_hint() -> None:
    with pytest.raises(BadRequest, match="did you mean '-15m'"):
        moment_us("15m", NOW_US, "since")


def test_further_back_than_the_epoch_is_the_epoch() -> None:
    assert moment_us("-999999999w", NOW_US, "since") == 0
    assert moment_us("1969-12-31", NOW_US, "since") == 0


@pytest.mark.parametrize(("text", "us"), [("60s", 60_000_000), ("500ms", 500_000), ("1.5h", 5_400_000_000)])
def test_a_length_has_a_unit(text: str, us: int) -> None:
    assert span_us(text, "every") == us


@pytest.mark.parametrize("text", ["60", "0s", "-60s", "", "s", "1 h"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="cannot use every="):
        span_us(text, "every")


@given(st.integers(0, LATEST_US - 1))
def test_every_moment_is_read_back_to_the_microsecond(at_us: int) -> None:
    assert moment_us(iso(at_us), 0, "at") == at_us
