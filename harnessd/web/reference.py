"""docs/http.md: a page with gaps, `<!-- routes -->` and the like, that are filled in from the contract.

python -m harnessd.web.reference docs/parts/http.md > docs/http.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harnessd.states import ExitReason, State
from harnessd.web.app import ENDPOINTS, Endpoint, described
from harnessd.web.operations import Answer
from harnessd.web.parameters import Parameter
from harnessd.web.problem import kinds, title


def page(template: str) -> str:
    """Return the page with its gaps filled."""
    schemas = described()["components"]["schemas"]
    shown = {name: schema for name, schema in schemas.items() if "properties" in schema and name != "Heartbeat"}
    gaps = {
        "routes": _table(("route", "methods", "role", "what it does"), map(_route, ENDPOINTS)),
        "states": " ".join(State),
        "reasons": " ".join(ExitReason),
        "heartbeat": _keys(schemas["Heartbeat"]),
        "errors": _table(("status", "is", "kind"), ((str(s), title(s), _codes(each)) for s, each in kinds().items())),
        "operations": "\n".join(_operation(endpoint) for endpoint in ENDPOINTS).rstrip(),
        "shapes": "\n".join(
            f"### {name}\n\n{schema['description']}\n\n{_keys(schema)}" for name, schema in shown.items()
        ),
    }
    for name, text in gaps.items():
        template = template.replace(f"<!-- {name} -->", text.rstrip())
    return template


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _codes(words: Iterable[str]) -> str:
    return " ".join(f"`{word}`" for word in words)


def _path(endpoint: Endpoint) -> str:
    return endpoint.path.replace("{name}", "<name>")


def _methods(endpoint: Endpoint) -> str:
    return " ".join(method for method in endpoint.methods if method != "HEAD")


def _route(endpoint: Endpoint) -> Sequence[str]:
    return (f"`{_path(endpoint)}`", _methods(endpoint), str(endpoint.role), endpoint.operation.summary)


def _operation(endpoint: Endpoint) -> str:
    told = endpoint.operation
    parts = [f"### {_methods(endpoint)} {_path(endpoint)}\n", f"{told.summary}. {told.description}".strip() + "\n"]
    if told.parameters:
        parts.append(_table(("parameter", "is"), map(_parameter, told.parameters)))
    answers = [(str(status), answer.description, _shape(answer)) for status, answer in told.answers.items()]
    parts.append(_table(("status", "when", "answer"), answers))
    return "\n".join(parts)


def _parameter(parameter: Parameter) -> Sequence[str]:
    where = " (a header)" if parameter.place == "header" else ""
    return (f"`{parameter.name}`{where}", parameter.description + _limits(parameter.schema))


def _limits(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return f"; one of {_codes(schema['enum'])}"
    if schema.get("type") == "integer":
        most = schema["maximum"]
        return f"; {schema['minimum']} to {most:,}" if most < 1 << 62 else f"; a number from {schema['minimum']}"
    return ""


def _shape(answer: Answer) -> str:
    shape = [f"[{answer.shape.__name__}](#{answer.shape.__name__.lower()})"] if answer.shape else []
    return ", ".join([*shape, *(f"`{media.partition(';')[0]}`" for media in answer.texts)])


def _keys(schema: Mapping[str, Any]) -> str:
    rows = []
    for name, each in schema["properties"].items():
        mark = "" if name in schema.get("required", ()) else "; not always there"
        rows.append((f"`{name}`", " or ".join(_types(each)), each.get("description", "") + mark))
    return _table(("key", "type", "is"), rows)


def _types(schema: Mapping[str, Any]) -> Iterator[str]:
    if "anyOf" in schema:
        for each in schema["anyOf"]:
            yield from _types(each)
    elif "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    elif schema.get("type") == "array":
        yield "list of " + " or ".join(_types(schema["items"]))
    elif schema.get("format") == "date-time":
        yield "time"
    else:
        yield str(schema.get("type", "anything"))


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1]).read_text()))
