"""How a refusal is worded: the nearest valid name, the line to look at, and plain words for what is wrong.

A problem is one line, `FILE: KEY (line N): what is wrong; did you mean 'X'?`. What stands under a secret key is never
repeated in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from os import PathLike
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

MAX_PROBLEMS = 20  # of one file
MAX_SHOWN_CHARS = 60
MAX_INT_BITS = 1024  # Python refuses to print an int of more than 4300 digits
SECRET_KEYS = frozenset({"env", "token", "database", "url", "headers"})

_FOLLOWS_FROM_ANOTHER = "default_factory_not_called"
_WORDS = {
    "missing": "is missing",
    "int_type": "must be a whole number, not {value}",
    "float_type": "must be a number, not {value}",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false, not {value}",
    "string_type": "must be a string, not {value}",
    "string_unicode": "must be a string of valid Unicode",
    "path_type": "must be a path, not {value}",
    "is_instance_of": "must be a path, not {value}",
    "list_type": "must be a list, not {value}",
    "dict_type": "must be a table, not {value}",
    "model_type": "must be a table, not {value}",
    "invalid_key": "must have a string as its name",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "too_long": "must have at most {max_length} items",
    "string_too_long": "must have at most {max_length} characters",
    "greater_than": "must be more than {gt}, not {value}",
    "greater_than_equal": "must be at least {ge}, not {value}",
    "less_than": "must be less than {lt}, not {value}",
    "less_than_equal": "must be at most {le}, not {value}",
    "literal_error": "must be {expected}, not {value}",
}


def nearest(word: str, among: Iterable[str]) -> str | None:
    """Return the name most like `word`, or None when none is like it; case does not count."""
    names = {name.lower(): name for name in among}
    found = get_close_matches(word.lower()[:100], names, n=1, cutoff=0.6)
    return names[found[0]] if found else None


def did_you_mean(word: str, among: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or nothing when no name is near."""
    name = nearest(word, among)
    return f"; did you mean {name!r}?" if name else ""


def printable(text: str | PathLike[str]) -> str:
    """Return the text as one line that any terminal and any JSON can carry."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown(value: object) -> str:
    """Return a value as a problem names it: scalars shortened, everything else by its kind."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() if value.bit_length() > MAX_INT_BITS:
            return "a very large number"
        case int() | float():
            return str(value)
        case str():
            return printable(repr(value if len(value) <= MAX_SHOWN_CHARS else value[:MAX_SHOWN_CHARS] + "..."))
        case Mapping():
            return "a table"
        case list() | tuple():
            return "a list"
        case _:
            return f"a {type(value).__name__}"


def problem_lines(error: ValidationError, model: type[BaseModel], where: str, text: str = "") -> list[str]:
    """Return one line for each thing that is wrong; `text` is the file's own, to find the lines in."""
    errors = [each for each in error.errors(include_url=False) if each["type"] != _FOLLOWS_FROM_ANOTHER]
    lines = [_line(dict(each), model, where, text) for each in errors[:MAX_PROBLEMS]]
    if len(errors) > MAX_PROBLEMS:
        lines.append(f"{where}: and {len(errors) - MAX_PROBLEMS} more problems")
    return list(dict.fromkeys(lines))


def _line(error: dict[str, Any], model: type[BaseModel], where: str, text: str) -> str:
    path = [part for part in error["loc"] if part != "[key]"]
    key = _dotted(path)
    if not key:
        return f"{where}: {_words(error, path)}"
    from_the_path = str(path[0]) not in _keys_at(model, []) and str(path[0]) in model.model_fields
    number = None if from_the_path else _line_number(text, path)
    at = f"{key} (line {number})" if number else key
    if error["type"] == "extra_forbidden":
        return f"{where}: {at}: unknown key{_key_hint(model, [str(part) for part in path])}"
    return f"{where}: {at}: {_words(error, path)}"


def _words(error: dict[str, Any], path: list[str | int]) -> str:
    context = error.get("ctx", {})
    if error["type"] == "value_error":
        return printable(str(context["error"]))
    words = _WORDS.get(error["type"], printable(error["msg"]) + ", not {value}")
    if not SECRET_KEYS.isdisjoint(path):
        words = words.removesuffix(", not {value}")
    words = words.format_map({**context, "value": shown(error["input"])})
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        words += did_you_mean(error["input"], re.findall(r"'([^']+)'", context["expected"]))
    return words


def _key_hint(model: type[BaseModel], path: list[str]) -> str:
    """Name the nearest key of the same table; else the same key where it does belong; else what there is."""
    siblings = _keys_at(model, path[:-1])
    if hint := did_you_mean(path[-1], siblings):
        return hint
    elsewhere = {dotted.rpartition(".")[2]: dotted for dotted in reversed([*_dotted_keys(model)])}
    found = nearest(path[-1], elsewhere)
    return f"; did you mean {elsewhere[found]!r}?" if found else f"; the keys are: {', '.join(siblings)}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the keys that a file may have there. All have defaults; what is required comes from the file's path."""
    for part in path:
        model = _table_of(model, part) or model
    return [name for name, field in model.model_fields.items() if not field.is_required()]


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in _keys_at(model, []):
        yield prefix + name
        if table := _table_of(model, name):
            yield from _dotted_keys(table, f"{prefix}{name}.")


def _table_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    field = model.model_fields.get(key)
    kinds = [field.annotation, *get_args(field.annotation)] if field else []
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _dotted(path: list[str | int]) -> str:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return printable(key.removeprefix(".")[:200])


def _line_number(text: str, path: list[str | int]) -> int | None:
    """Return the line of the last key of the path, looking for each part from the line of the one before it."""
    start = line = 0
    for part in path:
        if isinstance(part, int):
            break
        key = re.escape(part)
        pattern = re.compile(
            rf"""^[^#\n]*?(?:(?<![^\s\[{{,.]){key}[ \t]*[].=]|(["']){key}\1[ \t]*[].:=])""", re.MULTILINE
        )
        found = pattern.search(text, start)
        if found is None:
            break
        start = found.start()
        line = text.count("\n", 0, start) + 1
    return line or None
