"""Events as they happen, as Server-Sent Events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

The id of each is the event's in the database, so a client that comes back with `Last-Event-ID` goes on where it was,
whatever has happened to the connection or to the server. First come the stored events behind that id, then the live
ones: a follower is enlisted before the last look into the database, and an id that was sent is not sent again.

Nobody waits for a client. Each has a queue; one whose queue is full is dropped, told so when it reads again, and can
come back.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from harnessd.errors import Refused, Unavailable
from harnessd.server.records import Event
from harnessd.server.rows import COLUMNS, Json, Page, Row
from harnessd.server.timespan import iso
from harnessd.web import endless
from harnessd.web.formats import json_rows

if TYPE_CHECKING:
    from harnessd.server.history import History  # loads SQL, which a script does without

QUEUE_EVENTS = 1000  # that a client may be behind
MOST_FOLLOWERS = 500
CHUNK_EVENTS = 500  # read from the database in one go
HEARTBEAT_S = 15.0


@dataclass(eq=False)
class Follower:
    """A client: what it wants to hear of, and what it was not sent yet."""

    job: str | None
    kinds: Sequence[str]
    last_id: int | None  # the last event it has; None: whatever comes from now on
    actor: str = ""
    sees: Callable[[str | None], bool] = lambda _: True  # whether it may hear of that job
    queue: deque[Event] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    behind: bool = False  # so much came at once that it is to be read from the database
    dropped: bool = False

    def wants(self, event: Event) -> bool:
        of_job = event.job == self.job if self.job is not None else self.sees(event.job)
        return of_job and (not self.kinds or event.kind in self.kinds)


class Followers:
    """Hands committed events to whoever follows. `record` takes what history keeps."""

    def __init__(self, history: History, record: Callable[[Event], None]) -> None:
        self.history = history
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._followers: set[Follower] = set()

    def committed(self, events: Sequence[Event]) -> None:
        """Take events that were committed, in the thread of the store."""
        if self._followers and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._spread, events)

    @contextmanager
    def enlisted(self, follower: Follower) -> Iterator[None]:
        """Put what is committed from now on into the follower's queue."""
        self._followers.add(follower)
        try:
            yield
        finally:
            self._followers.discard(follower)

    def check_room(self) -> None:
        """Raise Unavailable when there are as many followers as can be."""
        if len(self._followers) >= MOST_FOLLOWERS:
            raise Unavailable(f"cannot follow: {MOST_FOLLOWERS} clients do so already")

    def _spread(self, events: Sequence[Event]) -> None:
        for follower in list(self._followers):
            wanted = [event for event in events if follower.wants(event)]
            if not wanted:
                continue
            if len(follower.queue) + len(wanted) <= QUEUE_EVENTS:
                follower.queue.extend(wanted)
            elif follower.queue:
                self._drop(follower)
            else:
                follower.behind = True
            follower.wake.set()

    def _drop(self, follower: Follower) -> None:
        self._followers.discard(follower)
        follower.dropped = True
        follower.queue.clear()
        data = {"last_id": follower.last_id, "waiting": QUEUE_EVENTS}
        self._record(Event("client-dropped", time.time_ns() // 1000, follower.job, actor=follower.actor, data=data))


class EventStream(Response):
    """The answer to a follower: it ends when the client goes, is dropped, or the server stops."""

    media_type = "text/event-stream"

    def __init__(self, followers: Followers, follower: Follower, stored: Page, stopping: asyncio.Event) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._followers = followers
        self._follower = follower
        self._stored = stored  # the first of what is in the database
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with suppress(Refused):  # a database that fails ends the stream, and the client comes back
            await endless.until_gone(self._send(send), receive, self._stopping)
        await endless.end(send)

    async def _send(self, send: Send) -> None:
        async with aclosing(self._texts()) as texts:
            async for text in texts:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def _texts(self) -> AsyncGenerator[str, None]:
        follower = self._follower
        yield ": events\n\n"
        async for text in self._catching_up(self._stored):
            yield text
        with self._followers.enlisted(follower):
            async for text in self._catching_up(await self._more()):  # committed while the last chunk was sent
                yield text
            yield f"id: {follower.last_id}\n\n"  # so that a client that has heard nothing yet can come back, too
            while not follower.dropped:
                text = await self._live()
                if follower.behind:
                    follower.behind = False
                    async for stored_text in self._catching_up(await self._more()):
                        yield stored_text
                elif text:
                    yield text
        yield f'event: dropped\ndata: {{"last_id":{follower.last_id},"why":"{QUEUE_EVENTS} events were not read"}}\n\n'

    async def _catching_up(self, page: Page) -> AsyncGenerator[str, None]:
        while page.rows:
            yield "".join(map(self._event, page.rows))
            page = await self._more() if page.next else Page([], None)

    async def _more(self) -> Page:
        return await stored(self._followers.history, self._follower)

    async def _live(self) -> str:
        """Return the text of what is in the queue, once there is something, or a heartbeat."""
        follower = self._follower
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await follower.wake.wait()
        except TimeoutError:
            return ": heartbeat\n\n"
        follower.wake.clear()
        events = [] if follower.behind else list(follower.queue)  # those in the queue are in the database, too
        follower.queue.clear()
        rows = (_row(event) for event in events)
        return "".join(self._event(row) for row in rows if row[1] > (follower.last_id or 0))

    def _event(self, row: Row) -> str:
        """Return the event as the stream has it, and note that it was sent."""
        self._follower.last_id = row[1]
        if not self._follower.sees(row[2]):
            return ""
        (text,) = json_rows(COLUMNS["events"], [row])
        return f"id: {row[1]}\nevent: {row[4]}\ndata: {text}\n\n"


async def stored(history: History, follower: Follower) -> Page:
    """Return the next events behind the follower's last one. Raise Unavailable when the database fails."""
    if follower.last_id is None:
        follower.last_id = await history.last_event()
        return Page([], None)
    return await history.events_after(follower.last_id, follower.job, follower.kinds, CHUNK_EVENTS)


def _row(event: Event) -> Row:
    """Return the row of an event as the database gives it."""
    data = json.dumps(event.data, separators=(",", ":"), default=repr)
    return (iso(event.at_us), event.id, event.job, event.run, event.kind, event.actor, Json(data))
