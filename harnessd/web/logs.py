"""The output of a job as text, byte for byte as it was written; from the end, from an offset, of a run, as it grows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from harnessd.errors import BadRequest, NoSuchRun, Unavailable, WrongState
from harnessd.server.asked import MOST_NUMBER, is_number
from harnessd.server.cursor import CHUNK_BYTES, Cursor, tail
from harnessd.server.entry import Entry
from harnessd.server.logs import Logs, Runs, Stream
from harnessd.server.rotation import Log, RotatedAway
from harnessd.web import endless
from harnessd.web.call import ALL, Call

TAIL_LINES = 200  # that are shown when nothing else is asked for
PAUSE_S = 0.05  # the least time between two looks of a follower at a log that is written to
_LOOK_S = 1.0  # between two looks when no change is told: there may be no file yet, or another one
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asks for."""

    stream: Stream
    follow: bool
    tail: int | None
    since: int | None
    run: int | None


async def logs(call: Call) -> Response:
    if call.scope["path_params"].get("name") == ALL:
        raise BadRequest("cannot show the output of all jobs in one answer: name one")
    wanted = _parse(call)
    entry = call.entry
    spec, outputs = entry.definition.spec, call.supervisor.logs
    if spec is None or outputs is None:
        raise WrongState(
            f"cannot show the output of {entry.name!r}: it goes to the stdout and stderr of the script that runs it",
            job=entry.name,
        )
    live = entry.live.run if entry.live else None
    try:
        log, start, end = await outputs.in_thread(_part, outputs, wanted, entry.name, live, spec.log.merge)
    except OSError as error:
        raise Unavailable(f"cannot read the output of {entry.name!r}: {error}", job=entry.name) from None
    until = Following(call.context.stopping, entry, wanted.run) if wanted.follow else end
    return LogResponse(outputs, log, start, until)


def _parse(call: Call) -> Wanted:
    stream = call.parameter("stream") or "stdout"
    if stream not in ("stdout", "stderr"):
        raise BadRequest(f"cannot use stream={stream[:60]!r}: it takes stdout or stderr")
    follow = bool(call.switch("follow"))
    lines, since, run = (_number(call, name) for name in ("tail", "since_offset", "run"))
    if lines is None and since is None and run is None:
        lines = TAIL_LINES
    return Wanted(stream, follow, lines, since, run)  # type: ignore[arg-type]  # one of the two


def _number(call: Call, name: str) -> int | None:
    text = call.parameter(name)
    if text is None:
        return None
    if not is_number(text, MOST_NUMBER):
        raise BadRequest(f"cannot use {name}={text[:60]!r}: it takes a whole number")
    return int(text)


def _part(outputs: Logs, wanted: Wanted, job: str, live: int | None, merge: bool) -> tuple[Log, int, int]:
    """Return the log and which part of it is wanted; `live` is the run that is there. Raises NoSuchRun, OSError."""
    log = outputs.of_run(job, wanted.stream, live if wanted.run is None else wanted.run, merge)
    for _ in range(_TRIES):
        low, end = log.bounds()
        if wanted.run is not None:
            of_run = Runs(log).range_of(wanted.run)
            if of_run is None:
                raise NoSuchRun(f"cannot show run {wanted.run} of {job!r}: none of its output is kept")
            low, end = max(low, of_run[0]), max(low, end if of_run[1] is None else of_run[1])
        low = min(max(low, wanted.since or 0), end)
        try:
            return log, low if wanted.tail is None else tail(log, low, end, wanted.tail), end
        except RotatedAway:
            continue  # while the lines were counted
    raise OSError("it is rotated away faster than it can be read")


@dataclass(frozen=True, slots=True)
class Following:
    """In place of an end: until the server stops, or the run is over if one was asked for."""

    stopping: asyncio.Event
    entry: Entry
    run: int | None

    def is_over(self) -> bool:
        live = self.entry.live
        return self.run is not None and not (live and live.run == self.run)


class LogResponse(Response):
    """Sends a log at the pace of its client, a piece at a time. One that is overtaken by the rotation is cut off."""

    media_type = "text/plain"

    def __init__(self, outputs: Logs, log: Log, start: int, until: int | Following) -> None:
        headers = {"x-log-start": str(start), "x-content-type-options": "nosniff", "cache-control": "no-store"}
        if isinstance(until, int):
            headers |= {"x-log-offset": str(until), "content-length": str(until - start)}
        else:
            headers["x-accel-buffering"] = "no"
        super().__init__(headers=headers)
        if not isinstance(until, int):
            del self.headers["content-length"]
        self._outputs = outputs
        self._log = log
        self._cursor = Cursor(log, start)
        self._until = until

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        stopping = self._until.stopping if isinstance(self._until, Following) else None
        try:
            whole = await endless.until_gone(self._send(send), receive, stopping)
        finally:
            await self._outputs.in_thread(self._cursor.close)
        if whole is not False:
            await endless.end(send)

    async def _send(self, send: Send) -> bool:
        """Return whether all was sent: False when the rotation has overtaken the client."""
        pieces = self._pieces() if isinstance(self._until, int) else self._growing(self._until)
        async with aclosing(pieces):
            try:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except (RotatedAway, OSError):
                return False
        return True

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        assert isinstance(self._until, int)
        while left := self._until - self._cursor.offset:
            piece = await self._read(min(left, CHUNK_BYTES))
            if not piece:
                raise RotatedAway  # the log has been emptied
            yield piece

    async def _growing(self, until: Following) -> AsyncGenerator[bytes, None]:
        changed: asyncio.Future[None] | None = None
        try:
            while True:
                if changed is None or changed.done():
                    changed = self._outputs.changes.next(str(self._log.path))  # before reading, so that none is missed
                read_at, over = time.monotonic(), until.is_over()
                piece = await self._outputs.in_thread(self._next, until.run if over else None)
                if piece:
                    yield piece
                elif over:
                    return
                if len(piece) < CHUNK_BYTES and not over:
                    await asyncio.wait([changed or asyncio.ensure_future(asyncio.sleep(_LOOK_S))], timeout=_LOOK_S)
                    await asyncio.sleep(max(0.0, read_at + PAUSE_S - time.monotonic()))
        finally:
            if changed:
                changed.cancel()

    def _next(self, ended_run: int | None) -> bytes:
        limit = CHUNK_BYTES
        of_run = Runs(self._log).range_of(ended_run) if ended_run is not None else None
        if of_run and of_run[1] is not None:
            limit = max(0, min(limit, of_run[1] - self._cursor.offset))
        piece = self._cursor.read(limit) if limit else b""
        if not piece:
            self._cursor.offset = min(self._cursor.offset, self._log.bounds()[1])  # it may have been emptied
        return piece

    async def _read(self, limit: int) -> bytes:
        return await self._outputs.in_thread(self._cursor.read, limit)
