"""The parameters of the routes, as the contract describes them; the limits are those of the code that reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from harnessd.errors import BadRequest
from harnessd.server.asked import FIELD, KINDS, MOST_FIELDS, MOST_NUMBER, MOST_ROWS, ORDERS, USUAL_ROWS, parse
from harnessd.server.timespan import EPOCH, SPAN, moment_us
from harnessd.states import State
from harnessd.web.body import DURATION, duration
from harnessd.web.formats import Format, chosen

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """What may be given in a query, a path or a header."""

    name: str
    description: str
    schema: Schema
    place: str = "query"
    example: Any = None
    check: Callable[[str, str], object] | None = None  # raises BadRequest for a value and the parameter's name

    def verify(self, text: str) -> None:
        """Raise BadRequest for what this parameter does not take."""
        if self.check:
            self.check(text, self.name)
        choices = self.schema.get("enum", (text,))
        if text not in choices:
            raise BadRequest(f"cannot use {self.name}={text[:60]!r}: it takes {' or '.join(choices)}")


def _text(pattern: str) -> Schema:
    return {"type": "string", "pattern": f"^(?:{pattern})$"}


def _list(pattern: str, most: int) -> Schema:
    return _text(f"{pattern}(?:,{pattern}){{0,{most - 1}}}")


def _number(least: int, most: int = MOST_NUMBER) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _one_of(*choices: str) -> Schema:
    return {"type": "string", "enum": list(choices)}


def _check_moment(text: str, name: str) -> None:
    moment_us(text, 0, name)


def _check_row(text: str, name: str) -> None:
    parse("runs", None, [(name, text)], 0, all_rows=False)


def _check_format(text: str, name: str) -> None:
    chosen(text, "")


_SECONDS = _text(DURATION)
_MOMENT = {
    "anyOf": [
        {"const": "now"},
        {"type": "string", "format": "date-time"},
        {"type": "string", "format": "date"},
        _text(f"-{SPAN}"),
        _text(EPOCH),
    ]
}
_TIME = "ISO 8601 (UTC unless it has an offset), epoch seconds, or ago, `-15m`, `-7d`"
_SWITCH = _one_of("0", "1")

NAME = Parameter("name", "a job; `/jobs` lists them", {"type": "string", "minLength": 1}, "path")
WAIT = Parameter(
    "wait",
    "seconds to wait until the job has read it: `5`, `0.5`, `500ms`, `2m`, to an hour. A signal counts as read",
    _SECONDS,
    check=duration,
)
WAIT_END = Parameter("wait", "`0`: answer at once, and not when nothing of the run is left", _SECONDS, check=duration)
GRACE = Parameter(
    "grace", "seconds from SIGTERM to SIGKILL, in place of the job's `kill_grace`", _SECONDS, check=duration
)
TAG = Parameter("tag", "only jobs with this tag", {"type": "string"})
STATE = Parameter("state", "only jobs in this state", _one_of(*State))
FULL = Parameter("full", "`1`: with cpu, memory and the last status in short", _SWITCH)
AT = Parameter("at", f"as of this time: {_TIME}", _MOMENT, example="-1m", check=_check_moment)
SINCE = Parameter("since", f"from this time on: {_TIME}", _MOMENT, example="-15m", check=_check_moment)
UNTIL = Parameter("until", "before this time", _MOMENT, example="now", check=_check_moment)
LIMIT = Parameter(
    "limit", f"how many rows; {USUAL_ROWS} in JSON, all in the other formats", _number(1, MOST_ROWS), check=_check_row
)
ORDER = Parameter("order", f"of time; `{ORDERS[0]}` is the usual one", _one_of(*ORDERS), check=_check_row)
CURSOR = Parameter("cursor", "the `next` of the page before, with the same parameters", {"type": "string"})
RUN = Parameter("run", "only of the run with this number", _number(0), check=_check_row)
FORMAT = Parameter(
    "format", "of the answer, as does the header Accept", _one_of(*get_args(Format)), check=_check_format
)
FIELDS = Parameter(
    "fields", "only these of the statuses: paths with commas, `pnl,book.bids[0]`", _list(FIELD, MOST_FIELDS)
)
EVERY = Parameter(
    "every",
    "one row for each length of time, `60s`: the last status and min, max and mean",
    _text(f"(?=[0-9.]*[1-9]){SPAN}"),
)
KIND_OF = Parameter(
    "kind", "only events of these kinds, as in `state,command`", _list(f"(?:{'|'.join(KINDS)})", MOST_FIELDS)
)
JOB = Parameter("job", "only of this job", {"type": "string", "minLength": 1})
FOLLOW = Parameter("follow", "`1`: as it happens, in an answer without end", _SWITCH)
FOLLOW_EVENTS = Parameter(
    "follow", "`1`: Server-Sent Events as they happen, with `kind` and `cursor`, the id of an event, alone", _SWITCH
)
LAST_EVENT_ID = Parameter("Last-Event-ID", "the last event that a follower has; it misses none", _number(0), "header")
ALL_PROCESSES = Parameter("all", "`1`: of every Python process of the run", _SWITCH)
STREAM = Parameter("stream", "which of the two; `stdout` is the usual one", _one_of("stdout", "stderr"))
TAIL = Parameter("tail", "the last so many lines of what is asked for; 200 when nothing is", _number(0))
SINCE_OFFSET = Parameter("since_offset", "from this byte on: `X-Log-Offset` of an answer before", _number(0))

PAGE = (SINCE, UNTIL, LIMIT, ORDER, CURSOR, RUN, FORMAT)
CHOICE = (TAG, STATE)  # with `all` in place of a name
