"""A strategy that holds an index at a constant volatility, replayed over real daily closing prices.

Each step is one trading day. The realised volatility is the exponentially weighted one of RiskMetrics (J.P. Morgan,
1996) with its weights normalised, annualised and in per cent. The leverage is target_vol / realised_vol, capped; the
position is taken at the day's close and earns until the next.

The prices (`data/*.csv`: S&P 500 as SPX, NASDAQ Composite as IXIC) come from the Python package arch; see
`data/README.md`. CONFIG takes `target_vol`, `step_seconds`, `max_leverage` and `loop`.
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import dataclass
from pathlib import Path

from harnessd import Command, Cradle

DATA = Path(__file__).parent / "data"
DECAY = 0.94
TRADING_DAYS_A_YEAR = 252
CAPITAL_USD = 1_000_000.0
HIGHEST = {"target_vol": 100.0, "step_seconds": 60.0, "max_leverage": 20.0}


@dataclass
class Settings:
    target_vol: float = 4.0  # annualised, per cent
    step_seconds: float = 0.25
    max_leverage: float = 3.0
    loop: bool = True  # begin again after the last day

    def change(self, wanted: object) -> str | None:
        """Takes every valid value of `wanted`; returns what is wrong with the others, or None."""
        if not isinstance(wanted, dict):
            return f"settings must be an object, not {wanted!r}"
        return "; ".join(filter(None, (self._change_one(name, value) for name, value in wanted.items()))) or None

    def _change_one(self, name: str, value: object) -> str | None:
        if name == "loop" and isinstance(value, bool):
            self.loop = value
        elif name == "loop":
            return f"loop must be true or false, not {value!r}"
        elif name not in HIGHEST:
            return f"unknown setting {name!r}"
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= HIGHEST[name]:
            return f"{name} must be a number above 0 and at most {HIGHEST[name]:g}, not {value!r}"
        else:
            setattr(self, name, float(value))
        return None


class Volatility:
    """Exponentially weighted volatility of the daily returns seen so far."""

    def __init__(self) -> None:
        self._squares = 0.0
        self._weights = 0.0

    def add(self, log_return: float) -> None:
        self._squares = DECAY * self._squares + log_return**2
        self._weights = DECAY * self._weights + 1

    def annualised_percent(self) -> float | None:
        """None before the first return."""
        return 100 * math.sqrt(TRADING_DAYS_A_YEAR * self._squares / self._weights) if self._weights else None


class Book:
    """What is held of the index, and what it earned."""

    def __init__(self) -> None:
        self.volatility = Volatility()
        self.date = ""
        self.close: float | None = None
        self.leverage = 0.0
        self.position = 0.0  # units of the index
        self.pnl = 0.0  # USD since the first day

    def mark(self, date: str, close: float) -> None:
        """Books the day's gain on the position held so far."""
        if self.close is not None:
            self.pnl += self.position * (close - self.close)
            self.volatility.add(math.log(close / self.close))
        self.date, self.close = date, close

    def rebalance(self, target_vol: float, max_leverage: float) -> None:
        """Holds as much at the day's close as `target_vol` (annualised, per cent) asks for."""
        realised = self.volatility.annualised_percent()
        if realised is None or self.close is None:
            return
        self.leverage = min(max_leverage, target_vol / realised) if realised else max_leverage
        self.position = CAPITAL_USD * self.leverage / self.close


def read_closes(symbol: str) -> list[tuple[str, float]]:
    """(ISO date, closing price) of each trading day, oldest first."""
    with (DATA / f"{symbol.lower()}.csv").open(newline="") as file:
        return [(row["date"], float(row["close"])) for row in csv.DictReader(file)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Replays an index held at a constant volatility.")
    symbols = sorted(path.stem.upper() for path in DATA.glob("*.csv"))
    parser.add_argument("--symbol", choices=symbols, default="SPX")
    return parser.parse_args()


class VolTarget(Cradle):
    def run(self, *args: str) -> int:
        self.symbol: str = parse_arguments().symbol
        self.settings = Settings()
        self.config_error = self.settings.change(self.get_config())
        self.paused = False
        closes = read_closes(self.symbol)
        while True:
            self.book = Book()
            for date, close in closes:
                self.book.mark(date, close)
                self.report()
                if not self.wait_for_next_day():
                    return 0
            if not self.settings.loop:
                return 0

    def wait_for_next_day(self) -> bool:
        """Waits one step, or as long as it is paused, and obeys what comes meanwhile; False after a STOP."""
        while msg := self.get_msg(timeout=None if self.paused else self.settings.step_seconds):
            match msg["cmd"]:
                case Command.STOP:
                    return False
                case Command.PAUSE:
                    self.paused = True
                case Command.START | Command.RESUME:
                    self.paused = False
                case Command.CONFIG:
                    self.config_error = self.settings.change(msg["data"])
            self.report()
        return True

    def report(self) -> None:
        book = self.book
        book.rebalance(self.settings.target_vol, self.settings.max_leverage)
        realised_vol = book.volatility.annualised_percent()
        self.set_status(
            status={
                "symbol": self.symbol,
                "date": book.date,
                "close": book.close,
                "realised_vol": None if realised_vol is None else round(realised_vol, 4),
                "target_vol": self.settings.target_vol,
                "leverage": round(book.leverage, 4),
                "position": round(book.position, 4),
                "pnl": round(book.pnl, 2),
                "paused": self.paused,
                "config_error": self.config_error,
            }
        )
