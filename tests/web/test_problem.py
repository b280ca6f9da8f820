from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from harnessd import errors
from harnessd.errors import MailboxFull, NoSuchJob, Refused, Unauthorized, WrongState
from harnessd.web.problem import STATUS, nearest, problem, response_for, status_of

ROUTES = ("/hb", "/kill", "/jobs", "/jobs/{name}", "/jobs/{name}/hb", "/jobs/{name}/history", "/healthz")


def refusals(root: type[Refused] = Refused) -> Iterator[type[Refused]]:
    for cls in root.__subclasses__():
        if cls.__module__ == errors.__name__:
            yield cls
            yield from refusals(cls)


@pytest.mark.parametrize("cls", list(refusals()))
def test_every_refusal_has_its_own_status_and_kind(cls: type[Refused]) -> None:
    assert cls in STATUS
    response = problem(cls("cannot do it"))
    body = json.loads(response.body)
    assert response.media_type == "application/problem+json"
    assert response.status_code == body["status"] == STATUS[cls]
    assert body["kind"] == cls.kind != Refused.kind
    assert (body["type"], body["detail"]) == ("about:blank", "cannot do it")
    assert body["title"]
    assert "job" not in body
    assert "state" not in body


def test_a_subclass_without_an_entry_has_its_base_class_status() -> None:
    class Special(WrongState):
        pass

    assert status_of(Special("no")) == 409


def test_job_and_state_are_shown_where_they_apply() -> None:
    body = json.loads(problem(WrongState("cannot pause", job="etl", state="stopped")).body)
    assert (body["job"], body["state"]) == ("etl", "stopped")
    assert json.loads(problem(NoSuchJob("no", job="etl")).body)["job"] == "etl"


def test_too_many_commands_say_when_to_come_back_and_a_missing_token_what_to_send() -> None:
    assert problem(MailboxFull("full")).headers["retry-after"] == "1"
    assert problem(Unauthorized("no")).headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/hbb", "/hb"),
        ("/jbos", "/jobs"),
        ("/jobs/etl/histroy", "/jobs/etl/history"),
        ("/job/etl/hb", "/jobs/etl/hb"),
    ],
)
def test_an_unknown_path_is_answered_with_the_nearest_routes(path: str, expected: str) -> None:
    assert expected in nearest(path, ROUTES)
    response = response_for(HTTPException(404), path=path, routes=ROUTES)
    body = json.loads(response.body)
    assert (response.status_code, body["kind"]) == (404, "no-such-route")
    assert expected in body["detail"]


def test_a_path_like_nothing_is_answered_without_a_guess() -> None:
    body = json.loads(response_for(HTTPException(404), path="/" + "\ud800z" * 5000, routes=ROUTES).body)
    assert body["detail"].endswith("no such route")
    assert len(body["detail"]) < 300


def test_a_wrong_method_is_answered_with_the_allowed_ones() -> None:
    response = response_for(HTTPException(405, headers={"Allow": "GET, POST"}), path="/kill")
    assert response.headers["allow"] == "GET, POST"
    body = json.loads(response.body)
    assert (body["kind"], body["title"]) == ("method-not-allowed", "Method Not Allowed")
    assert "GET, POST" in body["detail"]


@pytest.mark.parametrize(("status", "kind"), [(414, "uri-too-long"), (413, "content-too-large")])
def test_titles_are_those_of_rfc_9110_under_every_python(status: int, kind: str) -> None:
    assert json.loads(response_for(HTTPException(status, "too long")).body)["kind"] == kind


def test_a_defect_shows_nothing_of_itself_and_is_logged_once_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        response = response_for(ZeroDivisionError("the secret is 42"), path="/hb")
    assert response.status_code == 500
    assert b"42" not in response.body
    assert b"ZeroDivision" not in response.body
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "/hb" in record.getMessage()


def test_a_client_that_went_away_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    assert response_for(ClientDisconnect()).status_code == 400
    assert not caplog.records
