"""Holds answers against the HTTP contract; stricter than a client: what the contract does not name is not there."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import jsonschema_rs
from starlette.routing import compile_path

from harnessd.web.app import described


@cache
def contract() -> dict[str, Any]:
    return described()


@cache
def _closed() -> dict[str, Any]:
    schemas = copy.deepcopy(contract()["components"])
    for schema in schemas["schemas"].values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    return schemas


@cache
def _validator(path: str, method: str, status: int, media: str) -> Any:
    responses = contract()["paths"][path][method]["responses"]
    assert str(status) in responses, f"{method} {path} is not to answer {status}"
    answer = responses[str(status)]
    if "$ref" in answer:
        answer = contract()["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    content = {name.partition(";")[0]: each for name, each in answer.get("content", {}).items()}
    assert media in content, f"{method} {path} is not to answer {status} in {media}"
    return jsonschema_rs.validator_for({**content[media]["schema"], "components": _closed()})


@cache
def _template(path: str) -> str | None:
    templates = sorted(contract()["paths"], key=lambda template: "{" in template)
    return next((each for each in templates if compile_path(each)[0].match(path)), None)


def checked(method: str, path: str, status: int, media: str, body: bytes) -> None:
    """Raise AssertionError when the contract has this answer differently. What is on no path of it is let be."""
    template = _template(path)
    if template is None or method.lower() not in contract()["paths"][template] or method == "HEAD":
        return
    validator = _validator(template, method.lower(), status, media.partition(";")[0])
    shown = json.loads(body) if "json" in media and "ndjson" not in media else body.decode(errors="replace")
    problems = [f"{error.message} at {error.instance_path}" for error in validator.iter_errors(shown)]
    assert problems == [], f"{method} {path} {status}: {problems}: {body[:1000]!r}"


def checked_problem(status: int, media: str, body: bytes) -> dict[str, Any]:
    """Return the problem document. Raise AssertionError when it is none of the contract."""
    by_status = {
        each["content"][media]["schema"]["allOf"][1]["properties"]["status"]["const"]: each
        for each in _closed()["responses"].values()
        if media in each["content"]
    }
    assert status in by_status, f"{status} in {media} is no problem of the contract"
    schema = {**by_status[status]["content"][media]["schema"], "components": _closed()}
    found = json.loads(body)
    problems = [
        f"{error.message} at {error.instance_path}" for error in jsonschema_rs.validator_for(schema).iter_errors(found)
    ]
    assert problems == [], f"{status}: {problems}: {body[:1000]!r}"
    return dict(found)
