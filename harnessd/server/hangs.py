"""Finds the jobs that have stopped polling, records where they stand, and has them started again if that is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from harnessd.server import policy, stack, watchdog
from harnessd.server.entry import Entry, Live
from harnessd.server.records import EventKind
from harnessd.server.watchdog import Sight, Watch
from harnessd.states import State

Note = Callable[[Entry, EventKind, str | None, dict[str, Any]], None]
Apply = Callable[[Entry, policy.Event, str], None]
_UNWATCHED = Watch()
WATCHED = (State.STARTING, State.RUNNING)


class Hangs:
    """Looks at the pulses of the jobs that have a watchdog."""

    def __init__(self, note: Note, apply: Apply) -> None:
        self._note = note
        self._apply = apply
        self._finding: dict[int, asyncio.Task[None]] = {}  # by run: its stack is being read

    def look(self, entry: Entry, now: float) -> None:
        """Look at the job; to be called every second, with the monotonic time."""
        spec, live = entry.definition.spec, entry.live
        if live is None or live.ended:
            return
        before = live.watch
        if spec and spec.watchdog:
            live.watch = watchdog.look(before, _sight(entry, live), now, spec.watchdog.pulse_seconds)
        else:
            live.watch = _UNWATCHED
        if live.run in self._finding:
            return
        if live.watch.hung and not before.hung:
            task = asyncio.get_running_loop().create_task(self._found(entry, live))
            self._finding[live.run] = task
            task.add_done_callback(lambda _: self._finding.pop(live.run, None))
        elif before.hung and not live.watch.hung:
            self._note(entry, "hung-over", None, {"age_s": round(before.quiet_s, 1)})

    async def _found(self, entry: Entry, live: Live) -> None:
        """Record that it hangs, and where; then act. It may have gone on meanwhile, or be gone."""
        age_s = live.watch.quiet_s
        where = await stack.for_event(live.info.pid)
        spec = entry.definition.spec
        if entry.live is not live or live.ended or spec is None or spec.watchdog is None:
            return
        self._note(entry, "hung", None, {"age_s": round(age_s, 1), "action": spec.watchdog.action, **where})
        if not live.watch.hung:
            self._note(entry, "hung-over", None, {"age_s": round(age_s, 1)})
        elif spec.watchdog.action == "restart":
            self._apply(entry, policy.Hung(), f"hung: it has not polled for {age_s:.0f} s")


def _sight(entry: Entry, live: Live) -> Sight:
    polls, waiting = live.beat()
    quiet = polls == live.watch.polls and not waiting
    return Sight(polls, waiting, entry.job.state not in WATCHED or (quiet and live.is_stopped()))
