"""What a person sees. On a terminal rich draws it; anywhere else it is plain text, nothing coloured and nothing cut."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from harnessd.cli.outcome import Code, Failure

if TYPE_CHECKING:
    from rich.table import Table

STATE_STYLES = {
    "running": "green",
    "starting": "cyan",
    "stopping": "cyan",
    "paused": "yellow",
    "backoff": "magenta",
    "failed": "bold red",
    "exited": "blue",
    "stopped": "dim",
}
NOTHING = "-"
_GAP = 2  # between two columns


class Cell(NamedTuple):
    text: str
    style: str = ""


class Grid(NamedTuple):
    """A table: the last column takes what is left of the width. `right` has the titles whose cells end in line."""

    titles: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    right: Collection[str] = ()

    @property
    def widths(self) -> list[int]:
        return [max(len(text) for text in column) for column in zip(*self._texts(), strict=True)]

    def _texts(self) -> list[list[str]]:
        return [list(self.titles), *([cell.text for cell in row] for row in self.rows)]

    def plain(self) -> str:
        """Return the lines as they go into a pipe."""
        lines = []
        for texts in self._texts():
            padded = (
                text.rjust(width) if title in self.right else text.ljust(width)
                for title, text, width in zip(self.titles, texts, self.widths, strict=True)
            )
            lines.append((" " * _GAP).join(padded).rstrip() + "\n")
        return "".join(lines)

    def rich(self) -> Table:
        """Return the table as it is drawn on a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
        for title, width in zip(self.titles, self.widths, strict=True):
            table.add_column(title, no_wrap=True, min_width=width, justify="right" if title in self.right else "left")
        last, taken = table.columns[-1], sum(width + _GAP for width in self.widths[:-1])
        last.min_width = None
        last.max_width = max(len(self.titles[-1]), shutil.get_terminal_size().columns - taken)
        last.overflow = "ellipsis"
        for row in self.rows:
            table.add_row(*(Text(cell.text, cell.style) for cell in row))
        return table


def show(grid: Grid) -> None:
    if on_terminal():
        from rich.console import Console

        Console(highlight=False).print(grid.rich())
    else:
        say(grid.plain(), nl=False)


def on_terminal() -> bool:
    return sys.stdout.isatty()


def as_it_is(body: bytes) -> None:
    """Print an answer of the daemon without touching it."""
    say(body, nl=False)


def say(what: str | bytes, nl: bool = True) -> None:
    """Print to stdout. Raises Failure when that does not take it; BrokenPipeError, of which typer makes a quiet end."""
    try:
        typer.echo(what, nl=nl)
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end
        raise Failure(Code.FAILED, f"cannot write to stdout: {error.strerror}") from None


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], object]]:
    """Show a line on stderr while something takes its time; give what changes it. Not a terminal: say nothing."""
    if not sys.stderr.isatty():
        yield str
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(text)) as status:
        yield lambda text: status.update(escape(text))


# values in short


def state(name: str, last_exit: dict[str, Any] | None = None) -> Cell:
    """Return the job's state, and in what its last run ended when that is why."""
    why = ""
    if last_exit and name in ("failed", "backoff"):
        why = f" ({last_exit['signal'] or last_exit['code'] if last_exit['reason'] != 'unstarted' else 'unstarted'})"
    return Cell(name + why, STATE_STYLES.get(name, ""))


def exit_in_words(ended: dict[str, Any] | None) -> str:
    if not ended:
        return NOTHING
    if ended["signal"]:
        return f"{ended['reason']}: signal {ended['signal']}"
    return f"{ended['reason']}: exit code {ended['code']}" if ended["code"] is not None else str(ended["reason"])


def age(seconds: float | None) -> str:
    """Return a span in at most two units."""
    if seconds is None:
        return NOTHING
    if seconds < 10:
        return f"{max(0.0, seconds):.1f}s"
    whole = int(seconds)
    for unit, part, unit_s, part_s in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if whole >= unit_s:
            return f"{whole // unit_s}{unit}{whole % unit_s // part_s:02d}{part}"
    return f"{whole}s"


def size(count: float | None) -> str:
    """Return bytes in a binary unit."""
    if count is None:
        return NOTHING
    for unit in ("B", "K", "M", "G"):
        if count < 1024:
            return f"{count:.0f}{unit}" if unit == "B" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}T"


def value(found: object) -> str:
    """Return what a program said, on one line and without what would steer the terminal."""
    if found is None:
        return NOTHING
    if isinstance(found, dict) and found:
        text = " ".join(f"{key}={_inner(item)}" for key, item in found.items())
    else:
        text = _inner(found)
    return printable(text)


def status_short(text: str | None) -> str:
    """Return a status that may have been cut, as one line."""
    if text is None:
        return NOTHING
    try:
        return value(json.loads(text))
    except ValueError:  # it was cut
        return printable(text) + "…"


def _inner(found: object) -> str:
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, separators=(",", ":"))


def printable(text: str) -> str:
    return text if text.isprintable() else "".join(char if char.isprintable() else "�" for char in text)
