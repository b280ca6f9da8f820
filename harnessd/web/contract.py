"""The HTTP contract, OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0): made of the routes that serve and their types.

What stands under the name of a job stands at the root for the only or default one, and under `all` for each of them:
there its answer is 207, with one result a job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from harnessd import __version__
from harnessd.server import shapes
from harnessd.web import parameters, problem
from harnessd.web.operations import DATA, Answer, Operation
from harnessd.web.parameters import Parameter

ANY_ROUTE = (400, 401, 403, 414, 429, 431, 500)  # the problems that each can answer with
OF_JOB, OF_EACH = "/jobs/{name}/", "/jobs/all/"
EACH = Answer("a result for each job", shapes.Results)
JSON = "application/json"
_SHAPES = "#/components/schemas/{model}"
_HEADERS = {
    401: {"WWW-Authenticate": "how to be let in"},
    405: {"Allow": "the methods that are allowed"},
    429: {"Retry-After": "seconds until it may work"},
    503: {"Retry-After": "seconds until it may work"},
}


class Served(NamedTuple):
    """A path, and what is done there."""

    path: str
    methods: tuple[str, ...]
    role: str
    operation: Operation


def document(routes: Iterable[Served]) -> dict[str, Any]:
    """Return the contract of the routes, ready for JSON."""
    schemas = _Schemas()
    found: dict[str, dict[str, Any]] = {}
    for route in routes:
        for each in _with_each(route):
            for method in route.methods:
                found.setdefault(each.path, {})[method.lower()] = _operation(each, method, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "harnessd",
            "version": __version__,
            "summary": "Keeps Python jobs running and steers them over HTTP",
            "description": "Every error is a problem document, whose `kind` is what a program tests for. A method that "
            "a path does not list is answered with 405, a path that is not listed with 404.",
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}, {}],
        "paths": found,
        "components": {
            "schemas": dict(sorted(schemas.all().items())),
            "responses": {_problem_name(status): _problem(status) for status in problem.kinds()},
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "With a role: `read`, `operate` or `admin`, each of which may do what the one "
                    "before may; `x-role` is the least that an operation takes. Loopback peers and those on the "
                    "daemon's own socket need none, unless the settings say otherwise.",
                }
            },
        },
    }


def _with_each(route: Served) -> Iterator[Served]:
    yield route
    if route.path.startswith(OF_JOB) and route.operation.each:
        yield route._replace(path=route.path.replace(OF_JOB, OF_EACH))


def _operation(route: Served, method: str, schemas: _Schemas) -> dict[str, Any]:
    told, of_each = route.operation, route.path.startswith(OF_EACH)
    answers: Mapping[int, Answer] = {207: EACH} if of_each else told.answers
    given = told.parameters
    if of_each:
        given = (*(each for each in given if each is not parameters.FORMAT), *parameters.CHOICE)
    if "{name}" in route.path:
        given = (parameters.NAME, *given)
    refusals = {*ANY_ROUTE, *told.problems, *_of_job(route)} - answers.keys()
    made: dict[str, Any] = {
        "operationId": _id(route.path, method),
        "summary": f"{told.summary}, of each job" if of_each else told.summary,
        "description": _description(told, method),
        "x-role": route.role,
        "tags": [_tag(route.path)],
        "parameters": [_parameter(each) for each in given],
        "responses": {
            **{str(status): _answer(answer, method, schemas) for status, answer in answers.items()},
            **{str(status): _refusal(status, method) for status in sorted(refusals)},
        },
    }
    if method == "POST" and told.data is not None:
        made["requestBody"] = {"content": {JSON: {"schema": told.data}}}
    return {key: value for key, value in made.items() if value not in ("", [])}


def _description(told: Operation, method: str) -> str:
    return told.description.replace(DATA, f"{DATA} GET does the same.") if method == "POST" else told.description


def _of_job(route: Served) -> Sequence[int]:
    """Return the problems of finding the job: there may be none, or several and none was named."""
    if route.path.startswith(OF_EACH):
        return ()
    return (404,) if "{name}" in route.path else (404, 409) if _tag(route.path) == DEFAULT else ()


DEFAULT = "the only or default job"
_DAEMON = ("jobs", "history", "events", "reload", "healthz", "openapi.json", "")


def _tag(path: str) -> str:
    if path.startswith(OF_EACH):
        return "each job"
    if path.startswith("/jobs/{name}"):
        return "one job"
    return "the daemon" if path.strip("/").split("/")[0] in _DAEMON else DEFAULT


def _id(path: str, method: str) -> str:
    words = [word.strip("{}").replace(".", "-") for word in path.strip("/").split("/")]
    return "-".join([method.lower(), *(word for word in words if word)])


def _parameter(parameter: Parameter) -> dict[str, Any]:
    made: dict[str, Any] = {"name": parameter.name, "in": parameter.place, "description": parameter.description}
    if parameter.place == "path":
        made["required"] = True
    made["schema"] = dict(parameter.schema)
    if parameter.example is not None:
        made["example"] = parameter.example
    return made


def _answer(answer: Answer, method: str, schemas: _Schemas) -> dict[str, Any]:
    made: dict[str, Any] = {"description": answer.description}
    if answer.headers:
        made["headers"] = {
            name: {"description": told, "schema": {"type": "string"}} for name, told in answer.headers.items()
        }
    if method != "HEAD":
        content = {JSON: {"schema": schemas.ref(answer.shape)}} if answer.shape else {}
        made["content"] = content | {media: {"schema": _of_text(media)} for media in answer.texts}
    return made


def _of_text(media: str) -> dict[str, Any]:
    return {"type": "object"} if media == JSON else {"type": "string"}


# problems


def _problem_name(status: int) -> str:
    return "".join(word.capitalize() for word in problem.title(status).replace("-", " ").split())


def _refusal(status: int, method: str) -> dict[str, Any]:
    if method == "HEAD":
        return {"description": problem.title(status)}
    return {"$ref": f"#/components/responses/{_problem_name(status)}"}


def _problem(status: int) -> dict[str, Any]:
    exactly = {"status": {"const": status}, "kind": {"enum": problem.kinds()[status]}}
    schema = {"allOf": [{"$ref": _SHAPES.format(model="Problem")}, {"properties": exactly}]}
    made: dict[str, Any] = {
        "description": problem.title(status),
        "content": {problem.MEDIA_TYPE: {"schema": schema}},
    }
    if status in _HEADERS:
        made["headers"] = {
            name: {"description": told, "schema": {"type": "string"}} for name, told in _HEADERS[status].items()
        }
    return made


# types


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class _Schemas:
    """The types that are referred to."""

    def __init__(self) -> None:
        self._types: dict[str, Any] = {"Problem": shapes.Problem}

    def ref(self, shape: Any) -> dict[str, str]:
        self._types[shape.__name__] = shape
        return {"$ref": _SHAPES.format(model=shape.__name__)}

    def all(self) -> dict[str, Any]:
        wanted = [(name, "serialization", TypeAdapter(shape)) for name, shape in self._types.items()]
        _, made = TypeAdapter.json_schemas(wanted, ref_template=_SHAPES, schema_generator=_Untitled)  # type: ignore[arg-type]
        found: dict[str, Any] = made["$defs"]
        kinds = sorted({kind for each in problem.kinds().values() for kind in each})
        found["Problem"]["properties"]["kind"]["enum"] = kinds
        return found
