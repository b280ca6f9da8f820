"""Asks the daemon. With http.client: httpx takes four times as long to import, and `harnessd ps` is to be there at once."""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
        for last in (False, True) if method == "GET" else (True,):
            try:
                with self._response(method, path, query, body, {}, timeout_s) as response:
                    return Answer(response.status, response.read())
            except TimeoutError:
                raise Failure(Code.FAILED, f"no answer from {self.shown} within {timeout_s:g} s") from None
            except (OSError, http.client.HTTPException) as error:
                if last:
                    why = f"the connection to {self.shown} broke before the answer was there: {error}"
                    more = "" if method == "GET" else "\nwhat was asked for may have been done all the same"
                    raise Failure(Code.UNREACHABLE, why + more) from None
        raise AssertionError("the last one returns or raises")

    @contextmanager
    def stream(
        self,
        path: str,
        query: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """Give an answer that has no end yet. Raises Failure for a refusal; OSError, HTTPException when it breaks off."""
        with self._response("GET", path, query, None, headers or {}, timeout_s) as response:
            if response.status >= 400:
                Answer(response.status, response.read()).check()
            yield response

    @contextmanager
    def _response(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        body: str | None,
        headers: Mapping[str, str],
        timeout_s: float | None,
    ) -> Iterator[http.client.HTTPResponse]:
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
            yield connection.getresponse()
        finally:
            connection.close()

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
        raise Failure(Code.USAGE, f"cannot use {address.url!r}: a URL such as http://127.0.0.1:2222 is wanted")
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
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def quoted(name: str) -> str:
    """Return a job's name as it stands in a path."""
    return quote(name, safe="")


def reach(context: typer.Context) -> Client:
    """Return the daemon that the command line means."""
    said = context.find_root().params
    given = Given(said.get("url"), said.get("socket"), said.get("config"))
    return Client(addresses(given, os.environ))


def complete_job(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of jobs that begin so, for the shell; none when the daemon does not tell at once."""
    try:
        listed = reach(context).get("/jobs", timeout_s=0.5).data["jobs"]
        return [job["name"] for job in listed if job["name"].startswith(incomplete)]
    except (Failure, KeyError) as error:
        print(f"harnessd: {error}", file=sys.stderr) if os.environ.get("HARNESSD_COMPLETE_DEBUG") else None
        return []
