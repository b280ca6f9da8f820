"""Which job is meant: by its name, or by none where that is clear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from harnessd.errors import AmbiguousJob, NoSuchJob
from harnessd.server.nearest import did_you_mean

T = TypeVar("T")


def find(name: str | None, among: Mapping[str, T], default: str | None) -> T:
    """Return the job; without a name the default or only one. Raise NoSuchJob, AmbiguousJob."""
    if name is not None:
        if name not in among:
            raise no_such_job(name, among)
        return among[name]
    if default is not None and default in among:
        return among[default]
    if len(among) == 1:
        return next(iter(among.values()))
    if not among:
        raise NoSuchJob("cannot find a job: there is none")
    names = ", ".join(f"/jobs/{each}" for each in sorted(among)[:10])
    raise AmbiguousJob(f"cannot tell which job is meant: there are {len(among)}; name it: {names}")


def no_such_job(name: str, among: Iterable[str]) -> NoSuchJob:
    """Return the error for a name that no job has, with the nearest that one has."""
    return NoSuchJob(f"cannot find {name[:100]!r}: no such job{did_you_mean(name, among)}", job=name[:100])
