"""Who may do what: every route and method of the table, by every kind of visitor, against a few rules written here."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.documents import section
from helpers.rows import RUN, job_row, run_started, status_lines
from helpers.waiting import until
from starlette.responses import Response

from harnessd.server.definition import Definition
from harnessd.server.history import History
from harnessd.server.policy import Rules
from harnessd.server.records import Event
from harnessd.server.store import Store
from harnessd.server.supervisor import Folders, Supervisor
from harnessd.server.tokens import TokenReader, Tokens
from harnessd.web import app as web
from harnessd.web import refusals
from harnessd.web.app import ENDPOINTS, make_app, paths
from harnessd.web.call import Call, Context
from harnessd.web.follow import Followers
from harnessd.web.guard import GuardPolicy, Token

# The rules

ORDER = ["read", "operate", "admin"]
LOOKS = {"", "hb", "status", "config", "runs", "history", "events", "logs", "metrics", "jobs", "{name}", "healthz"}
LOOKS |= {"openapi.json"}
ACTS = {"kill", "start", "stop", "pause", "resume", "restart", "config", "stack"}
ADMINISTERS = {"reload"}
ABOUT_ALL = {"/reload", "/metrics"}

HERE = "127.0.0.1:2222"
HOSTS = {HERE: True, "evil.example": False}
ORIGINS = (None, f"http://{HERE}", "https://evil.example")
SITES = {None: True, "same-origin": True, "cross-site": False}


class Peer(NamedTuple):
    client: tuple[str, int] | None
    server: tuple[str, int | None]
    trusted: bool


PEERS = {
    "loopback": Peer(("127.0.0.1", 4000), ("127.0.0.1", 2222), True),
    "loopback that is not trusted": Peer(("127.0.0.1", 4000), ("127.0.0.1", 2222), False),
    "remote": Peer(("192.0.2.7", 4000), ("192.0.2.1", 2222), False),
    "socket": Peer(None, ("/s/harnessd.sock", None), True),
}
# The role that a token gives, None for one that is not in force, and whether it is for feed-* alone.
TOKENS: dict[str, tuple[str | None, bool]] = {
    "none": (None, False),
    "unknown": (None, False),
    "revoked": (None, False),
    "expired": (None, False),
    "read": ("read", False),
    "operate": ("operate", False),
    "admin": ("admin", False),
    "settings": ("admin", False),
    "read-feeds": ("read", True),
    "operate-feeds": ("operate", True),
    "admin-feeds": ("admin", True),
}


def needed(method: str, path: str) -> str:
    word = path.rsplit("/", 1)[-1]
    if word in ADMINISTERS:
        return "admin"
    if method in ("GET", "HEAD") and word in LOOKS:
        return "read"
    assert word in ACTS, f"say here what role {method} {path} takes"
    return "operate"


def shows(path: str) -> bool:
    return needed("GET", path) == "read"


def expected(method: str, path: str, job: str, token: str, peer: Peer, host: str, own_site: bool) -> int:
    role, limited = ("admin", False) if peer.trusted else TOKENS[token]
    if role is None:
        return 401
    if not HOSTS[host] and peer.client is not None:
        return 403
    if not own_site and needed(method, path) != "read":
        return 403
    if ORDER.index(role) < ORDER.index(needed(method, path)):
        return 403
    if limited and path in ABOUT_ALL:
        return 403
    if limited and "{name}" in path and not job.startswith("feed-"):
        return 404
    return 200


# The application

ROUTES = [(method, path) for endpoint in ENDPOINTS for path in paths(endpoint) for method in endpoint.methods]


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class NoHost:
    on_exit: Any = None


class Site:
    """The application, with the jobs feed-a, feed-b and hidden, and a token of each kind."""

    def __init__(self, state: Path, secrets: dict[str, str], history: History | None = None) -> None:
        self.recorded: list[Any] = []
        supervisor = Supervisor(NoHost(), Folders(Path("/nonexistent"), 1), self.recorded.append)  # type: ignore[arg-type]
        for name in ("feed-a", "feed-b", "hidden"):
            supervisor.add(Definition(name, Rules(), 0.1, config={}, run_spec=lambda spec: spec, digest="", shown={}))
        self.recorded.clear()
        self._secrets = secrets
        followers = Followers(history, self.recorded.append) if history else None
        tokens = TokenReader(state)
        self.context = Context(supervisor, _healthy, 1000, history=history, followers=followers, tokens=tokens)
        settings = (Token("settings", secrets["settings"]),)
        policies = [GuardPolicy(frozenset(), settings, trusted) for trusted in (False, True)]
        self._apps = {policy.trust_loopback: make_app(self.context, policy) for policy in policies}

    async def ask(
        self,
        method: str,
        path: str,
        token: str = "none",
        peer: Peer = PEERS["remote"],
        host: str = HERE,
        query: str = "",
        send: Any = None,
        **headers: str | None,
    ) -> Answer:
        given = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
        if token != "none":
            given["authorization"] = f"Bearer {self._secrets[token]}"
        scope: dict[str, Any] = {"type": "http", "method": method, "scheme": "http", "path": path, "root_path": ""}
        scope |= {"raw_path": path.encode(), "query_string": query.encode(), "client": peer.client}
        scope |= {"headers": [(b"host", host.encode()), *((k.encode(), v.encode()) for k, v in given.items())]}
        answer, requests, ended = Answer(), [{"type": "http.request", "body": b""}], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if requests:
                return requests.pop()
            await ended.wait()
            return {"type": "http.disconnect"}

        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            elif not message.get("more_body"):
                ended.set()
            answer.body += message.get("body", b"")
            if send:
                send(answer, message)

        await self._apps[peer.trusted](scope | {"server": peer.server, "state": {}}, receive, noted)
        return answer


def _healthy() -> Any:
    return {"status": "ok", "jobs": {"stopped": 3}}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def secrets(state: Path) -> dict[str, str]:
    tokens, feeds = Tokens(state), ["feed-*"]
    made = {"unknown": "hd_unknown", "settings": "chosen by hand"}
    for name, role, jobs, expires in (
        ("read", "read", (), None),
        ("operate", "operate", (), "1h"),
        ("admin", "admin", (), None),
        ("read-feeds", "read", feeds, None),
        ("operate-feeds", "operate", feeds, None),
        ("admin-feeds", "admin", feeds, None),
        ("expired", "admin", (), "1ms"),
        ("revoked", "admin", (), None),
    ):
        made[name] = tokens.new(name, role, jobs, expires)  # type: ignore[arg-type]
    tokens.revoke("revoked")
    reader = TokenReader(state)
    until(lambda: reader.grant(made["expired"].encode()) is None, "it has expired")
    assert made.keys() | {"none"} == TOKENS.keys()
    return made


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "FREE_FAILURES", 10**9)


# The walk


async def done(call: Call) -> Response:
    return Response(b"{}")


@pytest.fixture
def site(state: Path, secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Site:
    """The application whose handlers do nothing: what comes as far as one is answered with 200."""
    monkeypatch.setattr(web, "ENDPOINTS", tuple(endpoint._replace(handler=done) for endpoint in ENDPOINTS))
    return Site(state, secrets)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_visitor_gets_what_the_rules_say(site: Site, method: str, path: str) -> None:
    visitors = list(itertools.product(TOKENS, PEERS, HOSTS, ORIGINS, SITES))

    async def walk() -> None:
        for job in ("feed-a", "hidden") if "{name}" in path else ("",):
            for token, peer, host, origin, sec in visitors:
                sent = {"origin": origin, "sec_fetch_site": sec}
                filled = path.replace("{name}", job)
                answer = await site.ask(method, filled, token, PEERS[peer], host, **sent)
                own_site = origin in (None, f"http://{host}") and SITES[sec]
                wanted = expected(method, path, job, token, PEERS[peer], host, own_site)
                assert answer.status == wanted, (filled, token, peer, host, sent, answer.body)

    asyncio.run(walk())


def test_every_endpoint_is_walked_and_takes_the_role_that_the_rules_say() -> None:
    for endpoint in ENDPOINTS:
        for path, method in itertools.product(paths(endpoint), endpoint.methods):
            assert (method, path) in ROUTES
            assert str(endpoint.role) == needed(method, path)
            assert endpoint.whole == (path in ABOUT_ALL)


def test_the_page_on_access_says_what_each_role_may() -> None:
    page = section("docs/access.md", "Roles")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    documented = {role: set(re.findall(r"`([^`]+)`", may)) for role, may in rows.items()}
    assert list(documented) == ORDER
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace("{name}", "<name>")
        word = path if path.count("/") < 3 else path.rsplit("/", 1)[-1]
        assert word in documented[str(endpoint.role)]


def test_a_role_that_is_too_small_is_told_which_one_is_needed(site: Site) -> None:
    answer = asyncio.run(site.ask("POST", "/reload", "operate"))
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["connection"] == "close"
    assert "role admin" in answer.json["detail"]
    (event,) = site.recorded
    assert (event.kind, event.actor) == ("refused", "token:operate@192.0.2.7:4000")


def test_nobody_is_told_what_was_wrong_with_a_token(site: Site) -> None:
    wrong = [token for token, (role, _) in TOKENS.items() if role is None]

    async def ask() -> list[Answer]:
        basic = await site.ask("GET", "/hb", authorization="Basic c2V0dGluZ3M6eA==")
        return [basic, *[await site.ask("GET", "/hb", token) for token in wrong]]

    answers = asyncio.run(ask())
    assert len(answers) == 5
    assert all(answer == answers[0] for answer in answers)
    assert (answers[0].status, answers[0].headers["www-authenticate"]) == (401, "Bearer")


# What a token that is limited to some jobs is shown


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A history in which every second thing is of the job that is hidden."""
    store = Store.open(tmp_path_factory.mktemp("db") / "harnessd.db")
    for number, name in enumerate(("feed-a", "hidden", "feed-b", "hidden-too")):
        store.put(job_row(name))
        store.put(run_started(RUN + number, name))
    for run in (RUN, RUN + 1):
        store.put_lines(run, status_lines(1, 30, run), offset=1, count=30)
    for seq in range(1, 31):
        for job in ("feed-a", "hidden", None, "feed-b"):
            store.put(Event("state", 1_700_000_000_000_000 + seq, job, actor="me", data={"of": job}))
    store.flush().result(10)
    yield store
    store.close()


def real(state: Path, secrets: dict[str, str], store: Store) -> Site:
    return Site(state, secrets, History(store))


QUERIES = ("", "format=csv", "format=ndjson", "limit=3", "order=asc", "kind=state", "kind=state,torn", "full=1")


@pytest.mark.parametrize("path", [path for method, path in ROUTES if method == "GET" and shows(path)])
def test_nothing_that_is_shown_names_a_hidden_job(
    path: str, state: Path, secrets: dict[str, str], store: Store
) -> None:
    async def look() -> None:
        site = real(state, secrets, store)
        for job, query in itertools.product(("feed-a", "all", "hiddem"), QUERIES):
            if path != "/openapi.json":
                answer = await site.ask("GET", path.replace("{name}", job), "read-feeds", query=query)
                assert b"hidden" not in answer.body, (job, query)
        assert site.context.history
        site.context.history.close()

    asyncio.run(look())


def test_all_rows_of_its_jobs_are_shown_page_by_page(state: Path, secrets: dict[str, str], store: Store) -> None:
    async def pages(site: Site, path: str, query: str) -> list[Any]:
        rows, cursor = [], ""
        while True:
            page = (await site.ask("GET", path, "read-feeds", query=query + cursor)).json
            rows += page["rows"]
            if page["next"] is None:
                return rows
            cursor = f"&cursor={page['next']}"

    async def look() -> None:
        site = real(state, secrets, store)
        for path, order, limit in itertools.product(("/history", "/jobs/all/history"), ("asc", "desc"), (1, 7, 100)):
            rows = await pages(site, path, f"order={order}&limit={limit}")
            assert len(rows) == 30
        for path, query in itertools.product(("/events", "/jobs/all/events"), ("limit=7", "limit=7&kind=state,torn")):
            rows = await pages(site, path, query)
            assert len(rows) == 60
        assert site.context.history
        site.context.history.close()

    asyncio.run(look())


def test_a_job_that_is_hidden_is_answered_like_one_that_is_not_there(
    state: Path, secrets: dict[str, str], store: Store
) -> None:
    async def look() -> None:
        site = real(state, secrets, store)
        for path in ("/jobs/{}", "/jobs/{}/hb", "/jobs/{}/history", "/jobs/{}/events", "/jobs/{}/stop"):
            answers = [await site.ask("GET", path.format(name), "operate-feeds") for name in ("hidden", "hiddex")]
            answers += [await site.ask("GET", path.format("hidden-too"), "operate-feeds")]  # which has left a history
            told = [answer.body.replace(b"hidden-too", b"X").replace(b"hidden", b"X") for answer in answers]
            assert told[0] == told[1].replace(b"hiddex", b"X") == told[2]
            assert [answer.status for answer in answers] == [404, 404, 404]
        asked = await site.ask("GET", "/history", "read-feeds", query="job=hidden")
        assert asked.status == 404
        assert site.context.history
        site.context.history.close()

    asyncio.run(look())


def test_health_counts_no_hidden_job(state: Path, secrets: dict[str, str]) -> None:
    async def look() -> None:
        site = Site(state, secrets)
        for token, stopped in (("read", 3), ("read-feeds", 2)):
            assert (await site.ask("GET", "/healthz", token)).json["jobs"] == {"stopped": stopped}

    asyncio.run(look())


def test_what_is_done_to_all_is_done_to_its_jobs(state: Path, secrets: dict[str, str], store: Store) -> None:
    async def act() -> None:
        site = real(state, secrets, store)
        answer = await site.ask("POST", "/jobs/all/stop", "operate-feeds")
        assert [result["job"] for result in answer.json["results"]] == ["feed-a", "feed-b"]
        assert (await site.ask("GET", "/jobs", "read-feeds")).json["jobs"][1]["name"] == "feed-b"
        ambiguous = await site.ask("GET", "/hb", "read-feeds")
        assert ambiguous.status == 409 and "there are 2" in ambiguous.json["detail"]
        assert site.context.history
        site.context.history.close()

    asyncio.run(act())


def test_a_follower_hears_of_its_jobs_until_its_token_is_revoked(
    state: Path, secrets: dict[str, str], store: Store
) -> None:
    tokens = Tokens(state)
    secrets = secrets | {"follower": tokens.new("follower", "read", ["feed-*"])}

    async def follow() -> None:
        site = real(state, secrets, store)
        assert site.context.history and site.context.followers
        store.on_committed = site.context.followers.committed
        stood, heard = asyncio.Event(), asyncio.Event()

        def sent(answer: Answer, _: Any) -> None:
            if re.search(rb"\n\nid: \d+\n\n", answer.body):  # the stored ones are over
                stood.set()
            if b"event: last" in answer.body:
                heard.set()

        asking = site.ask("GET", "/events", "follower", query="follow=1&cursor=0", send=sent)
        answering = asyncio.ensure_future(asking)
        await asyncio.wait_for(stood.wait(), 10)
        for job in ("hidden", "feed-a"):
            store.put(Event("last", 1, job))
        await asyncio.wait_for(heard.wait(), 10)
        tokens.revoke("follower")
        store.put(Event("unheard", 1, "feed-a"))
        answer = await asyncio.wait_for(answering, 10)
        assert (answer.body.count(b"event: state"), answer.body.count(b"event: last")) == (60, 1)
        assert b"hidden" not in answer.body and b"unheard" not in answer.body
        site.context.history.close()

    asyncio.run(follow())
