from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.past import at, run_id, some_hours

from harnessd.server import history as module
from harnessd.server.asked import Asked
from harnessd.server.definition import Definition
from harnessd.server.history import History
from harnessd.server.policy import Rules
from harnessd.server.rows import Json
from harnessd.server.store import Store
from harnessd.server.supervisor import Folders, Supervisor
from harnessd.server.tape import Line
from harnessd.server.timespan import iso
from harnessd.web import fleet, formats
from harnessd.web.app import make_app
from harnessd.web.call import Context
from harnessd.web.guard import GuardPolicy

pytestmark = pytest.mark.usefixtures("every_answer_is_in_the_contract")


class NoHost:
    """A host on which nothing can be started."""

    def __init__(self) -> None:
        self.on_exit: Any = None

    def spawn(self, spec: Any) -> Any:
        raise AssertionError("nothing is to be started")

    end = signal = acknowledge = spawn


def supervisor_of(*names: str) -> Supervisor:
    supervisor = Supervisor(NoHost(), Folders(Path("/nonexistent"), 1 << 20), lambda _: None)
    for name in names:
        supervisor.add(Definition(name, Rules(), 0.1, config={}, run_spec=lambda spec: spec, digest="", shown={}))
    return supervisor


@asynccontextmanager
async def site(store: Store | None, *names: str) -> AsyncIterator[httpx.AsyncClient]:
    """The application over a store, for the jobs of `some_hours` unless others are named."""
    kept = History(store) if store else None
    supervisor = supervisor_of(*(names or ("feed", "etl", "idle")))
    context = Context(supervisor, lambda: {"status": "ok"}, 1000, history=kept)
    transport = httpx.ASGITransport(make_app(context, GuardPolicy()), client=("127.0.0.1", 4000))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:2222") as client:
        client.supervisor = supervisor  # type: ignore[attr-defined]
        yield client
    if kept:
        kept.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = Store.open(tmp_path_factory.mktemp("db") / "harnessd.db")
    some_hours(store)
    yield store
    store.close()


def get(store: Store | None, path: str, *names: str, **more: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        async with site(store, *names) as client:
            return await client.get(path, **more)

    return asyncio.run(asked())


def refused(answer: httpx.Response, status: int, kind: str) -> str:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    problem = answer.json()
    assert problem["kind"] == kind
    return str(problem["detail"])


# where it stands


@pytest.mark.parametrize(
    ("path", "jobs"),
    [
        ("/jobs/feed/history", {"feed"}),
        ("/jobs/all/history", {"feed", "etl"}),
        ("/history", {"feed", "etl"}),
        ("/history?job=etl", {"etl"}),
        ("/jobs/etl/runs", {"etl"}),
        ("/jobs/etl/events", {"etl"}),
        ("/events", {"feed", "etl", None}),
        ("/jobs/all/events", {"feed", "etl", None}),
        ("/events?job=feed", {"feed"}),
        ("/jobs/feed/metrics", {"feed"}),
    ],
)
def test_rows_are_of_the_job_that_is_named_or_of_all(store: Store, path: str, jobs: set[str | None]) -> None:
    answer = get(store, path)
    assert answer.status_code == 200
    assert set(answer.json()) == {"rows", "next"}
    assert {row["job"] for row in answer.json()["rows"]} == jobs


def test_runs_at_the_root_are_of_the_only_job(store: Store) -> None:
    assert len(get(store, "/runs", "etl").json()["rows"]) == 4
    refused(get(store, "/runs"), 409, "ambiguous-job")


def test_runs_and_metrics_of_all_are_a_page_a_job(store: Store) -> None:
    answer = get(store, "/jobs/all/runs?limit=2")
    assert answer.status_code == 207
    found = {each["job"]: len(each["body"]["rows"]) for each in answer.json()["results"]}
    assert found == {"feed": 1, "etl": 2, "idle": 0}
    results = get(store, "/jobs/all/metrics?format=csv").json()["results"]
    assert {each["status_code"] for each in results} == {400}


def test_without_a_limit_a_page_a_job_is_no_longer_than_fits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for most, length in ((9, 3), (1, 1)):
        monkeypatch.setattr(fleet, "_MOST_ROWS", most)
        results = get(store, "/jobs/all/runs").json()["results"]
        assert {each["job"]: len(each["body"]["rows"]) for each in results} == {"feed": 1, "etl": length, "idle": 0}


def test_a_job_that_is_no_longer_registered_has_its_history(store: Store) -> None:
    for path in ("/jobs/etl/history", "/jobs/etl/runs", "/jobs/etl/events", "/history?job=etl"):
        assert get(store, path, "feed").json()["rows"]
    assert get(store, "/jobs/etl/status?at=now", "feed").json()["status"]
    assert "feed" in refused(get(store, "/jobs/fed/history"), 404, "no-such-job")
    refused(get(store, "/history?job=fed"), 404, "no-such-job")


def test_a_script_without_a_state_dir_keeps_no_history() -> None:
    for path in ("/history", "/runs", "/events", "/events?follow=1", "/jobs/one/metrics", "/status?at=now"):
        assert "unless state_dir is set" in refused(get(None, path, "one"), 409, "wrong-state")
    refused(get(None, "/jobs/two/history", "one"), 404, "no-such-job")


# pages


def test_pages_follow_each_other_by_their_cursors(store: Store) -> None:
    rows, cursor = [], None
    while True:
        query = {"limit": 50, "run": run_id(at())} | ({"cursor": cursor} if cursor else {})
        page = get(store, "/jobs/feed/history", params=query).json()
        rows += page["rows"]
        if (cursor := page["next"]) is None:
            break
    assert [row["seq"] for row in rows] == list(range(321, 0, -1))


def test_a_bad_value_is_a_bad_request_that_says_what_was_wrong(store: Store) -> None:
    for query, word in [("limit=0", "10000"), ("sinse=-1h", "did you mean 'since'"), ("format=xml", "ndjson")]:
        assert word in refused(get(store, f"/jobs/feed/history?{query}"), 400, "bad-request")
    for path in ("/jobs/feed/history?job=etl", "/jobs/feed/runs?job=etl", "/events?follow=yes", "/history?every=1m"):
        refused(get(store, path), 400, "bad-request")
    refused(get(store, "/jobs/feed/status?at=then"), 400, "bad-request")
    for number in ("0" * 30 + "9" * 25, "0" * 5000):
        refused(get(store, f"/jobs/feed/history?run={number}"), 400, "bad-request")
    assert get(store, "/jobs/all/hb?limit=abc").status_code == 207, "it is no parameter of that route"
    assert "at once" in refused(get(store, "/jobs/all/metrics?limit=10000"), 400, "bad-request")


def test_a_head_has_the_type_and_no_rows(store: Store) -> None:
    async def asked() -> None:
        async with site(store) as client:
            for shape in ("json", "ndjson", "csv"):
                head = await client.head(f"/jobs/feed/history?format={shape}")
                body = await client.get(f"/jobs/feed/history?format={shape}")
                assert (head.status_code, head.headers["content-type"]) == (200, body.headers["content-type"])
            assert (await client.head("/events?follow=1")).status_code == 200

    asyncio.run(asked())


# formats


def test_ndjson_without_a_limit_is_every_row(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_ROWS", 40)
    answer = get(store, "/jobs/feed/history?order=asc", headers={"accept": "application/x-ndjson"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert [row["seq"] for row in rows] == list(range(1, 322))
    assert rows == get(store, "/jobs/feed/history?order=asc&limit=1000").json()["rows"]
    assert len(get(store, "/jobs/feed/history?format=ndjson&limit=70").text.splitlines()) == 70
    assert len(get(store, "/history?format=ndjson").text.splitlines()) == 321 + 6 * 3 + 12
    assert get(store, "/jobs/idle/history?format=ndjson").text == ""


def test_half_a_surrogate_pair_is_escaped_in_a_csv_too() -> None:
    asked = Asked("history", "etl", fields=(("name", ("name",)),))
    row = ("2026-01-01T00:00:00Z", "etl", 1, 1, Json(r'{"name":"caf\udce9"}'))
    assert formats.lines("csv", asked, [row], first=False) == rb"2026-01-01T00:00:00Z,etl,1,1,caf\udce9" + b"\n"


def test_csv_has_a_header_and_columns_for_the_fields(store: Store) -> None:
    answer = get(store, "/jobs/etl/history?order=asc&limit=2", headers={"accept": "text/html, text/csv;q=0.9"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.reader(io.StringIO(answer.text)))
    assert rows[0] == ["at", "job", "run", "seq", "status"]
    assert rows[1] == [iso(at(minutes=1)), "etl", str(run_id(at(minutes=1))), "1", '{"done": 0.0, "ok": true}']
    chosen = get(store, "/jobs/etl/history?order=asc&limit=1&format=csv&fields=ok,done,none").text
    assert next(csv.reader(io.StringIO(chosen)))[4:] == ["ok", "done", "none"]
    assert list(csv.reader(io.StringIO(chosen)))[1][4:] == ["true", "0.0", ""]
    bucket = get(store, "/jobs/feed/history?order=asc&limit=1&format=csv&fields=orders&every=1h").text
    header, row = csv.reader(io.StringIO(bucket))
    assert header[4:] == ["orders", "bucket", "rows", "orders.min", "orders.max", "orders.mean"]
    assert row[4:] == ["590", iso(at()), "60", "0", "590", "295.0"]


def test_json_is_what_whoever_has_no_wish_gets(store: Store) -> None:
    for accept in ("*/*", "text/html", "", "application/json, text/csv"):
        answer = get(store, "/jobs/feed/history?limit=1", headers={"accept": accept})
        assert answer.headers["content-type"] == "application/json"


def test_a_status_of_any_text_passes_through_unharmed(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "harnessd.db")
    some_hours(store)
    texts = ['"\\ud800"', '"\\u0000"', '"é\u2028\\n"', "1e999", '"a,b\\"c"', "[null,true]"]
    run = run_id(at())
    store.put_lines(run, [Line(run, 900 + n, at(7) + n, "status", t) for n, t in enumerate(texts)], 1, 9).result(10)
    page = get(store, "/jobs/feed/history?since=" + iso(at(7)) + "&order=asc").json()
    assert [row["status"] for row in page["rows"]] == [json.loads(text) for text in texts]
    for shape in ("ndjson", "csv"):
        assert get(store, f"/jobs/feed/history?limit=6&format={shape}").status_code == 200
    store.close()


def test_a_client_that_leaves_a_long_answer_ends_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_ROWS", 10)
    read: list[int] = []

    async def asked() -> None:
        kept = History(store)
        page = kept.page

        async def counted(asked: Any) -> Any:
            read.append(1)
            return await page(asked)

        monkeypatch.setattr(kept, "page", counted)
        app = make_app(Context(supervisor_of("feed"), dict, 1000, history=kept), GuardPolicy())
        await leave_after(app, "/jobs/feed/history", b"format=ndjson", pieces=3)
        kept.close()

    asyncio.run(asked())
    assert len(read) <= 6


async def leave_after(app: Callable[..., Awaitable[None]], path: str, query: bytes, pieces: int) -> None:
    """Ask and disconnect after so many pieces of the answer."""
    gone = asyncio.Event()
    left = pieces

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            gone.set()
        await asyncio.sleep(0)

    scope = {"type": "http", "method": "GET", "scheme": "http", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": query, "headers": [(b"host", b"127.0.0.1")], "root_path": ""}  # type: ignore[dict-item]
    await app(scope | {"client": ("127.0.0.1", 4), "server": ("127.0.0.1", 2222)}, receive, send)


# the status as of then


def test_the_status_as_of_a_moment_has_the_form_of_a_status(store: Store) -> None:
    answer = get(store, "/jobs/feed/status", params={"at": iso(at(3, 10))}).json()
    assert answer == {
        "job": "feed",
        "run": run_id(at()),
        "seq": 181,
        "at": iso(at(3)),
        "status": {"orders": 1800, "book": {"bid": 99.5}},
    }
    before = get(store, "/jobs/feed/status", params={"at": iso(at() - 1)}).json()
    assert before == {"job": "feed", "run": None, "seq": None, "at": None, "status": None}


def test_a_status_that_is_not_stored_yet_counts_as_of_now(store: Store) -> None:
    async def asked() -> None:
        async with site(store) as client:
            entry = client.supervisor.find("feed")  # type: ignore[attr-defined]
            entry.last_status = Line(run_id(at()), 322, at(5, 59, 30), "status", '{"orders":1}')
            assert (await client.get("/jobs/feed/status?at=now")).json()["seq"] == 322
            older = await client.get("/jobs/feed/status", params={"at": iso(at(5, 59, 29))})
            assert older.json()["seq"] == 321
            entry.last_status = Line(run_id(at()), 320, at(5, 58), "status", '{"orders":1}')
            assert (await client.get("/jobs/feed/status?at=now")).json()["seq"] == 321

    asyncio.run(asked())
