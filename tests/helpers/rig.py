"""A keeper in a process of its own, driven over its control socket as a server drives it."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.brand import Brand
from helpers.daemon import children
from helpers.script import ROOT
from helpers.waiting import DEADLINE_S, until

from harnessd import tree
from harnessd.states import Command
from harnessd.wire import Frame, FrameReader, RunSpec, pack_command, pack_frame

# Without a server of its own it would take itself for a copy of a user's script; its runs are to be like the daemon's.
_KEEPER = """
import dataclasses, socket, sys
from harnessd.keeper import warm
from harnessd.keeper.loop import Keeper
warm.load()
keeper = Keeper(control=socket.socket(fileno=int(sys.argv[1])))
keeper._pristine = dataclasses.replace(keeper._pristine, script=False, own_fds=None)
sys.exit(keeper.run())
"""
HEAD = """\
import asyncio, os, signal, sys, threading, time
from harnessd import Command, Cradle

"""


@dataclass
class Run:
    """A run that the keeper has forked."""

    spec: RunSpec
    frame: Frame
    fds: list[int]
    _ids: Any = field(default_factory=lambda: itertools.count(1))

    @property
    def pid(self) -> int:
        return int(self.frame["pid"])

    @property
    def out(self) -> str:
        return Path(self.spec.output).read_text()

    def send(self, cmd: Command, data: Any = None) -> int:
        """Put a command into its mailbox. Return the command's id."""
        number = next(self._ids)
        os.write(self.fds[0], pack_command(cmd, data, number, 1.5))
        return number

    def said(self, kind: str = "status") -> list[Any]:
        """Return what its journal has of a kind."""
        lines = [json.loads(line) for line in Path(self.spec.journal).read_text().splitlines()]
        return [line[kind] for line in lines if kind in line]

    def until_said(self, status: Any) -> None:
        until(lambda: status in self.said() or not self.is_left(), f"the job says {status!r}")
        assert status in self.said(), f"it ended without saying {status!r}: {self.out}"

    def is_left(self) -> bool:
        return bool(tree.members({self.spec.mark}))


class Rig:
    """The keeper and a server's end of its socket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = itertools.count(1)
        self._brand = Brand()
        self._events: list[tuple[Frame, list[int]]] = []
        self._fds: list[int] = []
        self._reader = FrameReader()
        self.control, theirs = socket.socketpair()
        self.control.settimeout(DEADLINE_S)
        with theirs, open(folder / "keeper.err", "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _KEEPER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stderr=errors,
                preexec_fn=self._brand.wear,
            )
        self.hello = self.event("hello")[0]

    # frames

    def tell(self, frame: Frame, fds: list[int] | None = None) -> None:
        fds = fds or []
        socket.send_fds(self.control, [pack_frame(frame | {"fds": len(fds)})], fds)

    def ask(self, op: Any, **more: Any) -> tuple[Frame, list[int]]:
        """Return the keeper's answer, and the descriptors with it."""
        number = next(self._ids)
        self.tell({"op": op, "id": number} | more)
        while True:
            frame, fds = self._next()
            if frame.get("re") == number:
                return frame, fds
            if "event" in frame:
                self._events.append((frame, fds))

    def event(self, kind: str, **expected: Any) -> tuple[Frame, list[int]]:
        """Return the first event of the kind that has these values."""
        wanted = ({"event": kind} | expected).items()
        while True:
            for index, (frame, _) in enumerate(self._events):
                if wanted <= {key: value for key, value in frame.items() if key in ("event", *expected)}.items():
                    return self._events.pop(index)
            self._events.append(self._next())

    def events(self) -> list[tuple[Frame, list[int]]]:
        """Return the events that came before the last answer and were not asked for."""
        events, self._events = self._events, []
        return events

    def _next(self) -> tuple[Frame, list[int]]:
        while (found := self._reader.next()) is None:
            if not self._reader.receive(self.control):
                raise EOFError("the keeper has closed the connection")
        self._fds += found[1]
        return found

    # runs

    def spec(self, body: str = "", **changes: Any) -> RunSpec:
        """Return the spec of a run; the body is a module with a Job."""
        number = next(self._ids)
        if body:
            path = self._folder / f"job{number}.py"
            path.write_text(HEAD + textwrap.dedent(body))
            changes = {"entrypoint": f"{path}:Job"} | changes
        blank = RunSpec(
            run=number,
            job=f"job{number}",
            mark=tree.new_mark(),
            journal=str(self._folder / f"{number}.jsonl"),
            output=str(self._folder / f"{number}.log"),
            kill_grace=0.3,
        )
        return RunSpec.from_frame(blank.to_frame() | changes)

    def spawn(self, body: str = "", **changes: Any) -> Run:
        """Fork a run; raise AssertionError when the keeper does not."""
        spec = self.spec(body, **changes)
        frame, fds = self.ask("spawn", spec=spec.to_frame())
        assert "error" not in frame, frame["error"]
        return Run(spec, frame, fds)

    def ended(self, run: Run) -> Frame:
        """Return the exit record of the run once nothing is left of it."""
        return self.event("exit", run=run.spec.run)[0]

    def run(self, body: str = "", **changes: Any) -> tuple[int, Run]:
        """Run a job to its end. Return its exit code, 128 + N for signal N."""
        run = self.spawn(body, **changes)
        ended = self.ended(run)
        return ended["code"] if ended["signal"] is None else 128 + ended["signal"], run

    def members(self) -> list[int]:
        """Return the keeper and what there is of its runs: not what was forked ahead for the next."""
        found = self._brand.members()
        ahead = [pid for pid in children(self.process.pid) if not any(map(tree.is_mark, tree._worn_by(pid)[:1]))]
        return [pid for pid in found if pid not in ahead]

    def close(self) -> None:
        """Leave the keeper alone; raise AssertionError if it does not end and take everything with it."""
        self.control.close()
        for fd in self._fds:
            os.close(fd)
        try:
            self.process.wait(DEADLINE_S)
            until(lambda: not self._brand.members(), "nothing is left")
        finally:
            self._brand.kill()
            self.process.wait(DEADLINE_S)
