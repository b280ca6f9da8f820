"""One request as a handler sees it, and the answers handlers give."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from starlette.responses import Response
from starlette.types import Receive, Scope

from harnessd.errors import BadRequest
from harnessd.server.entry import Entry
from harnessd.server.finding import find, no_such_job
from harnessd.server.health import CommitTimes
from harnessd.server.shapes import Health
from harnessd.server.supervisor import Supervisor
from harnessd.server.tally import Tally
from harnessd.server.tokens import TokenReader
from harnessd.web.body import command_data, duration, read_body
from harnessd.web.follow import Followers
from harnessd.web.guard import Visitor

if TYPE_CHECKING:
    from harnessd.server.history import History  # loads SQL, which a script does without

ALL = "all"  # in place of a name: every job
_NO_DATA = frozenset(("wait",))  # query parameters that are no data of a command
_NO_DATA_OF_ALL = _NO_DATA | {"tag", "state"}


def _sound() -> str | None:
    return None


@dataclass(frozen=True)
class Context:
    """What all requests share."""

    supervisor: Supervisor
    health: Callable[[], Health]
    max_body_bytes: int
    storage_error: Callable[[], str | None] = _sound  # why nothing can be stored now
    reload: Callable[[str], Awaitable[dict[str, Any]]] | None = None  # takes the actor
    history: History | None = None
    followers: Followers | None = None
    commit_times: Callable[[], CommitTimes] | None = None
    tally: Tally = field(default_factory=Tally)
    tokens: TokenReader | None = None  # those that were made; beside the one in the settings
    stopping: asyncio.Event = field(default_factory=asyncio.Event)  # answers that have no end must end now


class Call:
    """A request that has been let in."""

    def __init__(self, context: Context, scope: Scope, receive: Receive) -> None:
        self.supervisor = context.supervisor
        self.context = context
        self.scope = scope
        self.visitor: Visitor = scope["state"]["visitor"]
        self._receive = receive
        self._body: bytes | None = None

    @property
    def actor(self) -> str:
        return self.visitor.actor

    @cached_property
    def entry(self) -> Entry:
        """The job that the path names; without one the default or only job."""
        return self.find(self.scope["path_params"].get("name"))

    def entries(self) -> Iterable[Entry]:
        """Return the jobs that the visitor may see."""
        entries = self.supervisor.entries()
        return entries if self.visitor.jobs is None else [entry for entry in entries if self.visitor.sees(entry.name)]

    def find(self, name: str | None) -> Entry:
        """Return the job, as if there were only those that the visitor may see. Raises NoSuchJob, AmbiguousJob."""
        if self.visitor.jobs is None:
            return self.supervisor.find(name)
        return find(name, {entry.name: entry for entry in self.entries()}, self.supervisor.default_job)

    def check_seen(self, name: str) -> None:
        """Raise NoSuchJob for a job that the visitor may not see, whether or not there is one."""
        if not self.visitor.sees(name):
            raise no_such_job(name, [entry.name for entry in self.entries()])

    @cached_property
    def query(self) -> list[tuple[str, str]]:
        return parse_qsl(self.scope["query_string"].decode("latin-1"), keep_blank_values=True)

    def parameter(self, name: str) -> str | None:
        """The parameter's value; raises BadRequest when it is given twice."""
        values = [value for key, value in self.query if key == name]
        if len(values) > 1:
            raise BadRequest(f"cannot use {name}: it is given {len(values)} times")
        return values[0] if values else None

    def switch(self, name: str) -> bool | None:
        """Whether the parameter is 1; None when it is not given. Raises BadRequest unless it is 1 or 0."""
        text = self.parameter(name)
        if text not in (None, "0", "1"):
            raise BadRequest(f"cannot use {name}={text[:60]!r}: it takes 1 or 0")
        return None if text is None else text == "1"

    def header(self, name: str) -> str | None:
        """The header's first value; the name is in lower case."""
        wanted = name.encode()
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == wanted), None)

    def seconds(self, name: str) -> float | None:
        text = self.parameter(name)
        return None if text is None else duration(text, name)

    async def data(self) -> Any:
        """The data of a command, from the body or from the query."""
        if self._body is None:
            self._body = await read_body(self.scope, self._receive, self.context.max_body_bytes)
        of_all = self.scope["path_params"].get("name") == ALL
        return command_data(self._body, self.query, _NO_DATA_OF_ALL if of_all else _NO_DATA)

    def of(self, entry: Entry) -> Call:
        """The same request for one job of several."""
        other = Call(self.context, self.scope, self._receive)
        other._body = self._body
        other.entry = entry
        other.query = self.query
        return other


def answer(body: Mapping[str, object], status: int = 200) -> Response:
    """The body as JSON. Escaped to ASCII: a status may hold half a surrogate pair, which UTF-8 cannot."""
    text = json.dumps(body, separators=(",", ":"), default=str)
    return Response(text.encode("ascii") + b"\n", status, media_type="application/json")
