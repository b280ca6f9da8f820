from __future__ import annotations

import datetime
import json
import math
from itertools import pairwise
from typing import Any

import pytest

from harnessd import Command
from harnessd.examples import vol_target
from harnessd.examples.vol_target import CAPITAL_USD, DECAY, Book, Settings, Volatility, VolTarget, read_closes


def reference_volatility(closes: list[float]) -> float:
    returns = [math.log(b / a) for a, b in pairwise(closes)]
    weights = [DECAY ** (len(returns) - 1 - age) for age in range(len(returns))]
    variance = sum(w * r * r for w, r in zip(weights, returns, strict=True)) / sum(weights)
    return math.sqrt(variance) * math.sqrt(252) * 100


@pytest.mark.parametrize("symbol", ["SPX", "IXIC"])
def test_the_shipped_prices_are_ten_years_of_trading_days_in_order(symbol: str) -> None:
    days = read_closes(symbol)
    dates = [datetime.date.fromisoformat(date) for date, _ in days]
    assert (len(days), days[0][0], days[-1][0]) == (2518, "2008-01-02", "2017-12-29")
    assert dates == sorted(set(dates))
    assert all(date.weekday() < 5 for date in dates)
    assert all(abs(math.log(b / a)) < 0.12 for (_, a), (_, b) in pairwise(days))


@pytest.mark.parametrize("days", [2, 3, 30, 250, 1000])
def test_volatility_equals_the_formula_written_out(days: int) -> None:
    closes = [close for _, close in read_closes("SPX")[:days]]
    volatility = Volatility()
    for before, after in pairwise(closes):
        volatility.add(math.log(after / before))
    assert volatility.annualised_percent() == pytest.approx(reference_volatility(closes), rel=1e-9)


def test_volatility_is_unknown_before_the_first_return() -> None:
    assert Volatility().annualised_percent() is None


def test_volatility_of_the_crash_of_2008_is_far_above_that_of_2017() -> None:
    volatility, at = Volatility(), {}
    days = read_closes("SPX")
    for (_, before), (date, after) in pairwise(days):
        volatility.add(math.log(after / before))
        at[date] = volatility.annualised_percent()
    assert 60 < at["2008-10-15"] < 100
    assert at["2017-10-16"] < 10


def test_book_earns_the_days_move_on_yesterdays_position() -> None:
    book, expected, held, before = Book(), 0.0, 0.0, 0.0
    for date, close in read_closes("SPX")[:100]:
        expected += held * (close - before)
        book.mark(date, close)
        book.rebalance(target_vol=10, max_leverage=3)
        held, before = book.position, close
    assert expected != 0
    assert book.pnl == pytest.approx(expected)
    assert book.position * before == pytest.approx(book.leverage * CAPITAL_USD)


def test_leverage_is_capped_and_finite_when_prices_stand_still() -> None:
    book = Book()
    for _ in range(3):
        book.mark("2008-01-02", 100.0)
        book.rebalance(target_vol=4, max_leverage=3)
    assert book.leverage == 3


def test_settings_take_the_valid_and_name_the_invalid() -> None:
    settings = Settings()
    error = settings.change({"target_vol": 7, "step_seconds": -1, "colour": 1, "loop": "no", "max_leverage": math.nan})
    assert settings == Settings(target_vol=7)
    assert error is not None
    assert all(name in error for name in ("step_seconds", "colour", "loop", "max_leverage"))
    assert "target_vol" not in error


@pytest.mark.parametrize("wanted", [None, 4.2, "target_vol", [1], {"target_vol": True}, {"target_vol": "4"}])
def test_settings_refuse_what_is_no_number_in_an_object(wanted: object) -> None:
    settings = Settings()
    assert settings.change(wanted)
    assert settings == Settings()


def test_job_steps_a_day_at_a_time_and_stop_ends_it_with_0(run_scripted: Any) -> None:
    job = run_scripted(VolTarget, [None, None, (Command.STOP, None)], {"step_seconds": 0.5})
    assert job.exit_code == 0
    assert [status["date"] for status in job.statuses] == ["2008-01-02", "2008-01-03", "2008-01-04"]
    assert job.timeouts == [0.5, 0.5, 0.5]
    assert json.loads(json.dumps(job.statuses[-1])) == job.statuses[-1]
    assert set(job.statuses[-1]) >= {"symbol", "date", "close", "realised_vol", "target_vol", "leverage"}
    assert set(job.statuses[-1]) >= {"position", "pnl", "paused", "config_error"}


def test_config_changes_the_leverage_at_once(run_scripted: Any) -> None:
    script = [None, None, (Command.CONFIG, {"target_vol": 8.0})]
    before, after = run_scripted(VolTarget, script, {"target_vol": 4.0}).statuses[-2:]
    assert (before["date"], before["target_vol"], after["target_vol"]) == (after["date"], 4.0, 8.0)
    assert after["leverage"] == pytest.approx(2 * before["leverage"], abs=1e-3)


def test_invalid_config_is_reported_until_a_valid_one_comes(run_scripted: Any) -> None:
    script = [(Command.CONFIG, {"target_vol": -1}), (Command.CONFIG, {"target_vol": 5})]
    first, refused, taken = run_scripted(VolTarget, script).statuses
    assert (first["config_error"], first["target_vol"]) == (None, 4.0)
    assert "target_vol" in refused["config_error"]
    assert (refused["target_vol"], taken["target_vol"], taken["config_error"]) == (4.0, 5.0, None)


@pytest.mark.parametrize("resuming", [Command.RESUME, Command.START])
def test_paused_job_waits_for_ever_until_resumed(run_scripted: Any, resuming: Command) -> None:
    job = run_scripted(VolTarget, [None, (Command.PAUSE, None), (resuming, None), None], {"step_seconds": 0.5})
    assert job.timeouts == [0.5, 0.5, None, 0.5, 0.5]
    assert [status["paused"] for status in job.statuses] == [False, False, True, False, False]
    assert [status["date"][-2:] for status in job.statuses] == ["02", "03", "03", "03", "04"]


def test_without_loop_the_job_ends_with_0_after_the_last_day(run_scripted: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(vol_target, "read_closes", lambda symbol: read_closes(symbol)[:5])
    job = run_scripted(VolTarget, [None] * 5, {"loop": False})
    assert (job.exit_code, len(job.statuses), job.script) == (0, 5, [])


def test_with_loop_the_job_begins_anew_after_the_last_day(run_scripted: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(vol_target, "read_closes", lambda symbol: read_closes(symbol)[:5])
    statuses = run_scripted(VolTarget, [None] * 5).statuses
    assert len(statuses) == 6
    assert statuses[5] == statuses[0]


def test_symbol_is_read_from_the_command_line(run_scripted: Any) -> None:
    status = run_scripted(VolTarget, [], args=("--symbol", "IXIC")).statuses[0]
    assert (status["symbol"], status["close"]) == ("IXIC", 2609.63)


def test_unknown_symbol_is_a_usage_error_naming_the_known(run_scripted: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_scripted(VolTarget, [], args=("--symbol", "XYZ"))
    assert "SPX" in capsys.readouterr().err
