"""The keeper's own few lines on stderr."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from harnessd import logline

_formats: list[str] = []  # none in a user's script, whose terminal this is


def use(format: str) -> None:
    """Write lines of the daemon's log from now on."""
    _formats[:] = [format]


def say(level: str, msg: str, **fields: Any) -> None:
    """Write a line, if anybody reads it."""
    if _formats:
        text = logline.line(_formats[0], level, msg, fields)
    else:
        text = " ".join(["harnessd:", msg, *(f"{key}={value}" for key, value in fields.items())])
    with suppress(OSError, ValueError):  # stderr is closed or full; the runs matter more
        print(text, file=sys.stderr, flush=True)
