"""The daemon's metrics, as Prometheus scrapes them."""

from __future__ import annotations

import asyncio
from importlib import import_module

from starlette.responses import Response

from harnessd.web.call import Call

_JOBS_A_TURN = 20  # a millisecond or two, and then it is others' turn


async def metrics(call: Call) -> Response:
    module = "harnessd.server.exposition"
    await asyncio.to_thread(import_module, module)
    from harnessd.server.exposition import Scrape, media_type

    scrape, context = Scrape(), call.context
    for number, entry in enumerate(list(call.supervisor.entries()), 1):
        scrape.add_job(entry, call.supervisor.backlog_bytes(entry))
        if number % _JOBS_A_TURN == 0:
            await asyncio.sleep(0)
    scrape.add_daemon(context.health(), context.tally, context.commit_times and context.commit_times())
    as_openmetrics = "application/openmetrics-text" in (call.header("accept") or "")
    pieces = []
    for piece in scrape.pieces(as_openmetrics=as_openmetrics):
        pieces.append(piece)
        await asyncio.sleep(0)
    return Response(b"".join(pieces), media_type=media_type(as_openmetrics=as_openmetrics))
