"""The routes of one job: heartbeat, verbs, config, status."""

from __future__ import annotations

from starlette.responses import Response

from harnessd.server import bodies, policy, shapes, stack
from harnessd.server.shapes import Heartbeat, Killed
from harnessd.server.supervisor import Receipt
from harnessd.web import history
from harnessd.web.call import Call, answer


async def hb(call: Call) -> Response:
    body: Heartbeat = {**bodies.heartbeat(call.entry), "storage": call.context.storage_error() or "ok"}
    return answer(body, 200 if body["alive"] else 503)


async def kill(call: Call) -> Response:
    entry, wait = call.entry, call.seconds("wait") != 0
    ended = await call.supervisor.kill(entry, grace_s=call.seconds("grace"), actor=call.actor, wait=wait)
    how = ended.shown() if ended else None
    body: Killed = {"job": entry.name, "verb": "kill", "state": entry.job.state, "exit": how}
    return answer(body, 200 if wait else 202)


async def start(call: Call) -> Response:
    return await _ask(call, policy.StartAsked())


async def stop(call: Call) -> Response:
    return await _ask(call, policy.StopAsked())


async def pause(call: Call) -> Response:
    return await _ask(call, policy.PauseAsked())


async def resume(call: Call) -> Response:
    return await _ask(call, policy.ResumeAsked())


async def restart(call: Call) -> Response:
    return await _ask(call, policy.RestartAsked())


async def configure(call: Call) -> Response:
    receipt = await call.supervisor.configure(
        call.entry, await call.data(), actor=call.actor, wait_s=call.seconds("wait")
    )
    return _receipt(receipt)


async def show_config(call: Call) -> Response:
    return answer(bodies.config(call.entry))


async def clear_config(call: Call) -> Response:
    await call.supervisor.clear_config(call.entry, actor=call.actor)
    return answer(bodies.config(call.entry))


async def status(call: Call) -> Response:
    when = call.parameter("at")
    return answer(bodies.status(call.entry)) if when is None else await history.status_at(call, when)


async def show_stack(call: Call) -> Response:
    return answer(await stack.of(call.entry, whole=bool(call.switch("all"))))


async def show(call: Call) -> Response:
    return answer(bodies.whole(call.entry))


async def _ask(call: Call, event: policy.Event) -> Response:
    receipt = await call.supervisor.ask(
        call.entry, event, data=await call.data(), actor=call.actor, wait_s=call.seconds("wait")
    )
    return _receipt(receipt)


def _receipt(receipt: Receipt) -> Response:
    body: shapes.Receipt = {
        "id": receipt.id,
        "job": receipt.job,
        "verb": receipt.verb,
        "state": receipt.state,
        "queued": receipt.queued,
        "read": receipt.read,
    }
    return answer(body, 202 if receipt.read is None else 200)
