"""Whether the storage works, since when, and when to try it again."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate

from harnessd.server.shapes import Storage

RETRY_SECONDS = (0.1, 5.0)  # the first wait after a failure and the longest
CALM_SECONDS = 30.0  # after so long without a failure the first wait is used again
COMMIT_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class CommitTimes:
    """How many commits took at most each of COMMIT_BOUNDS_S, and how many there were; and how long all of them took."""

    counts: tuple[int, ...]
    sum_s: float


@dataclass(slots=True)
class Health:
    error: str | None = None
    since_us: int | None = None  # of the first failure, while it lasts
    retry_at: float = 0.0  # monotonic
    commits: int = 0
    commit_s_sum: float = 0.0
    commit_s_last: float = 0.0
    _took: list[int] = field(default_factory=lambda: [0] * (len(COMMIT_BOUNDS_S) + 1))
    _committed_at: float | None = None
    _failed_at: float = float("-inf")
    _delay_s: float = RETRY_SECONDS[0]

    def failed(self, error: BaseException) -> bool:
        """Note a failure; return whether it is the first of a row."""
        now, first = time.monotonic(), self.error is None
        calm = now - self._failed_at > CALM_SECONDS
        self._delay_s = RETRY_SECONDS[0] if calm else min(self._delay_s * 2, RETRY_SECONDS[1])
        self._failed_at, self.retry_at = now, now + self._delay_s
        self.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.since_us = time.time_ns() // 1000 if first else self.since_us
        return first

    def committed(self, began: float) -> int | None:
        """Note a commit that began then (monotonic); return since when there were failures, if it ends them."""
        self._committed_at = time.monotonic()
        self.commit_s_last = self._committed_at - began
        self.commit_s_sum += self.commit_s_last
        self.commits += 1
        self._took[bisect_left(COMMIT_BOUNDS_S, self.commit_s_last)] += 1
        since_us, self.since_us, self.error = self.since_us, None, None
        return since_us

    def commit_times(self) -> CommitTimes:
        return CommitTimes(tuple(accumulate(self._took)), self.commit_s_sum)

    def report(self) -> Storage:
        """Return the figures. `last_commit_s` is how long ago the last commit was, None before the first."""
        return {
            "ok": self.error is None,
            "error": self.error,
            "since_us": self.since_us,
            "last_commit_s": None if self._committed_at is None else round(time.monotonic() - self._committed_at, 3),
            "commits": self.commits,
            "commit_s_sum": round(self.commit_s_sum, 6),
            "commit_s_last": round(self.commit_s_last, 6),
        }
