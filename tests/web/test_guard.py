from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harnessd.errors import ConfigError
from harnessd.server.tokens import Role
from harnessd.web.guard import Guard, GuardPolicy, Token, Visitor, is_loopback, parse_authority
from harnessd.web.peercred import Credentials, credentials

LOOPBACK = ("127.0.0.1", 40312)
REMOTE = ("192.0.2.7", 40312)
TCP = ("127.0.0.1", 2222)
SOCKET = ("/run/harnessd/http.sock", None)
HERE = "127.0.0.1:2222"
TOKENS = GuardPolicy(tokens=(Token("ci", "s3cret"), Token("ops", "pässword")))


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    actor: str = ""


def ask(
    path: str = "/hb",
    *,
    method: str = "GET",
    host: str | None = HERE,
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    client: tuple[str, int] | None = LOOPBACK,
    server: tuple[str, int | None] | None = TCP,
    policy: GuardPolicy | None = None,
    query: bytes = b"",
    scheme: str = "http",
    peer: Credentials | None = None,
) -> Answer:
    """What the guard makes of one request: 200 and the actor from the app behind it, or a problem.

    The app takes kill, stop and whatever is not GET for something that changes.
    """
    looks = method == "GET" and not path.endswith(("/kill", "/stop"))
    pairs = list(headers.items()) if isinstance(headers, dict) else list(headers or ())
    if host is not None:
        pairs.insert(0, ("host", host))
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs]
    scope: dict[str, Any] = {"type": "http", "method": method, "scheme": scheme, "path": path.split("?")[0]}
    scope |= {"raw_path": path.encode("latin-1"), "query_string": query}
    scope |= {"headers": raw, "client": client, "server": server, "state": {"peer": peer}}
    answer = Answer(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        visitor: Visitor = scope["state"]["visitor"]
        visitor.enter(Role.READ, looks=looks, whole=False)
        answer.actor = visitor.actor
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> dict[str, Any]:
        raise AssertionError("the guard must not read the body")

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.body = json.loads(message["body"])

    asyncio.run(Guard(app, policy or GuardPolicy())(scope, receive, send))
    if answer.status != 200:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["connection"] == "close"
        assert answer.body["status"] == answer.status
    assert not any(name.startswith("access-control") for name in answer.headers)
    return answer


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


ORIGINS = {None: True, f"http://{HERE}": True, "null": False, "https://evil.example": False, "http://127.0.0.1": False}
SITES = {None: True, "same-origin": True, "none": True, "same-site": False, "cross-site": False, "": False}
HOSTS = {HERE: True, "evil.example:2222": False}
PEERS = {LOOPBACK: True, REMOTE: False, ("::1", 1): True, ("::ffff:127.0.0.1", 1): True, ("testclient", 1): False}
PATHS = {"/kill": True, "/jobs/hb/stop": True, "/hb": False, "/jobs/etl/status": False, "/jobs/etl": False}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("client", PEERS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_host_origin_site_and_peer_together_decide_who_gets_in(path: str, client: tuple[str, int], method: str) -> None:
    changes = PATHS[path] or method == "POST"
    for host, origin, site in product(HOSTS, ORIGINS, SITES):
        sent = {name: value for name, value in (("Origin", origin), ("Sec-Fetch-Site", site)) if value is not None}
        same_site = ORIGINS[origin] and SITES[site]
        welcome = HOSTS[host] and PEERS[client] and (same_site or not changes)
        answer = ask(path, method=method, host=host, headers=sent, client=client)
        assert answer.status == (200 if welcome else 403), (host, origin, site)


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "OPTIONS"])
def test_a_reading_path_with_another_method_changes_something(method: str) -> None:
    assert ask("/config", method=method, headers={"Origin": "http://evil.example"}).status == 403


ALLOWED = GuardPolicy(allowed_hosts=frozenset({"Box.Example", "only.example:8443"}))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("10.1.2.3:9", 200),
        ("[::1]:2222", 200),
        ("[2001:DB8::1]", 200),
        ("localhost", 200),
        ("LocalHost.:2222", 200),
        ("box.example", 200),
        ("BOX.EXAMPLE.:1", 200),
        ("only.example:8443", 200),
        ("only.example:8444", 403),
        ("only.example", 403),
        ("a.box.example", 403),
        ("app.localhost", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.1", 403),
        ("2130706433", 403),
        ("0x7f000001", 403),
        ("", 400),
        ("::1", 400),
        ("[::1", 400),
        ("[127.0.0.1]", 400),
        ("[fe80::1%25lo]", 400),
        ("localhost:x", 400),
        ("localhost:999999", 400),
        ("localhost..", 400),
        ("evil@localhost", 400),
        ("localhost, evil", 400),
        ("l\u043ecalhost".encode().decode("latin-1"), 400),  # its first o is Cyrillic
        ("a." * 200, 400),
    ],
)
def test_a_host_is_an_ip_or_localhost_or_listed(host: str, status: int) -> None:
    assert ask(host=host, policy=ALLOWED).status == status


def test_a_missing_host_is_refused() -> None:
    assert ask(host=None).status == 400


@pytest.mark.parametrize("name", ["Host", "Origin", "Sec-Fetch-Site", "Authorization"])
def test_a_doubled_header_that_decides_is_refused(name: str) -> None:
    host = None if name == "Host" else HERE
    answer = ask(host=host, headers=[(name, "localhost"), (name.lower(), "localhost")])
    assert answer.status == 400
    assert name.lower() in answer.body["detail"]


@pytest.mark.parametrize("host", [None, "", "evil.example", "x y"])
def test_the_unix_socket_takes_any_host(host: str | None) -> None:
    answer = ask("/kill", host=host, client=None, server=SOCKET)
    assert (answer.status, answer.actor) == (200, "socket")


def test_a_browser_page_forwarded_to_the_unix_socket_is_still_cross_site() -> None:
    for host in (None, "app"):
        assert ask("/kill", host=host, client=None, server=SOCKET, headers={"Origin": "http://evil"}).status == 403
    assert ask("/kill", host="app", client=None, server=SOCKET, headers={"Origin": "http://app"}).status == 200


@pytest.mark.parametrize("client", [None, ("", 0)])
@pytest.mark.parametrize("server", [TCP, None])
def test_a_tcp_peer_that_reset_its_connection_is_not_taken_for_the_unix_socket(
    client: tuple[str, int] | None, server: tuple[str, int] | None
) -> None:
    assert ask("/kill", client=client, server=server, policy=TOKENS).status == 403


@pytest.mark.parametrize(
    ("origin", "host", "scheme", "status"),
    [
        ("http://localhost:2222", "localhost:2222", "http", 200),
        ("http://LOCALHOST:2222", "localhost.:2222", "http", 200),
        ("http://localhost", "localhost:80", "http", 200),
        ("https://localhost", "localhost", "https", 200),
        ("http://[::1]:2222", "[0:0::1]:2222", "http", 200),
        ("http://localhost", "localhost", "https", 403),
        ("http://localhost:2222", "127.0.0.1:2222", "http", 403),
        ("http://localhost:2223", "localhost:2222", "http", 403),
        ("file://", "localhost", "http", 403),
        ("moz-extension://localhost", "localhost", "http", 403),
        ("http://localhost:2222/", "localhost:2222", "http", 403),
        ("http://evil@localhost:2222", "localhost:2222", "http", 403),
        ("", "localhost", "http", 403),
    ],
)
def test_an_origin_is_its_own_host_with_port_or_refused(origin: str, host: str, scheme: str, status: int) -> None:
    assert ask("/stop", host=host, headers={"Origin": origin}, scheme=scheme).status == status


def test_a_browser_that_tells_nothing_of_its_site_changes_nothing() -> None:
    browser = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64)"}
    assert ask("/kill", host="0.0.0.0:2222", headers=browser).status == 403
    assert ask("/kill", host="0.0.0.0:2222", headers={"User-Agent": "curl/8"}).status == 200
    assert ask("/kill", headers=browser | {"Sec-Fetch-Site": "none"}).status == 200
    assert ask("/hb", headers=browser).status == 200
    assert ask("/kill", headers=browser | bearer("s3cret"), client=REMOTE, policy=TOKENS).status == 200


@pytest.mark.parametrize(
    ("authorization", "actor"),
    [
        ("Bearer s3cret", "token:ci@192.0.2.7:40312"),
        ("bearer  s3cret ", "token:ci@192.0.2.7:40312"),
        ("Bearer pässword".encode().decode("latin-1"), "token:ops@192.0.2.7:40312"),
        ("Bearer s3cre", ""),
        ("Bearer s3crets", ""),
        ("Bearer", ""),
        ("Bearer ", ""),
        ("Basic s3cret", ""),
        ("s3cret", ""),
        ("", ""),
    ],
)
def test_a_remote_peer_needs_the_token(authorization: str, actor: str) -> None:
    answer = ask(client=REMOTE, headers={"Authorization": authorization}, policy=TOKENS)
    assert answer.status == (200 if actor else 401)
    assert answer.actor == actor
    if not actor:
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_wrong_token_and_a_missing_one_get_the_same_answer() -> None:
    wrong = ask(client=REMOTE, headers=bearer("x"), policy=TOKENS)
    assert wrong == ask(client=REMOTE, policy=TOKENS)


def test_without_a_token_set_a_remote_peer_is_told_how_to_set_one() -> None:
    answer = ask(client=REMOTE, headers=bearer("s3cret"))
    assert answer.status == 403
    assert "token under [http] in harnessd.toml" in answer.body["detail"]
    assert "www-authenticate" not in answer.headers


def test_a_loopback_peer_needs_a_token_where_the_loopback_is_not_trusted() -> None:
    policy = replace(TOKENS, trust_loopback=False)
    assert ask(policy=policy).status == 401
    assert ask(policy=policy, headers=bearer("s3cret")).actor == "token:ci@127.0.0.1:40312"
    assert ask(policy=policy, client=None, server=SOCKET).actor == "socket"


def test_the_actor_names_peer_and_port() -> None:
    assert ask().actor == "loopback:127.0.0.1:40312"
    assert ask(client=("::1", 7)).actor == "loopback:[::1]:7"


def test_the_peer_of_the_socket_is_named_by_user_and_process() -> None:
    root = Credentials(1234, 0, "root")
    assert ask("/kill", client=None, server=SOCKET, peer=root).actor == "socket:root/1234"
    own = Credentials(7, os.geteuid(), "me")
    assert ask("/kill", client=None, server=SOCKET, peer=own).actor == "socket:me/7"


def test_another_user_has_no_business_on_the_socket() -> None:
    answer = ask(client=None, server=SOCKET, peer=Credentials(7, os.geteuid() + 1, "eve"))
    assert answer.status == 403
    assert "eve" in answer.body["detail"]


def test_a_real_connection_tells_process_and_user() -> None:
    async def connected() -> Credentials | None:
        ours, theirs = socket.socketpair()
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        try:
            return credentials(transport)
        finally:
            transport.close()
            theirs.close()

    found = asyncio.run(connected())
    assert found and (found.pid, found.uid) == (os.getpid(), os.geteuid())
    assert found.user == pwd.getpwuid(os.geteuid()).pw_name


@pytest.mark.parametrize("secret", ["", " s3cret", "s3cret\n"])
def test_a_token_that_can_never_match_is_a_configuration_error(secret: str) -> None:
    with pytest.raises(ConfigError, match=r"http\.token.*'ci'"):
        Guard(nobody, GuardPolicy(tokens=(Token("ci", secret),)))


def test_an_allowed_host_that_is_no_host_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="http://box"):
        Guard(nobody, GuardPolicy(allowed_hosts=frozenset({"http://box"})))


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/jobs/feed-1.eu_x~/hb", 200),
        ("/jobs/caf%C3%A9/hb", 200),
        ("/jobs/a%20b/hb", 200),
        ("/jobs/..etl/hb", 200),
        ("//hb", 200),
        ("/jobs/../kill", 404),
        ("/jobs/./kill", 404),
        ("/jobs/%2e%2E/kill", 404),
        ("/jobs/..", 404),
        ("/jobs/etl%2fkill", 404),
        ("/jobs/etl%5Ckill", 404),
        ("/jobs/etl\\kill", 404),
        ("/jobs/etl%00/hb", 404),
        ("/jobs/etl%0A/hb", 404),
        ("/jobs/etl%7f/hb", 404),
        ("/jobs/%ff/hb", 404),
        ("/jobs/%c0%af/hb", 404),
        ("/jobs/%zz/hb", 400),
        ("/hb%", 400),
        ("/jobs/é/hb", 400),
        ("/hb\x00", 400),
        ("/a b", 400),
        ("*", 400),
        ("hb", 400),
        ("http://evil/hb", 400),
        ("/" + "a" * 1024, 414),
        ("/jobs/" + "%41" * 400, 414),
    ],
)
def test_a_path_that_only_tricks_spell_is_refused(path: str, status: int) -> None:
    assert ask(path).status == status


def test_queries_and_headers_have_limits() -> None:
    assert ask(query=b"a" * 8192).status == 200
    assert ask(query=b"a" * 8193).status == 414
    assert ask(headers=[("x", "y")] * 99).status == 200
    assert ask(headers=[("x", "y")] * 100).status == 431
    assert ask(headers={"x": "y" * 33_000}).status == 431


@given(st.binary(max_size=60), st.text(max_size=40), st.text(max_size=40))
def test_any_path_host_and_origin_get_an_answer(path: bytes, host: str, origin: str) -> None:
    headers = {"Origin": origin.encode().decode("latin-1")}
    answer = ask(path.decode("latin-1"), host=host.encode().decode("latin-1"), headers=headers)
    assert answer.status in (200, 400, 403, 404)


async def nobody(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("nothing may come through to the app")


def test_websockets_are_refused_and_the_lifespan_passes() -> None:
    sent: list[dict[str, Any]] = []
    seen: list[str] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Guard(nobody, GuardPolicy())({"type": "websocket"}, receive, send))
    asyncio.run(Guard(app, GuardPolicy())({"type": "lifespan"}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert seen == ["lifespan"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True),
        ("127.255.0.9", True),
        ("::1", True),
        ("::ffff:127.9.9.9", True),
        ("::ffff:192.0.2.7", False),
        ("128.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
        ("localhost", False),
        ("127.1", False),
    ],
)
def test_the_loopback_is_known_in_all_its_spellings(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_authorities_are_compared_in_one_spelling() -> None:
    assert parse_authority("[0:0::1]", "http") == parse_authority("[::1]:80", "http")
    assert parse_authority("Localhost.", "https") == parse_authority("localhost:443", "https")
    assert parse_authority("127.0.0.1", "http") != parse_authority("127.0.0.1", "https")
