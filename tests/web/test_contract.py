from __future__ import annotations

import json
from typing import Any, get_type_hints

import jsonschema_rs
import pytest
from helpers.contract import checked, contract
from helpers.documents import text

from harnessd.server import shapes
from harnessd.server.asked import PARAMETERS, What
from harnessd.server.rows import BUCKET_COLUMNS, COLUMNS
from harnessd.server.tokens import Role
from harnessd.web import operations, reference
from harnessd.web.app import ENDPOINTS, paths
from harnessd.web.problem import STATUS, kinds

ROWS: dict[What, tuple[type, operations.Operation]] = {
    "history": (shapes.StatusRow, operations.HISTORY),
    "runs": (shapes.RunRow, operations.RUNS),
    "events": (shapes.EventRow, operations.EVENTS),
    "metrics": (shapes.SampleRow, operations.METRICS),
}
SERVED = [(path, method, e) for e in ENDPOINTS for path in paths(e) for method in e.methods]


def operation(path: str, method: str) -> dict[str, Any]:
    found = contract()["paths"][path][method.lower()]
    assert isinstance(found, dict)
    return found


def test_the_contract_is_plain_json() -> None:
    assert json.loads(json.dumps(contract())) == contract()
    assert contract()["openapi"] == "3.1.0"


@pytest.mark.parametrize(("path", "method", "endpoint"), SERVED)
def test_every_route_is_in_the_contract_with_what_it_is_for_who_may_and_what_it_answers(
    path: str, method: str, endpoint: Any
) -> None:
    told = operation(path, method)
    assert told["summary"]
    assert told["x-role"] in {str(role) for role in Role}
    assert [status for status in told["responses"] if status.startswith("2")]
    assert {"400", "401", "403", "500"} <= told["responses"].keys()
    assert method == "HEAD" or all("content" in each or "$ref" in each for each in told["responses"].values())


def test_the_contract_has_nothing_that_is_not_served() -> None:
    described = {(path, method.upper()) for path, each in contract()["paths"].items() for method in each}
    of_each = {(path, method) for path, method in described if path.startswith("/jobs/all/")}
    assert described - of_each == {(path, method) for path, method, _ in SERVED}
    assert {(path.replace("/all/", "/{name}/"), method) for path, method in of_each} <= described


def test_ids_of_operations_are_unique() -> None:
    ids = [told["operationId"] for each in contract()["paths"].values() for told in each.values()]
    assert len(ids) == len(set(ids))


def test_every_reference_leads_to_something() -> None:
    def refs(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [value["$ref"]] if "$ref" in value else [ref for each in value.values() for ref in refs(each)]
        return [ref for each in value for ref in refs(each)] if isinstance(value, list) else []

    for ref in refs(contract()):
        _, kind, group, name = ref.split("/")
        assert name in contract()[kind][group], ref


def test_every_schema_is_one() -> None:
    for schema in contract()["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


@pytest.mark.parametrize("what", list(ROWS))
def test_rows_have_the_documented_keys_and_take_the_documented_parameters(what: What) -> None:
    row, told = ROWS[what]
    buckets = BUCKET_COLUMNS if what == "history" else ()
    assert set(get_type_hints(row)) == {*COLUMNS[what], *buckets}
    others = {"follow", "Last-Event-ID"}
    assert {each.name for each in told.parameters} - others == set(PARAMETERS[what])


def test_the_kinds_of_problems_are_those_that_can_be_told() -> None:
    told = set(contract()["components"]["schemas"]["Problem"]["properties"]["kind"]["enum"])
    assert told == {kind for each in kinds().values() for kind in each}
    assert {cls.kind for cls in STATUS} - {"refused"} <= told


def test_the_page_on_http_is_made_of_the_contract() -> None:
    made = reference.page(text("docs/parts/http.md"))
    assert made == text("docs/http.md"), "make it anew: python -m harnessd.web.reference docs/parts/http.md"


def test_an_answer_that_is_not_in_the_contract_is_found() -> None:
    good = json.dumps({"harnessd": "1", "jobs": [], "health": "/", "contract": "/"}).encode()
    checked("GET", "/", 200, "application/json", good)
    for body in (b"{}", good.replace(b"}", b', "more": 1}'), good.replace(b"[]", b"[1]")):
        with pytest.raises(AssertionError):
            checked("GET", "/", 200, "application/json", body)
    with pytest.raises(AssertionError):
        checked("GET", "/", 418, "application/json", good)
    with pytest.raises(AssertionError):
        checked("GET", "/", 200, "text/plain", good)
