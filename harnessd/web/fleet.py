"""The routes over all jobs, and of the daemon itself."""

from __future__ import annotations

from starlette.responses import Response

from harnessd import __version__
from harnessd.server import bodies
from harnessd.web.call import Call, answer


async def jobs(call: Call) -> Response:
    tag, state = call.parameter("tag"), call.parameter("state")
    chosen = [
        entry
        for entry in call.supervisor.entries()
        if (tag is None or tag in entry.definition.tags) and (state is None or state == entry.job.state)
    ]
    return answer({"jobs": [bodies.summary(entry) for entry in sorted(chosen, key=lambda entry: entry.name)]})


async def healthz(call: Call) -> Response:
    health = call.context.health()
    return answer(health, 200 if health["status"] == "ok" else 503)


async def index(call: Call) -> Response:
    names = sorted(entry.name for entry in call.supervisor.entries())
    return answer({"harnessd": __version__, "jobs": [f"/jobs/{name}" for name in names], "health": "/healthz"})
