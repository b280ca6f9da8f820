"""Whether the storage works, since when, and when to try it again."""

from __future__ import annotations

import time
from dataclasses import dataclass

RETRY_SECONDS = (0.1, 5.0)  # the first wait after a failure and the longest
CALM_SECONDS = 30.0  # after so long without a failure the first wait is used again


@dataclass(slots=True)
class Health:
    error: str | None = None
    since_us: int | None = None  # of the first failure, while it lasts
    retry_at: float = 0.0  # monotonic
    commits: int = 0
    commit_s_sum: float = 0.0
    commit_s_last: float = 0.0
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
        since_us, self.since_us, self.error = self.since_us, None, None
        return since_us

    def report(self) -> dict[str, object]:
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
