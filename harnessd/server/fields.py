"""Looks into statuses in SQL: the database parses them without the GIL, and only what is asked for travels.

Measured against `json.loads` of the whole status in Python: a fifth faster for statuses of 100 bytes, three times for
1 KiB, ten times for 28 KiB. Paths are bound parameters, never part of a statement's text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Float, TableValuedAlias, Text, case, cast, func
from sqlalchemy.types import TypeEngine

from harnessd.server.asked import MOST_FIELDS, Path

_MOST_DEPTH = 8


def pick(column: ColumnElement[Any], paths: Sequence[Path], dialect: str) -> ColumnElement[Any]:
    """Return the JSON array of what stands at the paths, null where there is nothing."""
    if dialect == "sqlite":
        twice = [_sqlite_path(path) for path in (*paths, paths[0])]  # with a single path it would be no array
        return case((func.json_valid(column), func.json_extract(column, *twice)))
    status = cast(column, _jsonb())
    found = (func.jsonb_extract_path(status, *map(str, path)) for path in paths)
    return cast(func.jsonb_build_array(*found), Text)


class Numbers(NamedTuple):
    """The numbers in the statuses of a query: a row for each, with the place of its path among the paths."""

    rows: TableValuedAlias
    place: ColumnElement[Any]
    value: ColumnElement[Any]
    is_number: ColumnElement[bool]


def numbers(column: ColumnElement[Any], paths: Sequence[Path], dialect: str) -> Numbers:
    """Return what to join, each status being parsed once for all of the paths."""
    found = pick(column, paths, dialect)
    if dialect == "sqlite":
        rows = func.json_each(found).table_valued("key", "value", "type")
        return Numbers(rows, rows.c.key, rows.c.value, rows.c.type.in_(("integer", "real")))
    elements = func.jsonb_array_elements(cast(found, _jsonb()))
    rows = elements.table_valued("value", with_ordinality="key").render_derived()
    return Numbers(rows, rows.c.key - 1, cast(rows.c.value, Float), func.jsonb_typeof(rows.c.value) == "number")


def _jsonb() -> type[TypeEngine[Any]]:
    from sqlalchemy.dialects.postgresql import JSONB  # who has SQLite need not load the other dialect

    return JSONB


def named(names: Sequence[str], array: str | None) -> str:
    """Return the JSON object of the names and what `pick` found for them."""
    values = json.loads(array)[: len(names)] if array else [None] * len(names)
    return dumps(dict(zip(names, values, strict=True)))


def numeric(status: Any) -> list[tuple[str, Path]]:
    """Return names and paths of the numbers in a status and in the objects in it, of the first 50."""
    found = []
    for path in _numeric(status, ()):
        found.append((".".join(map(str, path)), path))
        if len(found) == MOST_FIELDS:
            break
    return found


def _numeric(value: Any, path: Path) -> Iterator[Path]:
    if isinstance(value, dict) and len(path) < _MOST_DEPTH:
        for key, item in value.items():
            if '"' not in key and "\\" not in key:  # SQLite has no path to these
                yield from _numeric(item, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def dumps(value: Any) -> str:
    """Return the value as ASCII JSON. What is past the range of a double (1e999 is JSON) becomes null."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"))


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list():
            return [_finite(item) for item in value]
        case _:
            return value


def _sqlite_path(path: Path) -> str:
    """Return the path as SQLite writes it; keys are escaped as in the statuses themselves, which are ASCII."""
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{json.dumps(step)}" for step in path)
