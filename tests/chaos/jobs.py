"""Jobs of all kinds that note what they did. `args` are the job's name and how likely it crashes at each step."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

from witness import Voice, Witness

from harnessd import Command, Cradle

STEP_S = 0.3


class Kind(Cradle):
    """What the jobs below share."""

    def begin(self, name: str, crash: str = "0") -> None:
        self.witness = Witness(name)
        self.crash_rate = float(crash)
        self.voice = self.new_voice()
        self.paused = False

    def new_voice(self) -> Voice:
        return Voice(self.witness, self.set_status)

    def hear(self, timeout: float | None = STEP_S) -> str | None:
        """Return the next command's word."""
        message = self.get_msg(timeout)
        if message is None:
            return None
        self.witness.read(message)
        self.paused = message["cmd"] == Command.PAUSE or (self.paused and message["cmd"] == Command.CONFIG)
        return str(message["cmd"])

    def risk(self) -> None:
        if self.witness.chance.random() < self.crash_rate:
            self.witness.crash()


class Polls(Kind):
    """Reads its commands and reports."""

    def run(self, *args: str) -> int:
        self.begin(*args)
        while self.hear() != Command.STOP:
            self.risk()
            if not self.paused:
                self.voice.say()
        return self.witness.leave(0)


class Loops(Kind):
    """The same with asyncio."""

    async def run(self, *args: str) -> int:
        self.begin(*args)
        told: asyncio.Queue[str] = asyncio.Queue()
        talking = asyncio.create_task(self.talk())
        hearing = asyncio.create_task(self.listen(told))
        while await told.get() != Command.STOP:
            self.risk()
        talking.cancel()
        hearing.cancel()
        return self.witness.leave(0)

    async def talk(self) -> None:
        while True:
            self.voice.say()
            await asyncio.sleep(STEP_S)

    async def listen(self, told: asyncio.Queue[str]) -> None:
        while True:
            if command := self.hear(0):
                await told.put(command)
            await asyncio.sleep(0.05)


class Deaf(Kind):
    """Never looks at its mailbox, and ends by itself now and then."""

    def run(self, *args: str) -> int:
        self.begin(*args)
        while self.witness.chance.random() > 0.005:
            self.risk()
            self.voice.say()
            time.sleep(STEP_S)
        return self.witness.leave(0)


class Threads(Kind):
    """Three threads report, two of them read commands, too."""

    def run(self, *args: str) -> int:
        self.begin(*args)
        over = threading.Event()
        for number in range(3):
            threading.Thread(target=self.work, args=(number < 2, over), daemon=True).start()
        while not over.wait(STEP_S):
            self.risk()
        return self.witness.leave(0)

    def work(self, hears: bool, over: threading.Event) -> None:
        voice = self.new_voice()
        while not over.is_set():
            if hears and self.hear(STEP_S) == Command.STOP:
                over.set()
            elif not hears:
                time.sleep(STEP_S)
            voice.say()


class Forks(Kind):
    """Two forked children report, one of them reads commands, too; one that ends is followed by another."""

    def run(self, *args: str) -> int:
        self.begin(*args)
        self.children = {0: self.child(True), 1: self.child(False)}
        while self.hear() != Command.STOP:
            self.risk()
            self.voice.say()
            self.replace_ended()
        return self.witness.leave(0)

    def replace_ended(self) -> None:
        for place, pid in self.children.items():
            with suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    self.children[place] = self.child(place == 0)

    def child(self, hears: bool) -> int:
        pid = os.fork()
        if pid == 0:
            self.be_child(hears)
        return pid

    def be_child(self, hears: bool) -> NoReturn:
        try:
            self.witness.note("child")
            self.witness.chance.seed(os.getpid())
            voice = self.new_voice()
            while self.witness.chance.random() > 0.02:
                if hears:
                    self.hear(STEP_S)
                else:
                    time.sleep(STEP_S)
                voice.say()
        finally:
            os._exit(0)


class Daemonises(Kind):
    """Leaves grandchildren behind in sessions of their own, some without its environment, some that ignore SIGTERM."""

    def run(self, *args: str) -> int:
        self.begin(*args)
        while self.hear() != Command.STOP:
            self.risk()
            self.voice.say()
            if self.witness.chance.random() < 0.15:
                self.daemonise(self.witness.chance.randrange(3))
        return self.witness.leave(0)

    def daemonise(self, way: int) -> None:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        try:
            os.setsid()
            if os.fork() == 0:
                self.be_grandchild(way)
        finally:
            os._exit(0)

    def be_grandchild(self, way: int) -> NoReturn:
        self.witness.note("grandchild", way=way)
        if way == 0:
            os.execv("/usr/bin/env", ["env", "-i", "/bin/sleep", "6"])
        if way == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        voice = self.new_voice()
        for _ in range(12):
            voice.say()
            time.sleep(STEP_S)
        os._exit(0)


class Signals(Kind):
    """Is steered by signals and knows nothing of commands."""

    def run(self, *args: str) -> int:
        self.begin(*args)
        over: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: over.append(number))
        while not over:
            self.risk()
            self.voice.say()
            time.sleep(STEP_S)
        return self.witness.leave(0)


class Slow(Kind):
    """Takes its time to stop: more than its grace."""

    def run(self, *args: str) -> int:
        self.begin(*args)
        over: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: over.append(number))
        while not over and self.hear() != Command.STOP:
            self.risk()
            self.voice.say()
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            self.voice.say(stopping=True)
            time.sleep(STEP_S)
        return self.witness.leave(0)


class Chatty(Kind):
    """Writes some 200 kB/s to stdout and stderr."""

    def run(self, *args: str) -> int:
        self.begin(*args)
        number = 0
        while self.hear(0.1) != Command.STOP:
            self.risk()
            for _ in range(100):
                number += 1
                with suppress(OSError):  # a full disk loses output, and is no reason to end
                    os.write(2 if number % 7 == 0 else 1, b"%199d\n" % number)
            self.voice.say(number=number)
        return self.witness.leave(0)


class Floods(Kind):
    """Reports more at once than a journal may hold, now and then."""

    def run(self, *args: str) -> int:
        self.begin(*args)
        payload: dict[str, Any] = {"payload": "x" * 3000}
        while self.hear() != Command.STOP:
            self.risk()
            self.voice.say()
            if self.witness.chance.random() < 0.02:
                for _ in range(400):
                    self.voice.say(**payload)
        return self.witness.leave(0)
