"""The keeper's own few lines on stderr."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import Any

from harnessd import logline

_STDERR = 2
_MAX_BYTES = select.PIPE_BUF  # a pipe that has room for anything has room for these
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
    with suppress(OSError):  # stderr is closed
        reader = select.poll()
        reader.register(_STDERR, select.POLLOUT)
        if reader.poll(0):  # to wait for whoever reads the log would hold up the runs
            os.write(_STDERR, text.encode(errors="replace")[: _MAX_BYTES - 1] + b"\n")
