"""The full screen: every job, in the order that a key chooses."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from harnessd.cli.client import Client
from harnessd.cli.listing import grid, listed
from harnessd.cli.outcome import Failure
from harnessd.cli.render import age

_Key = Callable[[dict[str, Any]], Any]


def _most(field: str) -> _Key:
    return lambda job: (-(job[field] or 0), job["name"])


ORDERS: dict[str, tuple[str, _Key]] = {
    "c": ("cpu", _most("cpu_percent")),
    "m": ("memory", _most("rss_bytes")),
    "n": ("name", lambda job: job["name"]),
    "r": ("restarts", _most("restarts")),
    "u": ("uptime", _most("uptime_s")),
}
_QUIT = {"q", "Q", "\x03"}


class Top:
    """Looks at the jobs every so many seconds, and at the keyboard all the time."""

    def __init__(self, client: Client, tag: str | None, every_s: float) -> None:
        self._client = client
        self._tag = tag
        self._every_s = every_s
        self._order = "c"
        self._head = ""
        self._jobs: list[dict[str, Any]] = []

    def run(self) -> None:
        """Show it until q is pressed. Raises Failure when the daemon is not there at first."""
        self._look()
        with _keys() as keyboard, Live(self._screen(), screen=True, auto_refresh=False) as live:
            due = time.monotonic() + self._every_s
            while True:
                live.update(self._screen(), refresh=True)
                ready, _, _ = select.select([keyboard], [], [], max(0.0, due - time.monotonic()))
                for key in os.read(keyboard, 64).decode(errors="replace") if ready else "":
                    if key in _QUIT:
                        return
                    self._order = key if key in ORDERS else self._order
                if time.monotonic() >= due:
                    self._look_again()
                    due = time.monotonic() + self._every_s

    def _look_again(self) -> None:
        try:
            self._look()
        except Failure as failure:  # it may be back at the next look
            self._head = str(failure).splitlines()[0]

    def _look(self) -> None:
        self._jobs = listed(self._client, tag=self._tag)
        answer = self._client.ask("GET", "/healthz")
        health = answer.data if "jobs" in answer.data else answer.check().data
        states = ", ".join(f"{count} {state}" for state, count in sorted(health["jobs"].items()))
        up = age(health["uptime_s"])
        self._head = f"harnessd {health['version']}  {health['status']}  server up {up}  {states}"

    def _screen(self) -> Group:
        title, key = ORDERS[self._order]
        keys = "  ".join(f"{letter} {name}" for letter, (name, _) in ORDERS.items())
        foot = Text(f"by {title}    {keys}  q quit", style="dim")
        return Group(Text(self._head, style="bold"), foot, Text(), grid(sorted(self._jobs, key=key)).rich())


@contextmanager
def _keys() -> Iterator[int]:
    """Give the keyboard's descriptor, each key as it is pressed and none shown."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
