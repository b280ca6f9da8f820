"""Who gets in, decided before anything else sees the request.

Three rules, each against somebody else:

1. A peer that is neither on the loopback nor on the owner-only Unix socket needs a token. What it may then do is the
   token's role and jobs against what the route needs, which the table of routes says: see `Visitor.enter`.
2. The Host header is an IP, `localhost` or a name that the settings list: a page on evil.example, when that name is
   bound anew to 127.0.0.1, is of this very site to the browser, but still says `Host: evil.example` (DNS rebinding).
3. What a browser sends from another site changes nothing, GET included, for `<img src="http://localhost:2222/kill">`
   comes from a loopback peer with a good Host. Browsers tell by Origin and Sec-Fetch-Site; Sec-Fetch-Site is left out
   towards plain-http addresses like 0.0.0.0, so a browser that tells neither is not believed.

No CORS header is ever sent, so other sites cannot read an answer either. Everything runs on the raw scope: this is in
the path of every `hb`.

Whoever shows no token in force gets one and the same 401, whatever was wrong, and is slowed down (`Slowdown`). The
secret of a made token cannot be guessed, so it is looked at first and never waits; the one in the settings, which a
person has chosen, is compared only after the wait, or trying many at a time would be free.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harnessd.errors import BadRequest, ConfigError, Forbidden, NoSuchRoute, Refused, Unauthorized
from harnessd.server.authority import DEFAULT_PORT, Authority, parse_authority
from harnessd.server.tokens import Grant, Role, TokenReader, matches
from harnessd.web.peercred import Credentials
from harnessd.web.problem import response_for
from harnessd.web.refusals import Slowdown

SINGLE = frozenset((b"host", b"origin", b"sec-fetch-site", b"authorization", b"user-agent"))
OWN_SITE = (None, b"same-origin", b"none")
POLICY_VIOLATION = 1008  # RFC 6455 7.4.1

_PLAIN_PATH = re.compile(rb"(?:/[A-Za-z0-9_~-][A-Za-z0-9_.~-]*)+")
_NO_PATH = re.compile(rb"[^!-~]|%(?![0-9A-Fa-f]{2})|^[^/]|^\Z")


@dataclass(frozen=True)
class Token:
    """A bearer token; the name is what the history calls its holder."""

    name: str
    secret: str


@dataclass(frozen=True)
class GuardPolicy:
    """The settings of the guard. An allowed host is `name`, or `name:port` for that port alone."""

    allowed_hosts: frozenset[str] = frozenset()
    tokens: tuple[Token, ...] = ()
    trust_loopback: bool = True
    max_path_bytes: int = 1024
    max_query_bytes: int = 8 * 1024
    max_headers: int = 100
    max_headers_bytes: int = 32 * 1024


class Visitor(NamedTuple):
    """Who has been let in, and what they may."""

    actor: str
    role: Role
    jobs: tuple[str, ...] | None = None  # globs of those it may see; None: all
    foreign: str | None = None  # why the request is taken for another site's

    def enter(self, role: Role, *, looks: bool, whole: bool) -> None:
        """Raise Forbidden unless it may do what takes that role, changes something unless it `looks`, or is about the
        `whole` of the jobs."""
        if self.foreign and not looks:
            raise Forbidden(self.foreign)
        if self.role < role:
            raise Forbidden(f"cannot do this with role {self.role!s}: it needs a token with role {role!s}")
        if whole and self.jobs is not None:
            raise Forbidden("cannot do this with a token that is limited to some jobs: it is about all of them")

    def sees(self, job: str | None) -> bool:
        """Whether it may see the job; None is what is about no job."""
        return self.jobs is None or (job is not None and matches(job, self.jobs))


class _Peer(NamedTuple):
    actor: str
    grant: Grant
    by_socket: bool = False
    by_token: bool = False
    secret: bytes | None = None  # of the token, while the file may lose it


OWNER = Grant("owner", Role.ADMIN)
OnRefused = Callable[[str, str, Refused], None]


def _ignore(peer: str, path: str, error: Refused) -> None:
    pass


class Guard:
    """ASGI middleware: refuses what the policy refuses, and puts who asks into `scope["state"]["visitor"]`.

    An actor is `socket:USER/PID`, `loopback:127.0.0.1:40312` or `token:NAME@192.0.2.7:40312`. What the app behind it
    refuses a visitor as Forbidden is answered here too. Raises ConfigError for an allowed host or a token that can
    never match.
    """

    def __init__(
        self, app: ASGIApp, policy: GuardPolicy, on_refused: OnRefused = _ignore, stored: TokenReader | None = None
    ) -> None:
        """`on_refused` is told the peer, the path and the refusal of who may not get in (401, 403)."""
        self._app = app
        self._policy = policy
        self._on_refused = on_refused
        self._stored = stored
        self._slowdown = Slowdown()
        self._allowed = frozenset(_allowed_hosts(policy.allowed_hosts))
        self._tokens = [(Grant(token.name, Role.ADMIN), _usable_secret(token)) for token in policy.tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            visitor, secret = await self._admit(scope)
        except (Refused, HTTPException) as error:
            await self._refuse(error, (scope.get("client") or ("",))[0], scope, receive, send)
            return
        scope.setdefault("state", {})["visitor"] = visitor
        try:
            await self._app(scope, receive, send if secret is None else self._while_in_force(secret, send))
        except Forbidden as error:
            await self._refuse(error, visitor.actor, scope, receive, send)

    async def _refuse(
        self, error: Refused | HTTPException, peer: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if isinstance(error, Unauthorized | Forbidden):
            self._on_refused(peer, scope["path"], error)
        response = response_for(error)
        response.headers["connection"] = "close"  # whatever body follows is not read
        await response(scope, receive, send)

    def _while_in_force(self, secret: bytes, send: Send) -> Send:
        """Return a `send` that ends an answer without an end, as a follower's, once the token has gone."""
        sized = ended = False

        async def checked(message: Message) -> None:
            nonlocal sized, ended
            if ended:
                return
            if message["type"] == "http.response.start":
                sized = any(name == b"content-length" for name, _ in message["headers"])
            elif message.get("more_body") and not sized:
                ended = self._stored is None or self._stored.grant(secret) is None
            await send({"type": "http.response.body", "body": b"", "more_body": False} if ended else message)

        return checked

    async def _admit(self, scope: Scope) -> tuple[Visitor, bytes | None]:
        """Return who comes, and the secret of a token that may go while the answer lasts.

        Raises Refused or HTTPException for who or what does not get in.
        """
        self._check_target(scope)
        headers = self._single_headers(scope["headers"])
        peer = self._identify(scope) or await self._with_token(scope["client"], headers.get(b"authorization"))
        host = self._check_host(headers.get(b"host"), peer.by_socket, scope["scheme"])
        foreign = _foreign(headers, host, peer.by_token)
        return Visitor(peer.actor, peer.grant.role, peer.grant.jobs, foreign), peer.secret

    def _check_target(self, scope: Scope) -> None:
        path = scope.get("raw_path") or quote(scope["path"]).encode("ascii")
        if len(path) > self._policy.max_path_bytes:
            raise HTTPException(414, f"cannot take this path: the limit is {self._policy.max_path_bytes} bytes")
        if len(scope["query_string"]) > self._policy.max_query_bytes:
            raise HTTPException(414, f"cannot take this query: the limit is {self._policy.max_query_bytes} bytes")
        if not _PLAIN_PATH.fullmatch(path):
            _check_path(path)

    def _single_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        count = size_bytes = 0
        for name, value in headers:
            count += 1
            size_bytes += len(name) + len(value)
            if name in SINGLE:
                if name in found:
                    raise BadRequest(f"cannot tell which {name.decode()} header is meant: there are two")
                found[name] = value
        if count > self._policy.max_headers:
            raise HTTPException(431, f"cannot take {count} headers: the limit is {self._policy.max_headers}")
        if size_bytes > self._policy.max_headers_bytes:
            raise HTTPException(431, f"cannot take these headers: the limit is {self._policy.max_headers_bytes} bytes")
        return found

    def _identify(self, scope: Scope) -> _Peer | None:
        """Return a peer that needs no token, None for one that does."""
        client, server = scope.get("client"), scope.get("server")
        if not client or not client[0]:
            # A TCP peer that has already reset its connection has no address either: the server's end tells them apart.
            if server and server[1] is None:
                return _Peer(_socket_actor(scope), OWNER, by_socket=True)
            raise Forbidden("cannot serve a peer without an address")
        if self._policy.trust_loopback and is_loopback(client[0]):
            return _Peer(f"loopback:{_shown(*client)}", OWNER)
        return None

    async def _with_token(self, client: tuple[str, int], authorization: bytes | None) -> _Peer:
        """Return the peer with what its token gives. Raises Unauthorized, Forbidden, HTTPException."""
        shown, secret = _shown(*client), _bearer(authorization)
        grant = self._stored.grant(secret) if self._stored else None
        if grant:
            return _Peer(f"token:{grant.name}@{shown}", grant, by_token=True, secret=secret)
        if not self._tokens and not (self._stored and self._stored.is_there):
            raise Forbidden(
                f"cannot serve {shown}: it needs a token and none is set; make one with `harnessd token new`, or set "
                'token under [http] in harnessd.toml, in a script config={"http": {"token": ...}}, and send it as '
                '"Authorization: Bearer TOKEN"'
            )
        await self._slowdown.wait(client[0])
        for known, expected in self._tokens:  # all of them, so that the time does not tell which one it was
            if hmac.compare_digest(secret, expected):
                grant = known
        if grant is None:
            self._slowdown.failed(client[0])
            raise Unauthorized('cannot serve this request: it needs a valid "Authorization: Bearer TOKEN" header')
        return _Peer(f"token:{grant.name}@{shown}", grant, by_token=True)

    def _check_host(self, value: bytes | None, by_socket: bool, scheme: str) -> Authority | None:
        host = parse_authority((value or b"").decode("latin-1"), scheme)
        if by_socket:
            return host
        if host is None:
            raise BadRequest("cannot serve a request without a valid Host header")
        if host.literal or host.host == "localhost":
            return host
        if host.host in self._allowed or f"{host.host}:{host.port}" in self._allowed:
            return host
        raise Forbidden(f"cannot serve Host {host.host[:100]!r}: add it to allowed_hosts under [http] in harnessd.toml")


@lru_cache(maxsize=1024)
def is_loopback(address: str) -> bool:
    """Whether an address is 127.0.0.0/8, ::1 or 127.0.0.0/8 written as IPv6."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _check_path(path: bytes) -> None:
    """Raises BadRequest for what is no path, and NoSuchRoute for one that only tricks spell: `..`, %2f, NUL."""
    if _NO_PATH.search(path):
        raise BadRequest("cannot read the path: it must begin with '/' and be printable ASCII with valid %XX escapes")
    decoded = unquote_to_bytes(path)
    tricks = b"\\" in decoded or decoded.count(b"/") != path.count(b"/")
    tricks = tricks or any(part in (b".", b"..") for part in decoded.split(b"/"))
    tricks = tricks or any(byte < 0x20 or byte == 0x7F for byte in decoded)
    try:
        decoded.decode()
    except UnicodeDecodeError:
        tricks = True
    if tricks:
        raise NoSuchRoute("cannot serve this path: no such route")


def _foreign(headers: dict[bytes, bytes], host: Authority | None, by_token: bool) -> str | None:
    """Return why a request is taken for one that a browser sends for another site, None when it is not."""
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
    if origin is not None:
        scheme, _, authority = origin.decode("latin-1").partition("://")
        theirs = parse_authority(authority, scheme) if scheme in DEFAULT_PORT else None
        if theirs is None or theirs != host:
            return "cannot do this for another site: the request's Origin is not its Host"
    if site not in OWN_SITE:
        return "cannot do this for another site: the request's Sec-Fetch-Site is not same-origin or none"
    silent = origin is None and site is None and not by_token
    if silent and headers.get(b"user-agent", b"").startswith(b"Mozilla/"):
        return "cannot tell which site this browser's request is from: use http://localhost, or curl"
    return None


def _shown(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _socket_actor(scope: Scope) -> str:
    """Return who is at the other end of the Unix socket.

    Raises Forbidden for a user that its mode keeps out, however it came by it: the socket stands for its owner.
    """
    peer: Credentials | None = scope.get("state", {}).get("peer")
    if peer is None:
        return "socket"
    if peer.uid not in (0, os.geteuid()):
        raise Forbidden(f"cannot serve user {peer.user} on this socket: it is its owner's alone")
    return f"socket:{peer.user}/{peer.pid}"


def _bearer(authorization: bytes | None) -> bytes:
    """Return the secret, nothing when the header is no bearer's."""
    scheme, _, secret = (authorization or b"").partition(b" ")
    return secret.strip() if scheme.lower() == b"bearer" else b""


def _allowed_hosts(names: Iterable[str]) -> Iterable[str]:
    for name in names:
        host = parse_authority(name, "")
        if host is None:
            raise ConfigError([f"http.allowed_hosts: {name!r} is not a host name"])
        yield host.host if host.port is None else f"{host.host}:{host.port}"


def _usable_secret(token: Token) -> bytes:
    secret = token.secret.encode()
    if not secret or secret != secret.strip():
        raise ConfigError([f"http.token: the secret of token {token.name!r} is empty or has spaces at its ends"])
    return secret
