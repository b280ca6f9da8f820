from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harnessd.errors import SpawnFailed
from harnessd.server import policy
from harnessd.server.asked import Asked
from harnessd.server.bodies import health
from harnessd.server.definition import Definition
from harnessd.server.rows import Page
from harnessd.server.supervisor import Folders, Supervisor
from harnessd.server.tokens import Role
from harnessd.states import State, Want
from harnessd.web.app import ENDPOINTS, Endpoint, make_app, paths
from harnessd.web.call import Context
from harnessd.web.guard import GuardPolicy

pytestmark = pytest.mark.usefixtures("every_answer_is_in_the_contract")

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
MAX_BODY_BYTES = 1000
EVIL = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}

TABLE = [(path, method, endpoint) for endpoint in ENDPOINTS for path in paths(endpoint) for method in endpoint.methods]
ALLOWED = {path: {method for at, method, _ in TABLE if at == path} for path, _, _ in TABLE}
OF_ONE_JOB = [endpoint for endpoint in ENDPOINTS if endpoint.path[0] != "/"]
LOOKING = sorted(path for path, method, _ in TABLE if method == "HEAD")


def filled(path: str, name: str = "etl") -> str:
    return path.replace("{name}", name)


class NoHost:
    """A host on which nothing can be started."""

    def __init__(self) -> None:
        self.on_exit: Any = None

    async def spawn(self, spec: Any) -> Any:
        raise SpawnFailed(f"cannot start {spec.job!r}: no host")

    def end(self, run: int, *_: Any) -> None:
        raise AssertionError("there is no run")

    signal = acknowledge = end


class NoHistory:
    """A history in which nothing is kept."""

    async def has_job(self, name: str) -> bool:
        return False

    async def page(self, asked: Asked) -> Page:
        return Page([], None)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found


class Site:
    """The application over a supervisor with some jobs, all stopped."""

    def __init__(self, *names: str, rules: policy.Rules | None = None) -> None:
        self.recorded: list[Any] = []
        self.supervisor = Supervisor(NoHost(), Folders(Path("/nonexistent"), 1 << 20), self.recorded.append)
        for name in names:
            self.supervisor.add(
                Definition(
                    name=name,
                    rules=rules or policy.Rules(restart="never"),
                    kill_grace_s=0.1,
                    config={"target": 4.0},
                    run_spec=lambda spec: spec,
                    digest="",
                    shown={"name": name},
                )
            )
        storage: Any = {"ok": True, "kind": "none"}
        told = health(self.supervisor.entries, keeper_pid=1, server_starts=1, storage=lambda: storage)
        context = Context(self.supervisor, told, MAX_BODY_BYTES, history=NoHistory())  # type: ignore[arg-type]
        self.app = make_app(context, GuardPolicy())

    async def ask(
        self, method: str, path: str, *, body: bytes = b"", query: str = "", headers: dict[str, str] | None = None
    ) -> Answer:
        pairs = {"host": "127.0.0.1:2222", **(headers or {})}
        scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in pairs.items()],
            "client": ("127.0.0.1", 40000),
            "server": ("127.0.0.1", 2222),
        }
        answer = Answer(0, {}, b"")

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer.body += message.get("body", b"")

        await self.app(scope, receive, send)
        return answer


def ask(method: str, path: str, *names: str, **more: Any) -> Answer:
    async def asked() -> Answer:
        return await Site(*(names or ("etl",))).ask(method, path, **more)

    return asyncio.run(asked())


def check_problem(answer: Answer, status: int, kind: str | None = None) -> dict[str, Any]:
    """Check that it is a problem document as RFC 9457 has it, and return it."""
    assert answer.status == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["content-length"] == str(len(answer.body))
    body = answer.json
    assert body["type"] == "about:blank"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"].startswith("cannot ")
    assert body["kind"] == body["kind"].lower() != ""
    assert kind is None or body["kind"] == kind
    assert body.keys() <= {"type", "title", "status", "detail", "kind", "job", "state", "instance"}
    return body


# the table


def test_no_path_and_method_stands_twice() -> None:
    pairs = [(path, method) for path, method, _ in TABLE]
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("endpoint", OF_ONE_JOB, ids=lambda endpoint: f"{endpoint.methods[0]} {endpoint.path}")
def test_what_is_of_one_job_stands_under_its_name_and_at_the_root(endpoint: Endpoint) -> None:
    assert paths(endpoint) == (f"/jobs/{{name}}/{endpoint.path}", f"/{endpoint.path}")


def test_the_eight_routes_of_a_job_take_the_methods_that_curl_is_told_to_use() -> None:
    for verb in ("kill", "start", "stop", "pause", "resume"):
        assert ALLOWED[f"/{verb}"] == {"GET", "POST"}
    assert {"GET", "HEAD"} == ALLOWED["/hb"] == ALLOWED["/status"]
    assert "POST" in ALLOWED["/config"]


@pytest.mark.parametrize(("path", "method", "endpoint"), TABLE)
def test_another_site_may_not_change_anything(path: str, method: str, endpoint: Endpoint) -> None:
    answer = ask(method, filled(path), headers=EVIL)
    if endpoint.role is Role.READ and method in ("GET", "HEAD"):
        assert answer.status not in (401, 403)
    else:
        check_problem(answer, 403, "forbidden")


@pytest.mark.parametrize("path", LOOKING)
def test_looking_changes_and_records_nothing(path: str) -> None:
    async def look() -> None:
        site = Site("etl")
        entry = site.supervisor.find("etl")
        before = entry.job
        answer = await site.ask("GET", filled(path))
        head = await site.ask("HEAD", filled(path))
        assert (entry.job, entry.overrides, site.recorded) == (before, {}, [])
        assert answer.status == head.status != 405
        assert answer.headers["content-type"] == head.headers["content-type"]

    asyncio.run(look())


# answers


@pytest.mark.parametrize("path", [path for path in LOOKING if not path.endswith("/logs") and path != "/metrics"])
def test_what_looks_answers_one_json_object_and_a_newline(path: str) -> None:
    answer = ask("GET", filled(path))
    assert answer.status == (503 if path.endswith("/hb") else 200)
    assert answer.headers["content-type"] == "application/json"
    assert answer.body.endswith(b"}\n")
    assert answer.json


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("prefix", ["", "/jobs/etl"])
def test_start_of_a_stopped_job_is_accepted_and_changes_what_is_wanted(method: str, prefix: str) -> None:
    async def start() -> None:
        site = Site("etl", rules=policy.Rules(first_s=1000.0, max_s=1000.0))
        entry = site.supervisor.find("etl")
        gone = entry.gone()
        answer = await site.ask(method, f"{prefix}/start")
        assert (answer.status, answer.json["verb"], answer.json["queued"]) == (202, "start", True)
        assert entry.job.want is Want.UP
        await asyncio.wait_for(gone, 10)
        assert entry.job.state is State.BACKOFF
        assert entry.timer
        entry.timer.cancel()

    asyncio.run(start())


def test_what_no_run_reads_is_not_told_as_read() -> None:
    answer = ask("POST", "/config", query="wait=5&target=4.2")
    assert (answer.status, answer.json["queued"], answer.json["read"]) == (202, False, None)


def test_only_what_says_how_to_ask_is_no_data() -> None:
    async def use() -> None:
        site = Site("etl")
        await site.ask("POST", "/config", query="tag=blue&state=open&grace=1&wait=0")
        await site.ask("POST", "/jobs/all/config", query="tag=none&target=4.2")
        await site.ask("POST", "/jobs/all/config", query="state=stopped&grace=2")
        assert (await site.ask("GET", "/config")).json["overrides"] == {"tag": "blue", "state": "open", "grace": 2}

    asyncio.run(use())


def test_the_config_is_merged_shown_and_cleared() -> None:
    async def use() -> None:
        site = Site("etl")
        assert (await site.ask("POST", "/config", body=b"{'target': 4.2}")).status == 202
        shown = (await site.ask("GET", "/config")).json
        assert (shown["file"], shown["overrides"]) == ({"target": 4.0}, {"target": 4.2})
        assert shown["effective"] == {"target": 4.2}
        assert (await site.ask("DELETE", "/config")).json["effective"] == {"target": 4.0}

    asyncio.run(use())


def test_all_in_place_of_a_name_answers_for_every_job() -> None:
    answer = ask("GET", "/jobs/all/hb", "a", "b")
    assert answer.status == 207
    assert [(result["job"], result["status_code"]) for result in answer.json["results"]] == [("a", 503), ("b", 503)]


# problems


@pytest.mark.parametrize("path", sorted(ALLOWED))
@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_a_path_has_not_is_answered_with_those_it_has(path: str, method: str) -> None:
    answer = ask(method, filled(path))
    if method in ALLOWED[path]:
        assert answer.status != 405
    else:
        check_problem(answer, 405, "method-not-allowed")
        assert answer.headers["allow"] == ", ".join(sorted(ALLOWED[path]))


@pytest.mark.parametrize(("path", "method"), [(path, method) for path, method, _ in TABLE if "{name}" in path])
def test_an_unknown_job_is_answered_with_the_nearest(path: str, method: str) -> None:
    body = b"{}" if method == "POST" else b""
    problem = check_problem(ask(method, filled(path, "etk"), body=body), 404, "no-such-job")
    assert problem["job"] == "etk"
    assert "etl" in problem["detail"]


@pytest.mark.parametrize("endpoint", OF_ONE_JOB, ids=lambda endpoint: f"{endpoint.methods[0]} {endpoint.path}")
def test_with_several_jobs_one_has_to_be_named(endpoint: Endpoint) -> None:
    answer = ask(endpoint.methods[0], f"/{endpoint.path}", "a", "b", body=b"{}")
    problem = check_problem(answer, 409, "ambiguous-job")
    assert "/jobs/a" in problem["detail"]


@pytest.mark.parametrize("verb", ["kill", "stop", "pause", "resume"])
def test_what_a_state_does_not_allow_names_job_and_state(verb: str) -> None:
    problem = check_problem(ask("POST", f"/{verb}"), 409, "wrong-state")
    assert (problem["job"], problem["state"]) == ("etl", "stopped")


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "kind"),
    [
        ("GET", "/hbb", {}, 404, "no-such-route"),
        ("GET", "/jobs/etl/hb/", {}, 404, "no-such-route"),
        ("GET", "/jobs/etl%2fhb", {}, 404, "no-such-route"),
        ("GET", "/jobs/../hb", {}, 404, "no-such-route"),
        ("POST", "/start", {"body": b"{'a': "}, 400, "bad-request"),
        ("POST", "/start", {"body": b"\xff\xfe"}, 400, "bad-request"),
        ("POST", "/start", {"query": "wait=soon"}, 400, "bad-request"),
        ("POST", "/start", {"query": "wait=1&wait=2"}, 400, "bad-request"),
        ("POST", "/kill", {"query": "grace=-1"}, 400, "bad-request"),
        ("POST", "/start", {"body": b"{}", "query": "a=1"}, 400, "bad-request"),
        ("POST", "/config", {"body": b"4.2"}, 422, "bad-data"),
        ("POST", "/config", {}, 422, "bad-data"),
        ("POST", "/start", {"body": b"x" * (MAX_BODY_BYTES + 1)}, 413, "too-large"),
        ("GET", "/hb", {"query": "x" * 9000}, 414, "uri-too-long"),
        ("GET", "/hb", {"headers": {"x": "y" * 40000}}, 431, "request-header-fields-too-large"),
        ("GET", "/hb", {"headers": {"host": "evil.example"}}, 403, "forbidden"),
        ("GET", "/hb", {"headers": {"host": ""}}, 400, "bad-request"),
        ("GET", "/jobs", {"query": "state=runing"}, 400, "bad-request"),
        ("GET", "/history", {"query": "limit=00000000199999"}, 400, "bad-request"),
        ("GET", "/events", {"headers": {"last-event-id": "x"}}, 400, "bad-request"),
        # what is wrong with a request to all jobs is told once, be there a job that it is for or not
        ("POST", "/jobs/all/kill", {"query": "wait="}, 400, "bad-request"),
        ("GET", "/jobs/all/runs", {"query": "tag=none&limit=0"}, 400, "bad-request"),
        ("GET", "/jobs/all/status", {"query": "tag=none&at=soon"}, 400, "bad-request"),
        ("GET", "/jobs/all/stack", {"query": "tag=none&all=2"}, 400, "bad-request"),
        ("POST", "/jobs/all/config", {"query": "tag=none", "body": b"[]"}, 422, "bad-data"),
    ],
)
def test_every_refusal_is_a_problem_document(method: str, path: str, more: Any, status: int, kind: str) -> None:
    check_problem(ask(method, path, **more), status, kind)


def test_no_job_at_all_is_told_as_such() -> None:
    async def asked() -> Answer:
        return await Site().ask("GET", "/hb")

    check_problem(asyncio.run(asked()), 404, "no-such-job")


def test_a_defect_in_a_handler_is_a_problem_too_and_tells_nothing() -> None:
    async def asked() -> Answer:
        site = Site("etl")
        site.supervisor.find = lambda _: 1 / 0  # type: ignore[assignment,return-value]
        return await site.ask("GET", "/hb")

    assert "division" not in check_problem(asyncio.run(asked()), 500, "internal-error")["detail"]
