"""What a reader of history gets: rows, their columns, and pages of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from harnessd.server.asked import Asked, What

COLUMNS: dict[What, tuple[str, ...]] = {
    "history": ("at", "job", "run", "seq", "status"),
    "runs": (
        *("run", "job", "pid", "started", "ended", "wall_s", "exit_code", "signal", "reason", "cpu_s"),
        "peak_rss_bytes",
    ),
    "events": ("at", "id", "job", "run", "kind", "actor", "data"),
    "metrics": ("at", "job", "run", "cpu_percent", "rss_bytes", "threads", "fds"),
}
BUCKET_COLUMNS = ("bucket", "rows", "min", "max", "mean")

Row = tuple[Any, ...]


class Json(str):
    """Text that is JSON already."""

    __slots__ = ()


class Page(NamedTuple):
    rows: list[Row]
    next: str | None  # the cursor to the rows behind these


def columns(asked: Asked) -> tuple[str, ...]:
    """Return the names of what is in a row."""
    return (*COLUMNS[asked.what], *(BUCKET_COLUMNS if asked.every_us else ()))
