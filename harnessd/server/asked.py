"""What a reader of history asks for: the parameters of a query, checked."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from harnessd.errors import BadRequest
from harnessd.server.nearest import did_you_mean
from harnessd.server.records import EventKind
from harnessd.server.timespan import moment_us, span_us

What = Literal["history", "runs", "events", "metrics"]
Path = tuple[str | int, ...]

MOST_ROWS = 10_000
USUAL_ROWS = 100
MOST_FIELDS = 50
ORDERS = ("desc", "asc")

COMMON = ("since", "until", "limit", "order", "cursor", "run", "format")
PARAMETERS: dict[What, tuple[str, ...]] = {
    "history": (*COMMON, "fields", "every"),
    "runs": COMMON,
    "events": (*COMMON, "kind"),
    "metrics": COMMON,
}

MOST_NUMBER = (1 << 63) - 1
KINDS: tuple[str, ...] = get_args(EventKind)
KEY, PLACE = r"[^.,\[\]\"\\\x00-\x1f]+", r"\[[0-9]{1,6}\]"
FIELD = rf"(?:{KEY}|{PLACE})(?:\.{KEY}|{PLACE})*"
_STEP = re.compile(rf"\.?({KEY})|\[([0-9]{{1,6}})\]")
_CURSOR = re.compile(r"([a-z]+):(asc|desc):([0-9]{1,19}):([0-9]{1,19})")


@dataclass(frozen=True, slots=True)
class Asked:
    """Rows with `since_us` <= time < `until_us`, behind the cursor; `limit` None means all of them."""

    what: What
    job: str | None = None  # None: over all jobs
    among: tuple[str, ...] | None = None  # globs; over all jobs it is over those that match one
    job_ids: tuple[int, ...] | None = None  # of these
    run: int | None = None
    since_us: int | None = None
    until_us: int | None = None
    limit: int | None = USUAL_ROWS
    descending: bool = True
    after: tuple[int, int] | None = None
    kinds: tuple[str, ...] = ()
    fields: tuple[tuple[str, Path], ...] = ()
    every_us: int | None = None

    @property
    def key(self) -> str:
        """By what the rows are ordered: their time, the number within a run, or the start of a bucket."""
        if self.every_us:
            return "bucket"
        return "seq" if self.what == "history" and self.run is not None and not self.has_window else "at"

    @property
    def over_all(self) -> bool:
        """Whether statuses of all jobs are asked for."""
        return self.what == "history" and self.job is None and self.run is None

    @property
    def has_window(self) -> bool:
        return self.since_us is not None or self.until_us is not None

    def cursor(self, after: tuple[int, int]) -> str:
        """Return what leads to the rows behind that one. It holds in this order of this table only."""
        order = "desc" if self.descending else "asc"
        return base64.urlsafe_b64encode(f"{self.what}{self.key}:{order}:{after[0]}:{after[1]}".encode()).decode()

    def behind(self, cursor: str) -> Asked:
        """Return the query for the rows behind a cursor. Raise BadRequest when it is none of this query's."""
        try:
            found = _CURSOR.fullmatch(base64.urlsafe_b64decode(cursor.encode()).decode())
        except (binascii.Error, ValueError):
            found = None
        if found is None:
            raise BadRequest(f"cannot use cursor={cursor[:60]!r}: take the one that is `next` in a page")
        after = (int(found[3]), int(found[4]))
        if max(after) > MOST_NUMBER or self.cursor(after) != cursor:
            raise BadRequest("cannot use this cursor: it belongs to another order or other parameters")
        return replace(self, after=after)


def parse(what: What, job: str | None, given: Iterable[tuple[str, str]], now_us: int, *, all_rows: bool) -> Asked:
    """Return what the parameters ask for; without `limit` that is 100 rows, or with `all_rows` all of them.

    Raise BadRequest for an unknown parameter, one that is given twice, and a value that cannot be meant.
    """
    values = single(given, PARAMETERS[what], f"/{what}")
    asked = Asked(
        what,
        job,
        run=_number(values, "run"),
        since_us=moment_us(values["since"], now_us, "since") if "since" in values else None,
        until_us=moment_us(values["until"], now_us, "until") if "until" in values else None,
        limit=_limit(values.get("limit"), None if all_rows else USUAL_ROWS),
        descending=_one_of(values, "order", ORDERS) == "desc",
        kinds=kinds(values.get("kind")),
        fields=_fields(values.get("fields")),
        every_us=span_us(values["every"], "every") if "every" in values else None,
    )
    if asked.every_us and job is None:
        raise BadRequest("cannot use every= over all jobs: name one")
    return asked.behind(values["cursor"]) if "cursor" in values else asked


def single(given: Iterable[tuple[str, str]], known: Sequence[str], where: str) -> dict[str, str]:
    """Return the parameters by name. Raise BadRequest for one that is unknown or given twice."""
    values: dict[str, str] = {}
    for name, value in given:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are: {', '.join(known)}"
            raise BadRequest(f"cannot use {name[:60]!r}: {where} has no such parameter{hint}")
        if name in values:
            raise BadRequest(f"cannot use {name}: it is given twice")
        values[name] = value
    return values


def kinds(text: str | None) -> tuple[str, ...]:
    """Return the kinds of events in a list with commas. Raise BadRequest."""
    if text is None:
        return ()
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in KINDS:
            hint = did_you_mean(name, KINDS) or f"; there are: {', '.join(KINDS)}"
            raise BadRequest(f"cannot use kind={text[:60]!r}: there are no such events as {name[:60]!r}{hint}")
    return names


def _limit(text: str | None, usual: int | None) -> int | None:
    if text is None:
        return usual
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= MOST_ROWS):
        raise BadRequest(f"cannot use limit={text[:60]!r}: it takes 1 to {MOST_ROWS}")
    return int(text)


def _number(values: dict[str, str], name: str) -> int | None:
    text = values.get(name)
    if text is not None and not is_number(text, MOST_NUMBER):
        raise BadRequest(f"cannot use {name}={text[:60]!r}: it takes a number, as in the rows' {name!r}")
    return None if text is None else int(text)


def is_number(text: str, most: int) -> bool:
    """Return whether the text is a whole number up to `most`; of digits without end, not even leading zeros count."""
    return text.isascii() and text.isdecimal() and len(text) <= len(str(most)) and int(text) <= most


def _one_of(values: dict[str, str], name: str, choices: Sequence[str]) -> str:
    """Return the choice, the first one by default."""
    text = values.get(name, choices[0])
    if text not in choices:
        raise BadRequest(f"cannot use {name}={text[:60]!r}: it takes {' or '.join(choices)}")
    return text


def _fields(text: str | None) -> tuple[tuple[str, Path], ...]:
    if text is None:
        return ()
    names = list(dict.fromkeys(text.split(",")))
    if len(names) > MOST_FIELDS:
        raise BadRequest(f"cannot use fields: there are {len(names)}, at most {MOST_FIELDS} can be asked for")
    return tuple((name, path_of(name)) for name in names)


def path_of(name: str) -> Path:
    """Return the steps of `a.b`, `a[0].b` or `[0]`. Raise BadRequest."""
    steps: list[str | int] = []
    position = 0
    while position < len(name) or not steps:
        step = _STEP.match(name, position)
        if step is None or (step[1] and (name[position] == ".") != bool(steps)):
            raise BadRequest(f"cannot use the field {name[:60]!r}: it takes paths, as in pnl, book.bids[0].size")
        steps.append(step[1] if step[1] else int(step[2]))
        position = step.end()
    return tuple(steps)
