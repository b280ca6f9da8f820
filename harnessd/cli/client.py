"""Asks the daemon, with http.client: httpx takes four times as long to import, and `harnessd ps` is to be quick."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import typer

from harnessd.cli.outcome import Code, Failure, code_of
from harnessd.cli.where import Address, Given, addresses

ANSWER_S = 30.0  # the longest that an answer may take for which the daemon waits for nothing
_CONNECT_S = 5.0
_COMPLETE_S = 0.5
_TRIES = 5  # while one server after the other dies
_AGAIN_S = 0.2
BROKEN = (OSError, http.client.HTTPException)


@dataclass(frozen=True)
class Answer:
    """What the daemon says. `body` is as it came."""

    status: int
    body: bytes

    @cached_property
    def data(self) -> dict[str, Any]:
        """The body's JSON object; raises Failure for an answer that has none."""
        try:
            found = json.loads(self.body)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Failure(Code.FAILED, f"cannot read the answer, status {self.status}: is that a harnessd?")
        return found

    def check(self) -> Answer:
        """Return the answer. Raises Failure when it is a refusal."""
        if self.status >= 400:
            raise Failure(code_of(self.status, str(self.data.get("kind"))), str(self.data.get("detail")))
        return self


class Client:
    """The daemon, wherever it is. Every request has a connection of its own."""

    def __init__(self, where: list[Address]) -> None:
        self._where = where

    @property
    def shown(self) -> str:
        return self._where[0].shown

    def get(self, path: str, query: Mapping[str, Any] | None = None, timeout_s: float | None = ANSWER_S) -> Answer:
        """Return the answer. Raises Failure when it is a refusal."""
        return self.ask("GET", path, query, timeout_s=timeout_s).check()

    def ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: str | None = None,
        timeout_s: float | None = ANSWER_S,
    ) -> Answer:
        """Return the answer, whatever its status. What only reads is asked again when a dying server takes it along."""
        tries = _TRIES if method == "GET" else 1
        while True:
            try:
                with closing(self._open(method, path, query, body, {}, timeout_s)) as response:
                    return Answer(response.status, response.read())
            except BROKEN as error:
                tries -= 1
                self._give_up(error, method, timeout_s, tries)

    @contextmanager
    def stream(
        self,
        path: str,
        query: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """Give an answer that is read as it comes, and may break off. Raises Failure when there is none."""
        tries = _TRIES
        while True:
            try:
                response = self._open("GET", path, query, None, headers or {}, timeout_s)
                break
            except BROKEN as error:
                tries -= 1
                self._give_up(error, "GET", timeout_s, tries)
        with closing(response):
            if response.status >= 400:
                Answer(response.status, response.read()).check()
            yield response

    def _give_up(self, error: Exception, method: str, timeout_s: float | None, tries_left: int) -> None:
        """Raise Failure, unless a new server may answer."""
        if isinstance(error, TimeoutError):
            raise Failure(Code.FAILED, f"no answer from {self.shown} within {timeout_s:g} s") from None
        if not tries_left:
            more = "" if method == "GET" else "; what was asked for may have been done all the same"
            raise Failure(Code.UNREACHABLE, f"the connection to {self.shown} broke: {error}{more}") from None
        time.sleep(_AGAIN_S)

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        body: str | None,
        headers: Mapping[str, str],
        timeout_s: float | None,
    ) -> http.client.HTTPResponse:
        """Return the head of an answer; closing it closes its connection. Raises Failure, and what is in BROKEN."""
        connection, address = self._connect()
        try:
            assert connection.sock
            connection.sock.settimeout(timeout_s)
            given = {name: value for name, value in (query or {}).items() if value is not None}
            target = urlsplit(address.url).path.rstrip("/") + path + (f"?{urlencode(given)}" if given else "")
            sent = {"Connection": "close", **headers}
            if address.token:
                sent["Authorization"] = f"Bearer {address.token}"
            connection.request(method, target, body.encode() if body is not None else None, sent)
            return connection.getresponse()
        except UnicodeEncodeError:
            raise Failure(Code.USAGE, "cannot send what was said: it is not UTF-8") from None
        finally:
            connection.close()  # the answer has the socket for itself

    def locate(self) -> None:
        """Find out where the daemon is, before several threads ask. Raises Failure."""
        self._connect()[0].close()

    def _connect(self) -> tuple[http.client.HTTPConnection, Address]:
        """Return a connection to the first address at which somebody listens. Raises Failure."""
        tried = []
        for address in self._where:
            connection = _connection(address)
            try:
                connection.connect()
            except (OSError, ValueError) as error:
                connection.close()
                tried.append(f"  {address.shown}: {_why(address, error)}")
                continue
            self._where = [address]
            return connection, address
        raise Failure(Code.UNREACHABLE, "\n".join(["cannot reach the daemon; tried", *tried]))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_CONNECT_S)
        self._path = path

    def connect(self) -> None:
        # By way of the directory's descriptor: unix(7) takes 107 bytes, and the path may be longer.
        folder = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(_CONNECT_S)
            self.sock.connect(f"/proc/self/fd/{folder}/{self._path.name}")
        finally:
            os.close(folder)


def _connection(address: Address) -> http.client.HTTPConnection:
    if address.socket:
        return _UnixConnection(address.socket)
    parts = urlsplit(address.url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("http", "https") or not host:
        source = f" of {address.source}" if address.source else ""
        raise Failure(Code.USAGE, f"cannot use {address.url!r}{source}: a URL such as http://127.0.0.1:2222 is wanted")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(host, port, timeout=_CONNECT_S)


def _why(address: Address, error: Exception) -> str:
    if address.socket:
        match error:
            case ConnectionRefusedError():
                return "the socket is stale: nobody listens, its daemon has ended without removing it"
            case FileNotFoundError():
                return "there is no such socket: no daemon runs on that state directory"
            case PermissionError():
                return "the socket is its owner's alone, and that is another user"
    if why := getattr(error, "verify_message", None):  # ssl, which http.client has loaded
        return f"its certificate is not trusted: {why}; SSL_CERT_FILE names the authority of one of your own"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def quoted(name: str) -> str:
    """Return a job's name as it stands in a path."""
    try:
        return quote(name, safe="")
    except UnicodeEncodeError:
        raise Failure(Code.NO_SUCH_JOB, f"no job is named {name!r}: that is not UTF-8") from None


def reach(context: typer.Context) -> Client:
    """Return the daemon that the command line means."""
    said = context.find_root().params
    given = Given(said.get("url"), said.get("socket"), said.get("config"))
    return Client(addresses(given, os.environ))


def complete_job(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of jobs that begin so, for the shell; none when the daemon does not tell at once."""
    try:
        listed = reach(context).get("/jobs", timeout_s=_COMPLETE_S).data["jobs"]
    except Failure:  # the shell has no place to say it
        return []
    return [job["name"] for job in listed if job["name"].startswith(incomplete)]
