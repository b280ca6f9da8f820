"""Every error that harnessd raises.

HarnessError
├── ConfigError            a settings or job file that cannot be used; one line a problem
├── NotAJob                what was handed to main() cannot be run as a job
├── CannotListen           the address is in use or not ours
├── AlreadyRunning         another daemon holds the state directory
├── WireError              what came over a socket is no frame of ours
├── KeeperLost             the keeper is gone, and the runs with it
├── SpawnFailed            the keeper could not make a process
├── StoreError             the database cannot be used
│   ├── NewerSchema        it was written by a later harnessd
│   └── Misplaced          these lines do not begin where those end that are in it
└── Refused                a request that cannot be carried out; `kind` names why
    ├── BadRequest         it cannot be parsed
    ├── Unauthorized       a token is needed, or was wrong
    ├── Forbidden          whoever asks may not
    ├── NoSuchJob          no job has that name
    ├── NoSuchRun          nothing of that run is kept
    ├── NoSuchRoute        no route has that path
    ├── WrongState         the job's state does not allow it
    ├── AmbiguousJob       several jobs, and none was named
    ├── NotPython          the job's process has no Python stack
    ├── MailboxClosed      the job cannot be sent messages
    ├── NotRead            the job did not read the command in time
    ├── TooLarge           more data than fits
    ├── BadData            it parses, and means nothing
    ├── MailboxFull        the job has too many unread commands
    └── Unavailable        the daemon cannot do it now
"""

from __future__ import annotations

from collections.abc import Iterable


class HarnessError(Exception):
    """The root of harnessd's errors."""


class ConfigError(HarnessError):
    """A settings or job file that cannot be used; `problems` has one line for each thing wrong."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class NotAJob(HarnessError):
    """What was handed over cannot be run as a job."""


class CannotListen(HarnessError):
    """The address is in use, or not one of this host's."""


class AlreadyRunning(HarnessError):
    """Another daemon holds the state directory."""


class WireError(HarnessError):
    """What came over a socket is no frame of ours."""


class KeeperLost(HarnessError):
    """The keeper is gone, and every run with it."""


class SpawnFailed(HarnessError):
    """The keeper could not make a process of the job."""


class StoreError(HarnessError):
    """The database cannot be used."""


class NewerSchema(StoreError):
    """The database was written by a later harnessd."""


class Misplaced(StoreError):
    """What was read of a journal does not follow on what is stored: up to `offset`, which is behind `lines` lines."""

    def __init__(self, run: int, since: int, offset: int, lines: int) -> None:
        super().__init__(f"cannot store the lines of run {run} from byte {since} on: it is stored up to byte {offset}")
        self.offset = offset
        self.lines = lines


class Refused(HarnessError):
    """A request that cannot be carried out. `job` and `state` are set where they apply."""

    kind = "refused"

    def __init__(self, message: str, *, job: str | None = None, state: str | None = None) -> None:
        super().__init__(message)
        self.job = job
        self.state = state


class BadRequest(Refused):
    kind = "bad-request"


class Unauthorized(Refused):
    kind = "unauthorized"


class Forbidden(Refused):
    kind = "forbidden"


class NoSuchJob(Refused):
    kind = "no-such-job"


class NoSuchRun(Refused):
    kind = "no-such-run"


class NoSuchRoute(Refused):
    kind = "no-such-route"


class WrongState(Refused):
    kind = "wrong-state"


class AmbiguousJob(Refused):
    kind = "ambiguous-job"


class NotPython(Refused):
    kind = "not-python"


class MailboxClosed(Refused):
    kind = "mailbox-closed"


class NotRead(Refused):
    kind = "not-read"


class TooLarge(Refused):
    kind = "too-large"


class BadData(Refused):
    kind = "bad-data"


class MailboxFull(Refused):
    kind = "mailbox-full"


class Unavailable(Refused):
    kind = "unavailable"
