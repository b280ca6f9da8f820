"""The HTTP face: one literal table of routes, and the application that serves it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harnessd.errors import Forbidden
from harnessd.server.settings import Http
from harnessd.server.tokens import SETTINGS, Role
from harnessd.web import contract, exposition, fleet, history, jobs, logs
from harnessd.web import operations as op
from harnessd.web.call import ALL, Call, Context
from harnessd.web.guard import Guard, GuardPolicy, Token
from harnessd.web.operations import Operation
from harnessd.web.problem import response_for
from harnessd.web.refusals import Refusals

Handler = Callable[[Call], Awaitable[Response]]
READ, OPERATE, ADMIN = Role


class Endpoint(NamedTuple):
    """A route: of one job when its path has no leading slash, of the daemon otherwise."""

    path: str
    methods: tuple[str, ...]
    handler: Handler
    role: Role  # the least that may; a GET that takes no more than READ only looks
    operation: Operation  # what the contract says of it
    whole: bool = False  # is about all jobs at once: not for a token that is limited to some


async def openapi(call: Call) -> Response:
    return Response(_contract(), media_type=contract.JSON)


@cache
def _contract() -> bytes:
    return json.dumps(described(), separators=(",", ":")).encode() + b"\n"


ENDPOINTS = (
    Endpoint("hb", ("GET", "HEAD"), jobs.hb, READ, op.HB),
    Endpoint("status", ("GET", "HEAD"), jobs.status, READ, op.STATUS),
    Endpoint("kill", ("GET", "POST"), jobs.kill, OPERATE, op.KILL),
    Endpoint("start", ("GET", "POST"), jobs.start, OPERATE, op.START),
    Endpoint("stop", ("GET", "POST"), jobs.stop, OPERATE, op.STOP),
    Endpoint("pause", ("GET", "POST"), jobs.pause, OPERATE, op.PAUSE),
    Endpoint("resume", ("GET", "POST"), jobs.resume, OPERATE, op.RESUME),
    Endpoint("restart", ("GET", "POST"), jobs.restart, OPERATE, op.RESTART),
    Endpoint("config", ("POST",), jobs.configure, OPERATE, op.CONFIGURE),
    Endpoint("config", ("GET", "HEAD"), jobs.show_config, READ, op.CONFIG),
    Endpoint("config", ("DELETE",), jobs.clear_config, OPERATE, op.CLEAR_CONFIG),
    Endpoint("stack", ("GET",), jobs.show_stack, OPERATE, op.STACK),
    Endpoint("runs", ("GET", "HEAD"), history.runs, READ, op.RUNS),
    Endpoint("/jobs/{name}/history", ("GET", "HEAD"), history.history, READ, op.HISTORY),
    Endpoint("/jobs/{name}/events", ("GET", "HEAD"), history.events, READ, op.EVENTS),
    Endpoint("logs", ("GET", "HEAD"), logs.logs, READ, op.LOGS),
    Endpoint("/jobs/{name}/metrics", ("GET", "HEAD"), history.metrics, READ, op.METRICS),
    Endpoint("/history", ("GET", "HEAD"), history.history, READ, op.ALL_HISTORY),
    Endpoint("/events", ("GET", "HEAD"), history.events, READ, op.ALL_EVENTS),
    Endpoint("/jobs", ("GET", "HEAD"), fleet.jobs, READ, op.JOBS),
    Endpoint("/jobs/{name}", ("GET", "HEAD"), jobs.show, READ, op.JOB),
    Endpoint("/reload", ("POST",), fleet.reload, ADMIN, op.RELOAD, whole=True),
    Endpoint("/metrics", ("GET", "HEAD"), exposition.metrics, READ, op.EXPOSITION, whole=True),
    Endpoint("/healthz", ("GET", "HEAD"), fleet.healthz, READ, op.HEALTHZ),
    Endpoint("/openapi.json", ("GET", "HEAD"), openapi, READ, op.OPENAPI),
    Endpoint("/", ("GET", "HEAD"), fleet.index, READ, op.INDEX),
)


def paths(endpoint: Endpoint) -> tuple[str, ...]:
    """Return the paths under which the endpoint stands."""
    return (endpoint.path,) if endpoint.path[0] == "/" else (f"/jobs/{{name}}/{endpoint.path}", f"/{endpoint.path}")


def described() -> dict[str, Any]:
    """Return the contract of all that is served, as OpenAPI has it."""
    return contract.document(
        contract.Served(path, endpoint.methods, str(endpoint.role), endpoint.operation)
        for endpoint in ENDPOINTS
        for path in paths(endpoint)
    )


class App:
    """The application: every error in it becomes a problem document."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._routes = [path for endpoint in ENDPOINTS for path in paths(endpoint)]
        self._router = Router(routes=self._table(), redirect_slashes=False)

    def _table(self) -> list[Route]:
        by_path: dict[str, list[Endpoint]] = {}
        for endpoint in ENDPOINTS:
            for path in paths(endpoint):
                by_path.setdefault(path, []).append(endpoint)
        return [Route(path, self._serving(endpoints), methods=None) for path, endpoints in by_path.items()]

    def _serving(self, endpoints: list[Endpoint]) -> ASGIApp:
        return _Resource(self._context, {method: endpoint for endpoint in endpoints for method in endpoint.methods})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        scope["app"] = self  # has the router raise what it cannot route
        try:
            await self._router(scope, receive, note_start)
        except Exception as error:
            if started or isinstance(error, Forbidden):  # who may what is the guard's to answer
                raise
            response = response_for(error, path=scope["path"], routes=self._routes)
            await response(scope, receive, send)


class _Resource:
    """The endpoints of one path, by method."""

    def __init__(self, context: Context, endpoints: dict[str, Endpoint]) -> None:
        self._context = context
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["method"])
        if endpoint is None:
            allow = ", ".join(sorted(self._endpoints))
            raise HTTPException(405, f"cannot {scope['method']} here: allowed is {allow}", {"Allow": allow})
        call, handler = Call(self._context, scope, receive), endpoint.handler
        call.visitor.enter(endpoint.role, looks=_looks(endpoint, scope["method"]), whole=endpoint.whole)
        name = scope["path_params"].get("name")
        if name is not None and name != ALL:
            call.check_seen(name)
        each = name == ALL and handler not in history.OVER_ALL
        response = await (fleet.each(call, handler, endpoint.operation) if each else handler(call))
        await response(scope, receive, send)


def _looks(endpoint: Endpoint, method: str) -> bool:
    """Whether a request only looks. All else changes something, or shows more than another site may ask for."""
    return endpoint.role is READ and method in ("GET", "HEAD")


def guard_policy(http: Http) -> GuardPolicy:
    """Return who gets in by the settings."""
    tokens = (Token(SETTINGS, http.token.get_secret_value()),) if http.token else ()
    limits = {"max_headers": http.max_headers, "max_headers_bytes": http.max_header_bytes}
    return GuardPolicy(frozenset(http.allowed_hosts), tokens, http.trust_loopback, **limits)


def make_app(context: Context, policy: GuardPolicy) -> ASGIApp:
    """Return the application behind its guard."""
    return Guard(App(context), policy, Refusals(context.supervisor.record), context.tokens)
