"""Which jobs a command is about: names, globs, a tag, all of them, or none named at all."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from fnmatch import fnmatchcase

from harnessd.cli.client import Client, quoted
from harnessd.cli.outcome import Code, Failure


@dataclass(frozen=True, slots=True)
class Chosen:
    """Names; or every job, maybe with a tag; or with neither whichever the daemon takes when none is named."""

    names: tuple[str, ...] = ()
    every: bool = False
    tag: str | None = None
    picked: bool = False  # by the daemon's list: nobody has named each of them

    def paths(self, verb: str) -> list[str]:
        """Return the routes of the verb for these jobs."""
        if self.every:
            return [f"/jobs/all/{verb}"]
        return [f"/jobs/{quoted(name)}/{verb}" for name in self.names] or [f"/{verb}"]

    def check(self, found: Sized) -> None:
        """Raise Failure when the daemon has found no job with the tag."""
        if self.tag is not None and not found:
            raise Failure(Code.NO_SUCH_JOB, f"cannot find a job with tag {self.tag!r}: there is none")


def choose(client: Client, names: Sequence[str] | None, tag: str | None = None, every: bool = False) -> Chosen:
    """Return what is meant. Raises Failure for a glob that matches no job, and for names beside --all."""
    wanted = tuple(dict.fromkeys(names or ()))
    if every and (wanted or tag is not None):
        raise Failure(Code.USAGE, "cannot use --all beside names or --tag: it means every job")
    if "all" in wanted:
        raise Failure(Code.USAGE, "cannot use 'all' as a name: it is no job's; say --all for every job")
    if every or (tag is not None and not wanted):
        return Chosen(every=True, tag=tag, picked=True)
    if tag is None and not any(map(_is_glob, wanted)):
        return Chosen(wanted)
    found = dict.fromkeys(name for each in wanted for name in _matching(client, each, tag))
    return Chosen(tuple(found), picked=True)


def _is_glob(name: str) -> bool:
    return any(char in name for char in "*?[")


def _matching(client: Client, pattern: str, tag: str | None) -> list[str]:
    listed = [job["name"] for job in client.get("/jobs", {"tag": tag}).data["jobs"]]
    found = [name for name in listed if fnmatchcase(name, pattern)]
    if not found:
        among = f" with tag {tag!r}" if tag is not None else ""
        raise Failure(Code.NO_SUCH_JOB, f"cannot find {pattern!r}: no job{among} matches")
    return found


def default_job(client: Client) -> str:
    """Return the job that is meant when none is named. Raises Failure when there is no such one."""
    answer = client.ask("GET", "/hb")
    return str((answer if answer.status == 503 and "job" in answer.data else answer.check()).data["job"])
