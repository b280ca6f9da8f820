"""Rows of history as JSON, NDJSON or CSV. What is JSON in the database goes out as it is, without being parsed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from harnessd.errors import BadRequest
from harnessd.server.asked import Asked
from harnessd.server.nearest import did_you_mean
from harnessd.server.rows import Json, Page, Row, columns

Format = Literal["json", "ndjson", "csv"]

MEDIA_TYPES: dict[Format, str] = {
    "json": "application/json",
    "ndjson": "application/x-ndjson",
    "csv": "text/csv; charset=utf-8",
}
_ACCEPTED: dict[str, Format] = {
    "application/json": "json",
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "text/csv": "csv",
}
_FIGURES = ("min", "max", "mean")


def chosen(parameter: str | None, accept: str) -> Format:
    """Return the format that is asked for, by the parameter or by Accept; JSON when Accept names none of them."""
    if parameter is not None:
        for known in MEDIA_TYPES:
            if parameter == known:
                return known
        hint = did_you_mean(parameter, MEDIA_TYPES)
        raise BadRequest(f"cannot use format={parameter[:60]!r}: it takes json, ndjson or csv{hint}")
    types = (each.partition(";")[0].strip().lower() for each in accept.split(","))
    return next((_ACCEPTED[each] for each in types if each in _ACCEPTED), "json")


def json_page(asked: Asked, page: Page) -> bytes:
    rows = ",".join(json_rows(columns(asked), page.rows))
    return f'{{"rows":[{rows}],"next":{json.dumps(page.next)}}}\n'.encode()


def lines(format: Format, asked: Asked, rows: Sequence[Row], *, first: bool) -> bytes:
    """Return the rows as lines, those of a CSV under its header when they are the first."""
    if format == "csv":
        return _csv(asked, rows, first).encode(errors="backslashreplace")  # half a surrogate pair, as JSON shows it
    return "".join(f"{row}\n" for row in json_rows(columns(asked), rows)).encode()


def json_rows(names: Sequence[str], rows: Iterable[Row]) -> Iterable[str]:
    """Return each row as a JSON object."""
    leads = [f'"{name}":' for name in names]
    for row in rows:
        yield "{" + ",".join([lead + _json(value) for lead, value in zip(leads, row, strict=True)]) + "}"


def _json(value: Any) -> str:
    if type(value) is Json:
        return value
    return str(value) if type(value) is int else json.dumps(value)


def _csv(asked: Asked, rows: Iterable[Row], with_header: bool) -> str:
    """Return the rows; the fields that were asked for have columns of their own."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = columns(asked)
    fields = [name for name, _ in asked.fields]
    if with_header:
        writer.writerow([title for name in names for title in _titles(name, fields)])
    for row in rows:
        writer.writerow([cell for name, value in zip(names, row, strict=True) for cell in _cells(name, value, fields)])
    return text.getvalue()


def _titles(name: str, fields: Sequence[str]) -> Sequence[str]:
    if fields and name == "status":
        return fields
    return [f"{field}.{name}" for field in fields] if fields and name in _FIGURES else [name]


def _cells(name: str, value: Any, fields: Sequence[str]) -> Sequence[Any]:
    if fields and (name == "status" or name in _FIGURES):
        found = json.loads(value)
        return [_cell(found.get(field)) for field in fields]
    return [value]


def _cell(value: Any) -> Any:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, bool | list | dict) else value
