"""The HTTP face: one literal table of routes, and the application that serves it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harnessd.server.settings import Http
from harnessd.web import fleet, history, jobs, logs
from harnessd.web.call import Call, Context
from harnessd.web.guard import Guard, GuardPolicy, Token
from harnessd.web.problem import response_for
from harnessd.web.refusals import Refusals

Handler = Callable[[Call], Awaitable[Response]]


class Endpoint(NamedTuple):
    """A route: of one job when its path has no leading slash, of the daemon otherwise."""

    path: str
    methods: tuple[str, ...]
    handler: Handler


ENDPOINTS = (
    Endpoint("hb", ("GET", "HEAD"), jobs.hb),
    Endpoint("status", ("GET", "HEAD"), jobs.status),
    Endpoint("kill", ("GET", "POST"), jobs.kill),
    Endpoint("start", ("GET", "POST"), jobs.start),
    Endpoint("stop", ("GET", "POST"), jobs.stop),
    Endpoint("pause", ("GET", "POST"), jobs.pause),
    Endpoint("resume", ("GET", "POST"), jobs.resume),
    Endpoint("restart", ("GET", "POST"), jobs.restart),
    Endpoint("config", ("POST",), jobs.configure),
    Endpoint("config", ("GET", "HEAD"), jobs.show_config),
    Endpoint("config", ("DELETE",), jobs.clear_config),
    Endpoint("runs", ("GET", "HEAD"), history.runs),
    Endpoint("/jobs/{name}/history", ("GET", "HEAD"), history.history),
    Endpoint("/jobs/{name}/events", ("GET", "HEAD"), history.events),
    Endpoint("logs", ("GET", "HEAD"), logs.logs),
    Endpoint("/jobs/{name}/metrics", ("GET", "HEAD"), history.metrics),
    Endpoint("/history", ("GET", "HEAD"), history.history),
    Endpoint("/events", ("GET", "HEAD"), history.events),
    Endpoint("/jobs", ("GET", "HEAD"), fleet.jobs),
    Endpoint("/jobs/{name}", ("GET", "HEAD"), jobs.show),
    Endpoint("/reload", ("POST",), fleet.reload),
    Endpoint("/healthz", ("GET", "HEAD"), fleet.healthz),
    Endpoint("/", ("GET", "HEAD"), fleet.index),
)


def paths(endpoint: Endpoint) -> tuple[str, ...]:
    """Return the paths under which the endpoint stands."""
    return (endpoint.path,) if endpoint.path[0] == "/" else (f"/jobs/{{name}}/{endpoint.path}", f"/{endpoint.path}")


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
        handlers = {method: endpoint.handler for endpoint in endpoints for method in endpoint.methods}
        return _Resource(self._context, handlers)

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
            if started:
                raise
            response = response_for(error, path=scope["path"], routes=self._routes)
            await response(scope, receive, send)


class _Resource:
    """The handlers of one path, by method."""

    def __init__(self, context: Context, handlers: dict[str, Handler]) -> None:
        self._context = context
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handlers.get(scope["method"])
        if handler is None:
            allow = ", ".join(sorted(self._handlers))
            raise HTTPException(405, f"cannot {scope['method']} here: allowed is {allow}", {"Allow": allow})
        call = Call(self._context, scope, receive)
        each = scope["path_params"].get("name") == fleet.ALL and handler not in history.OVER_ALL
        response = await (fleet.each(call, handler) if each else handler(call))
        await response(scope, receive, send)


def guard_policy(http: Http) -> GuardPolicy:
    """Return who gets in by the settings."""
    tokens = (Token("settings", http.token.get_secret_value()),) if http.token else ()
    return GuardPolicy(frozenset(http.allowed_hosts), tokens)


def make_app(context: Context, policy: GuardPolicy) -> ASGIApp:
    """Return the application behind its guard."""
    return Guard(App(context), policy, Refusals(context.supervisor.record))
