"""One line of the daemon's own log: key=value, or JSON. Standard library only, as the keeper writes such lines too."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

TEXT, JSON = FORMATS = ("text", "json")
_PLAIN = re.compile(r"[^\s\"=\\\x00-\x1f\x7f]+")
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # sd-daemon(3)


def line(format: str, level: str, msg: str, fields: Mapping[str, Any], at: float | None = None) -> str:
    """Return the line without its end. Under journald it has no time, as journald has one, and a priority in front."""
    first: dict[str, Any] = {} if under_journald() else {"time": _iso(time.time() if at is None else at)}
    said = first | {"level": level, "msg": msg} | dict(fields)
    if format == JSON:
        text = json.dumps(said, default=str)
    else:
        text = " ".join(f"{key}={_value(value)}" for key, value in said.items())
    return f"<{_PRIORITIES.get(level, 6)}>{text}" if under_journald() else text


@cache
def under_journald() -> bool:
    """Return whether stderr is the journal: $JOURNAL_STREAM names its device and inode (systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(2)
    except OSError:  # stderr is closed
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _iso(at: float) -> str:
    whole, part = divmod(int(at * 1e6), 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{part:06d}Z"
