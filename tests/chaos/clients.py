"""Ten clients that send every verb, over TCP, over the Unix socket and through the proxy, and note every answer."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

from chaos.ground import Ground
from chaos.witness import Facts, now

CLIENTS = 10
_PAUSE_S = 0.5  # on average, between two requests of a client
_TIMEOUT_S = 20.0
_VERBS = {
    "start": 26,
    "stop": 8,
    "restart": 8,
    "kill": 6,
    "pause": 8,
    "resume": 12,
    "config": 14,
    "config-clear": 1,
    "hb": 6,
    "status": 5,
    "logs": 2,
    "runs": 2,
    "history": 2,
    "events": 2,
    "jobs": 4,
    "healthz": 2,
    "whole": 2,
}
_COMMANDS = ("start", "stop", "restart", "pause", "resume")
_TAGS = ("steady", "brief", "many", "slow")
_STATES = ("running", "stopped", "failed", "paused", "backoff", "exited")


class _UnixConnection(http.client.HTTPConnection):
    """A connection to the socket in the state directory."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(self._path)


class Client:
    """One of them. What it asks for is a function of the seed and its number alone."""

    def __init__(self, ground: Ground, number: int, seed: str, proxy_port: int, over: threading.Event) -> None:
        self._ground = ground
        self._number = number
        self._chance = random.Random(f"{seed}/client/{number}")
        self._proxy_port = proxy_port
        self._over = over
        self._facts = Facts(str(ground.facts), f"client-{number}", client=number, way=self._way)
        self._kept: http.client.HTTPConnection | None = None
        self.thread = threading.Thread(target=self._work, name=f"client-{number}")
        self.requests = 0

    @property
    def _way(self) -> str:
        return ("tcp", "tcp", "unix", "proxy", "kept")[self._number % 5]

    def _work(self) -> None:
        while not self._over.wait(self._chance.expovariate(1 / _PAUSE_S)):
            self._ask(*self._next())
        if self._kept:
            self._kept.close()
        self._facts.close()

    def _next(self) -> tuple[str, str, str, str, bytes | None]:
        """Return verb, job, method, path and body."""
        chance = self._chance
        verb = chance.choices(list(_VERBS), list(_VERBS.values()))[0]
        job, query = chance.choice(self._ground.fleet.names), dict[str, str]()
        wide = chance.random()
        if wide < 0.02:
            job, query = "all", {"tag": chance.choice(_TAGS)}
        elif wide < 0.03:
            job, query = "all", {"state": chance.choice(_STATES)}
        waits = chance.random()
        if verb in (*_COMMANDS, "config") and waits < 0.25:
            query["wait"] = f"{chance.uniform(0.05, 3):.2f}"
        if verb == "kill":
            query |= {"grace": f"{chance.uniform(0, 1):.2f}"} if waits < 0.7 else {"wait": "0"}
        return verb, job, *self._request(verb, job, query)

    def _request(self, verb: str, job: str, query: dict[str, str]) -> tuple[str, str, bytes | None]:
        method, body = "GET", None
        path = f"/jobs/{job}/{verb}"
        if verb in (*_COMMANDS, "kill"):
            method = self._chance.choice(("GET", "POST"))
        elif verb == "config":
            method, body = "POST", json.dumps({"level": self._chance.randrange(1000)}).encode()
        elif verb == "config-clear":
            method, path = "DELETE", f"/jobs/{job}/config"
        elif verb in ("jobs", "healthz"):
            path = f"/{verb}"
        elif verb == "whole":
            path = f"/jobs/{job}"
        elif verb in ("logs", "runs", "history", "events"):
            query = {("tail" if verb == "logs" else "limit"): "20"}
        return method, f"{path}?{urlencode(query)}" if query else path, body

    def _ask(self, verb: str, job: str, method: str, path: str, body: bytes | None) -> None:
        began, self.requests = now(), self.requests + 1
        told: dict[str, Any] = {"verb": verb, "job": job, "path": path, "since": round(began, 6)}
        connection = self._connection()
        reused = connection is self._kept and connection.sock is not None
        try:
            connection.request(method, path, body=body)
            response = connection.getresponse()
            told |= {"code": response.status, **_essence(verb, response, response.read())}
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of a body that is no JSON
            connection.close()
            if not (reused and isinstance(error, http.client.RemoteDisconnected | ConnectionError)):
                self._facts.note("unanswered", **told, error=repr(error))  # else the server has closed an idle one
            return
        if connection is not self._kept:
            connection.close()
        self._facts.note("answered", **told)

    def _connection(self) -> http.client.HTTPConnection:
        if self._way == "unix":
            return _UnixConnection(str(self._ground.state.folder / "harnessd.sock"))
        if self._way == "kept":
            self._kept = self._kept or http.client.HTTPConnection("127.0.0.1", self._ground.port, timeout=_TIMEOUT_S)
            return self._kept
        port = self._proxy_port if self._way == "proxy" else self._ground.port
        return http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)


def _essence(verb: str, response: http.client.HTTPResponse, content: bytes) -> dict[str, Any]:
    """Return of an answer what is to be compared later; all of one that is an error."""
    if response.getheader("Content-Type", "").startswith("text/plain"):
        return {}
    body = json.loads(content)
    if response.status == 207:
        return {"results": [[one["job"], one["status_code"], _of_one(one["body"])] for one in body["results"]]}
    if response.status >= 400 and verb != "hb":
        return {"problem": body} if verb != "healthz" else {}
    return _of_one(body) if verb in (*_COMMANDS, "config", "kill") else {}


def _of_one(body: dict[str, Any]) -> dict[str, Any]:
    ended = (body.get("exit") or {}).get("run")
    found = {"id": body.get("id"), "queued": body.get("queued"), "read": body.get("read"), "ended": ended}
    return {key: value for key, value in found.items() if value is not None}


def post_quietly(facts: Facts, port: int, path: str, bodies: Sequence[Any]) -> None:
    """Post the bodies over one connection, whatever is answered. Note the commands that were accepted."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    with suppress(OSError, http.client.HTTPException):  # the daemon is down
        for body in bodies:
            since = round(now(), 6)
            connection.request("POST", path, body=json.dumps(body) if body is not None else None)
            response = connection.getresponse()
            content = response.read()
            if response.status < 300 and (number := json.loads(content).get("id")):
                facts.note("accepted", path=path, since=since, id=number)
    connection.close()
