"""Waiting for what real processes will do, up to a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

DEADLINE_S = 40.0  # far beyond what anything takes, also on a machine that is busy with other things
_PAUSE_S = 0.005

T = TypeVar("T")


def until(found: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Return the first true value of `found`; raise AssertionError when there was none in time."""
    deadline = time.monotonic() + deadline_s
    while not (value := found()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(_PAUSE_S)
    return value
