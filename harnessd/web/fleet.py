"""The routes over all jobs, and of the daemon itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from starlette.responses import Response

from harnessd import __version__
from harnessd.errors import BadData, BadRequest, ConfigError, Refused, Unavailable, WrongState
from harnessd.server import bodies
from harnessd.server.asked import USUAL_ROWS
from harnessd.server.entry import Entry
from harnessd.server.nearest import did_you_mean
from harnessd.server.shapes import Index, Jobs, Result, Results
from harnessd.states import State
from harnessd.web.call import Call, answer
from harnessd.web.operations import OBJECT, Operation
from harnessd.web.problem import problem

_MOST_ROWS = 20_000  # that are asked for at once, of all jobs together: putting them together holds up all else


async def jobs(call: Call) -> Response:
    line = bodies.summary_in_full if call.switch("full") else bodies.summary
    body: Jobs = {"jobs": [line(entry) for entry in _chosen(call)]}
    return answer(body)


async def each(call: Call, handler: Callable[[Call], Awaitable[Response]], operation: Operation) -> Response:
    """What the handler answers for every job, or for those with `?tag=`; one result a job, with its own status."""
    await _check(call, operation)
    entries = _chosen(call)
    if any(each.name == "limit" for each in operation.parameters):
        most = max(1, _MOST_ROWS // max(1, len(entries)))
        limit = call.parameter("limit")
        if limit is None:
            call.query.append(("limit", str(min(USUAL_ROWS, most))))
        elif int(limit) > most:
            raise BadRequest(f"cannot use limit={limit} for {len(entries)} jobs at once: {most} at most")
    responses = await asyncio.gather(*(_answered(call.of(entry), handler) for entry in entries))
    results: list[Result] = [
        {"job": entry.name, "status_code": response.status_code, "body": json.loads(bytes(response.body))}
        for entry, response in zip(entries, responses, strict=True)
    ]
    body: Results = {"results": results}
    return answer(body, 207)


async def _check(call: Call, operation: Operation) -> None:
    """Raise BadRequest or BadData for what is wrong with the request, which is not each job's to say."""
    for parameter in operation.parameters:
        text = call.parameter(parameter.name)
        if text is not None:
            parameter.verify(text)
    if operation.data is None:
        return
    data = await call.data()
    if operation.data is OBJECT and not isinstance(data, dict):
        raise BadData("cannot configure: an object is wanted, as in {'key': value}")


async def _answered(call: Call, handler: Callable[[Call], Awaitable[Response]]) -> Response:
    try:
        return await handler(call)
    except Refused as error:
        return problem(error)


def _chosen(call: Call) -> list[Entry]:
    tag, state = call.parameter("tag"), call.parameter("state")
    if state is not None and state not in tuple(State):
        hint = did_you_mean(state, tuple(State)) or f"; there are: {', '.join(State)}"
        raise BadRequest(f"cannot use state={state[:60]!r}: no job has such a state{hint}")
    chosen = (
        entry
        for entry in call.entries()
        if (tag is None or tag in entry.definition.tags) and (state is None or state == entry.job.state)
    )
    return sorted(chosen, key=lambda entry: entry.name)


async def reload(call: Call) -> Response:
    if call.context.reload is None:
        raise WrongState("cannot reload: a script has no config directory")
    try:
        return answer(await call.context.reload(call.actor))
    except ConfigError as error:
        raise Unavailable(f"cannot reload: {'; '.join(error.problems)}") from error


async def healthz(call: Call) -> Response:
    health = call.context.health()
    if call.visitor.jobs is not None:
        health["jobs"] = bodies.in_each_state(call.entries())
    if call.context.tokens:
        health["tokens"] = call.context.tokens.problem or "ok"
    return answer(health, 200 if health["status"] == "ok" else 503)


async def index(call: Call) -> Response:
    paths = [f"/jobs/{name}" for name in sorted(entry.name for entry in call.entries())]
    body: Index = {"harnessd": __version__, "jobs": paths, "health": "/healthz", "contract": "/openapi.json"}
    return answer(body)
