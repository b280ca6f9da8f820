"""What a command comes to: its exit code, and what is said of it on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum


class Code(IntEnum):
    """Exit codes."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NO_SUCH_JOB = 3
    UNREACHABLE = 4
    REFUSED = 5
    INTERRUPTED = 130


class Failure(Exception):
    """Ends the command with this code; the message may have several lines."""

    def __init__(self, code: Code, message: str = "") -> None:
        super().__init__(message)
        self.code = code


def code_of(status: int, kind: str = "") -> Code:
    """Return what an HTTP status comes to."""
    if status < 400:
        return Code.DONE
    if status == 404:
        return Code.NO_SUCH_JOB if kind == "no-such-job" else Code.FAILED
    if status in (400, 422):
        return Code.USAGE
    return Code.REFUSED if status < 500 else Code.FAILED


def worst(codes: Iterable[Code]) -> Code:
    """Return the code of several outcomes: that of those that failed if they have one in common."""
    failed = set(codes) - {Code.DONE}
    return failed.pop() if len(failed) == 1 else Code.FAILED if failed else Code.DONE
