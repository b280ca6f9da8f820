"""The store as a server uses it: what waits until it can be read, what is forgotten, and the history of a script."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from harnessd.errors import StoreError
from harnessd.server import places
from harnessd.server.records import JobRow, JournalDone, Keep
from harnessd.server.store import Store

_SETTLE_S = 5.0
_TRIM_S = 600.0
_FIRST_TRIM_S = 30.0  # not while the jobs start


def when_stored(store: Store, then: Callable[[], None]) -> None:
    """Call it in the event loop once all that was put so far is committed; never, if that does not come to pass."""
    loop = asyncio.get_running_loop()

    def on_flushed(flushed: Future[None]) -> None:
        if flushed.exception() is None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(then)

    store.flush().add_done_callback(on_flushed)


def when_seen(store: Store, then: Callable[[Sequence[JobRow]], None]) -> None:
    """Call it in the event loop with the rows of jobs that could not be read, once they can be; see `Store.unseen`."""
    loop = asyncio.get_running_loop()

    def on_seen(jobs: Sequence[JobRow]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(then, jobs)

    store.unseen(on_seen)


async def trim_now_and_then(store: Store, kept: Callable[[], tuple[Keep, Mapping[str, Keep]]]) -> None:
    """Forget old history again and again; the store does it in steps that hold nobody up."""
    await asyncio.sleep(_FIRST_TRIM_S)
    while True:
        try:
            store.trim(time.time_ns() // 1000, *kept())
        except Exception:  # or the history would grow from now on
            logging.getLogger(__name__).exception("cannot forget old history")
        await asyncio.sleep(_TRIM_S)


class ScriptArchive:
    """The history of a script that has a state directory."""

    def __init__(self, state: Path, keep: Keep) -> None:
        """Take the directory for this script alone. Raises AlreadyRunning, HarnessError, StoreError."""
        self._keep = keep
        places.make_private(state)
        self._lock = places.lock(state)
        places.sign_lock(self._lock, os.getpid())
        self.store = Store.open(state / places.DATABASE_NAME)
        self.known = self.store.load()

    def overrides(self, job: str) -> dict[str, Any]:
        """Return what CONFIG commands have set when the script ran before."""
        rows = [row for row in self.known.jobs if row.name == job]
        return dict(json.loads(rows[0].overrides)) if rows else {}

    def on_stored(self, run: int) -> None:
        self.store.put(JournalDone(run))

    async def trim(self) -> None:
        """Forget old history at once, as many a script is over soon, and then now and then."""
        self.store.trim(time.time_ns() // 1000, self._keep)
        await trim_now_and_then(self.store, lambda: (self._keep, {}))

    async def settle(self) -> None:
        """Wait until the journal of a run that has ended is stored and removed; not long, if storage fails."""
        with suppress(TimeoutError, StoreError):  # the script's next run stores what is left
            async with asyncio.timeout(_SETTLE_S):
                for _ in ("its last lines", "that it has ended"):
                    await asyncio.wrap_future(self.store.flush())

    def close(self) -> None:
        self.store.close()
        os.close(self._lock)
