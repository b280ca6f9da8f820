"""The table of all jobs, which ps and top show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from harnessd.cli import render
from harnessd.cli.choose import choose
from harnessd.cli.client import Answer, Client, quoted
from harnessd.cli.render import NOTHING, Cell, Grid

TITLES = ("NAME", "STATE", "PID", "UPTIME", "CPU%", "RSS", "RESTARTS", "STATUS-AGE", "STATUS")
RIGHT = ("PID", "UPTIME", "CPU%", "RSS", "RESTARTS", "STATUS-AGE")


def ask(client: Client, tag: str | None = None, state: str | None = None) -> Answer:
    """Return the list of the jobs as the daemon gives it."""
    return client.get("/jobs", {"full": 1, "tag": tag, "state": state})


def listed(
    client: Client, names: Sequence[str] | None = None, tag: str | None = None, state: str | None = None
) -> list[dict[str, Any]]:
    """Return the lines of the jobs. Raises Failure when a name is none."""
    jobs: list[dict[str, Any]] = ask(client, tag, state).data["jobs"]
    if not names:
        return jobs
    wanted = choose(client, names, tag).names
    for name in set(wanted) - {job["name"] for job in jobs}:
        client.get(f"/jobs/{quoted(name)}")  # says that there is none, and which is near; or it is in another state
    return [job for job in jobs if job["name"] in wanted]


def grid(jobs: Iterable[dict[str, Any]]) -> Grid:
    """Return the table of the jobs."""
    return Grid(TITLES, [_row(job) for job in jobs], RIGHT)


def _row(job: dict[str, Any]) -> list[Cell]:
    return [
        Cell(job["name"]),
        render.state(job["state"], job["last_exit"]),
        Cell(str(job["pid"] or NOTHING)),
        Cell(render.age(job["uptime_s"])),
        Cell(NOTHING if job["cpu_percent"] is None else f"{job['cpu_percent']:.1f}"),
        Cell(render.size(job["rss_bytes"])),
        Cell(str(job["restarts"])),
        Cell(render.age(job["status_age_s"])),
        Cell(render.status_short(job["status_text"])),
    ]
