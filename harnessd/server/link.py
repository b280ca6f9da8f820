"""The server's end of the keeper's control socket."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable
from typing import Any

from harnessd.channel import Channel
from harnessd.errors import HarnessError, KeeperLost, SpawnFailed, WireError
from harnessd.job import pulse
from harnessd.server.host import EndNote, Inventory, LiveRun
from harnessd.states import ExitReason, Want
from harnessd.wire import PROTOCOL, ExitRecord, Frame, RunSpec

_log = logging.getLogger(__name__)


class Link:
    """Speaks with the keeper. Use it in the event loop; every callback runs there."""

    def __init__(self, control: socket.socket) -> None:
        self._channel = Channel(control)
        self._ids = itertools.count(1)
        self._replies: dict[int, asyncio.Future[tuple[Frame, list[int]]]] = {}
        self._hello: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._inventory: Inventory | None = None  # while a list is being told
        self.lost = asyncio.Event()
        self._misheard = ""  # why something that the keeper said could not be used
        self.ending = False  # the keeper starts nothing any more
        self.on_exit: Callable[[ExitRecord], None] = lambda _: None
        self.on_reload: Callable[[], None] = lambda: None
        self.on_ending: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None
        self.on_preload_failed: Callable[[list[str], str], None] = lambda _, __: None
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._on_readable)

    async def hello(self) -> Frame:
        """Return the keeper's greeting: protocol, version, pid, server_starts, ending. Raise WireError, KeeperLost."""
        hello = await self._hello
        self.ending = self.ending or bool(hello.get("ending"))
        if hello.get("protocol") != PROTOCOL:
            raise WireError(
                f"cannot work with the keeper: it speaks protocol {hello.get('protocol')}, this server {PROTOCOL}; "
                "start the daemon anew"
            )
        return hello

    async def inventory(self) -> Inventory:
        """Return what the keeper holds. Raise HarnessError when it cannot tell all of it."""
        self._inventory = found = Inventory()
        reply, _ = await self._ask({"op": "list"})
        self._inventory = None
        if problem := reply.get("error") or self._misheard:  # runs that were not told of must not be taken for lost
            raise HarnessError(f"cannot hear from the keeper what it holds: {problem}")
        ended = {record.run for record in found.exits}  # some may have while the list was told
        for run in found.live:
            if run.run in ended:
                os.close(run.mailbox)
        found.live = [run for run in found.live if run.run not in ended]
        return found

    async def spawn(self, spec: RunSpec) -> LiveRun:
        reply, fds = await self._ask({"op": "spawn", "spec": spec.to_frame()})
        if "error" in reply:
            raise SpawnFailed(reply["error"])
        try:
            return _live_run(reply, fds)
        except OSError as error:  # no descriptor or no memory is left to look at it with
            self.end(spec.run, 0.0, EndNote(ExitReason.UNSTARTED, Want.UP))
            raise SpawnFailed(f"cannot start {spec.job!r}: {error}") from None

    def end(self, run: int, grace_s: float | None, note: EndNote) -> None:
        self._tell({"op": "end", "run": run, "grace": grace_s, "note": note.to_frame()})

    def signal(self, run: int, number: signal.Signals) -> None:
        self._tell({"op": "signal", "run": run, "signals": [number], "tree": True})

    def acknowledge(self, run: int) -> None:
        self._tell({"op": "ack", "run": run})

    def store(self, name: str, fds: list[int]) -> None:
        """Have the keeper hold copies of the descriptors for the next server; none lets it drop what it holds."""
        self._tell({"op": "store", "name": name}, fds)

    async def release(self, name: str) -> None:
        """Have the keeper drop what it holds by that name, and wait until it has."""
        await self._ask({"op": "store", "name": name})

    def preload(self, modules: list[str]) -> None:
        """Have later runs forked from a process that has imported these; `on_preload_failed` tells when it cannot."""
        self._tell({"op": "preload", "modules": modules})

    def reloaded(self) -> None:
        """Say that a reload the keeper has asked for is done."""
        self._tell({"op": "reloaded"})

    def ready(self) -> None:
        """Say that this server serves."""
        self._tell({"op": "ready"})

    def close(self) -> None:
        self.lost.set()
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        asyncio.get_running_loop().remove_writer(self._channel.fileno())
        self._channel.close()

    async def _ask(self, frame: Frame) -> tuple[Frame, list[int]]:
        if self.lost.is_set():
            raise KeeperLost("cannot reach the keeper: it is gone")
        number = next(self._ids)
        reply: asyncio.Future[tuple[Frame, list[int]]] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        self._tell(frame | {"id": number})
        return await reply

    def _tell(self, frame: Frame, fds: Iterable[int] = ()) -> None:
        if not self.lost.is_set():  # whoever takes over hears of the runs by itself
            self._channel.send(frame, fds)
            self._watch()

    def _flush(self) -> None:
        self._channel.flush()
        self._watch()

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        if self._channel.is_blocked:
            loop.add_writer(self._channel.fileno(), self._flush)
        else:
            loop.remove_writer(self._channel.fileno())

    def _on_readable(self) -> None:
        try:
            frames, alive = self._channel.receive()
        except WireError:
            frames, alive = [], False
        for frame, fds in frames:
            try:
                self._on_frame(frame, fds)
            except Exception as error:  # those behind it are to be heard
                self._misheard = repr(error)
                _log.exception("cannot use what the keeper says")
        if not alive:
            self._on_lost()

    def _on_lost(self) -> None:
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        self.lost.set()
        self.on_lost()
        error = KeeperLost("the keeper is gone")
        waiting_all: list[asyncio.Future[Any]] = [self._hello, *self._replies.values()]
        for waiting in waiting_all:
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # seen, also when nobody awaits it
        self._replies.clear()

    def _on_frame(self, frame: Frame, fds: list[int]) -> None:
        if "re" in frame:
            reply = self._replies.pop(frame["re"], None) if frame["re"] is not None else None
            if reply and not reply.done():
                reply.set_result((frame, fds))
            return
        match frame.get("event"):
            case "hello" if not self._hello.done():
                self._hello.set_result(frame)
            case "child" if self._inventory is not None:
                self._inventory.live.append(_live_run(frame, fds))
            case "stored" if self._inventory is not None:
                self._inventory.stored[frame["name"]] = fds
            case "exit":
                record = ExitRecord.from_frame(_without(frame, "event", "fds"))
                if self._inventory is not None:
                    self._inventory.exits.append(record)
                else:
                    self.on_exit(record)
            case "reload":
                self.on_reload()
            case "ending":
                self.ending = True
                self.on_ending()
            case "preload-failed":
                self.on_preload_failed(frame["modules"], frame["why"])


def _live_run(frame: Frame, fds: list[int]) -> LiveRun:
    mailbox, page = fds
    try:
        view = pulse.attach(page)
    except OSError:
        os.close(mailbox)
        raise
    finally:
        os.close(page)
    return LiveRun(**_without(frame, "event", "fds", "re"), mailbox=mailbox, page=view)


def _without(frame: Frame, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in frame.items() if key not in keys}
