"""What is different on a terminal: colour, the width, and tables that change as one looks."""

from __future__ import annotations

import re
from collections.abc import Callable

from helpers.command import Command, Going
from helpers.daemon import Daemon
from helpers.waiting import DEADLINE_S, until

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
Start = Callable[..., Going]


def screen(going: Going) -> list[str]:
    """Return the lines that were drawn, without colours."""
    return _ESCAPE.sub("", going.seen()).replace("\r", "").splitlines()


def whole(going: Going) -> list[str]:
    """Return what it drew before it ended with exit code 0."""
    until(lambda: going.seen() is not None and going.process.poll() is not None, "it ends")
    assert going.process.returncode == 0, going.seen()
    return screen(going)


def test_ps_has_coloured_states_and_is_cut_to_the_width(going: Start, daemon: Daemon) -> None:
    shown = going("ps", "feed-a", "late", terminal=True, COLUMNS="90")
    lines = whole(shown)
    assert "\x1b[32mrunning" in shown.seen()
    assert "\x1b[2mstopped" in shown.seen()
    assert {len(line) <= 90 for line in lines} == {True}
    assert lines[1].rstrip().endswith("…")


def test_no_color_is_obeyed(going: Start, daemon: Daemon) -> None:
    shown = going("ps", terminal=True, NO_COLOR="1")
    whole(shown)
    assert "\x1b[32m" not in shown.seen()


def test_ps_watch_shows_what_changes(going: Start, harnessd: Command, daemon: Daemon) -> None:
    shown = going("ps", "--watch", "--every", "0.1", terminal=True)
    shown.until_seen("feed-a")
    harnessd.done("start", "late")
    until(lambda: any(re.match(r"late +running", line) for line in screen(shown)), "late runs")
    harnessd.done("kill", "late")
    assert shown.interrupt() == 130


def test_ps_watch_in_a_pipe_prints_the_table_again_and_again(going: Start, daemon: Daemon) -> None:
    shown = going("ps", "feed-a", "--watch", "--every", "0.1")
    until(lambda: shown.seen().count("NAME") > 2, "it is printed again")
    assert "\x1b" not in shown.seen()
    assert shown.interrupt() == 130


def order(going: Going, drawn: int) -> list[str]:
    """Return the names on the screen as it was drawn last, if it was drawn since."""
    frames = "\n".join(screen(going)).split("harnessd ")
    return re.findall(r"^(feed-a|feed-b|late|speaks) ", frames[-1], re.MULTILINE) if len(frames) > drawn else []


def test_top_sorts_by_the_key_that_is_pressed_and_ends_with_q(going: Start, daemon: Daemon) -> None:
    shown = going("top", "--every", "0.2", terminal=True)
    shown.until_seen("by cpu")
    shown.press("n")
    shown.until_seen("by name")
    until(lambda: order(shown, 2) == ["feed-a", "feed-b", "late", "speaks"], "they are sorted by name")
    shown.press("m")
    shown.until_seen("by memory")
    until(lambda: order(shown, 2)[-2:] == ["speaks", "late"], "they are sorted by memory")
    assert "3 running, 1 stopped" in shown.seen()
    shown.press("q")
    assert shown.process.wait(DEADLINE_S) == 0
    assert "\x1b[?1049l" in shown.seen()


def test_top_goes_on_when_the_server_is_replaced(going: Start, daemon: Daemon) -> None:
    shown = going("top", "--every", "0.1", terminal=True)
    shown.until_seen("by cpu")
    daemon.wait_new_server(daemon.kill_server())
    shown.press("u")
    shown.until_seen("by uptime")
    shown.press("q")
    assert shown.process.wait(DEADLINE_S) == 0


def test_a_wait_shows_a_line_of_progress(going: Start, harnessd: Command, daemon: Daemon) -> None:
    shown = going("stop", "feed-a", "late", "--wait", terminal=True)
    shown.until_seen("⠋\x1b[0m stop")  # feed-a, late; or how far it is by then
    until(lambda: shown.process.poll() is not None, "it ends")
    shown.until_seen("feed-a: stopped")
    harnessd.done("start", "feed-a", "--wait")
