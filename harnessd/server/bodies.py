"""What the routes answer about a job, as plain data."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable

from harnessd import __version__
from harnessd.server.entry import Entry
from harnessd.server.shapes import (
    Check,
    Config,
    FullSummary,
    Health,
    ReceiverHealth,
    Status,
    Storage,
    Summary,
    Vitals,
    Whole,
)
from harnessd.server.timespan import iso
from harnessd.server.watchdog import Checked
from harnessd.wire import merged

STATUS_SHORT_CHARS = 500  # of a status as JSON, in the list of all jobs


def heartbeat(entry: Entry) -> Vitals:
    """Return all that is known from outside, without asking the job; figures are at most a second old."""
    live = entry.live
    return {
        "job": entry.name,
        "state": entry.job.state,
        "want": entry.job.want,
        "alive": live is not None,
        "pid": live.info.pid if live else None,
        "run": live.run if live else None,
        "uptime_s": round(live.info.uptime_s(), 3) if live else None,
        "restarts": entry.job.restarts,
        "process": live.sampler.shown() if live else None,
        "limits": live.info.limits if live else None,
        "pulse": live.pulse() if live else None,
        "hung_s": round(live.watch.quiet_s, 1) if live and live.watch.hung else None,
        "check": _checked(entry.checked) if live and entry.checked else None,
        "status_age_s": _rounded(entry.status_age_s()),
        "mailbox": {"waiting": len(live.unread) + len(entry.outbox) if live else len(entry.outbox)},
        "last_exit": entry.last_exit.shown() if entry.last_exit else None,
        "time": iso(time.time_ns() // 1000),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _checked(checked: Checked) -> Check:
    return {
        "ok": checked.ok,
        "failures": checked.failures,
        "last_error": checked.last_error,
        "at": iso(int(checked.at * 1e6)) if checked.at is not None else None,
    }


def summary(entry: Entry) -> Summary:
    """Return the job's line in the list of all."""
    return {
        "name": entry.name,
        "state": entry.job.state,
        "want": entry.job.want,
        "pid": entry.live.info.pid if entry.live else None,
        "uptime_s": round(entry.live.info.uptime_s(), 3) if entry.live else None,
        "restarts": entry.job.restarts,
        "last_exit": entry.last_exit.shown() if entry.last_exit else None,
        "tags": list(entry.definition.tags),
    }


def summary_in_full(entry: Entry) -> FullSummary:
    """Return the job's line with what a table of all jobs shows: its use of the host, and its last status in short."""
    figures = entry.live.sampler.sample() if entry.live else None
    status = entry.last_status
    return {
        **summary(entry),
        "cpu_percent": figures.cpu_percent if figures else None,
        "rss_bytes": figures.rss_bytes if figures else None,
        "status_age_s": _rounded(entry.status_age_s()),
        "status_text": status.text[:STATUS_SHORT_CHARS] if status else None,
    }


def whole(entry: Entry) -> Whole:
    """Return the job in full, its spec without secrets."""
    return {
        **heartbeat(entry),
        "name": entry.name,
        "tags": list(entry.definition.tags),
        "spec": dict(entry.definition.shown),
        "problems": entry.problems,
        "config": config(entry),
        "status": status(entry),
    }


def config(entry: Entry) -> Config:
    """Return the config from the file, the overrides, and both merged."""
    return {
        "job": entry.name,
        "file": dict(entry.definition.config),
        "overrides": entry.overrides,
        "effective": merged(entry.definition.config, entry.overrides),
    }


def status(entry: Entry) -> Status:
    """Return the last status; `status` is None and so is the rest when there was none."""
    line = entry.last_status
    return {
        "job": entry.name,
        "run": line.run if line else None,
        "seq": line.seq if line else None,
        "at": iso(line.at_us) if line else None,
        "status": json.loads(line.text) if line else None,
    }


def in_each_state(entries: Iterable[Entry]) -> dict[str, int]:
    return dict(Counter(entry.job.state for entry in entries))


def health(
    entries: Callable[[], Iterable[Entry]],
    *,
    keeper_pid: int,
    server_starts: int,
    storage: Callable[[], Storage],
    receivers: Callable[[], list[ReceiverHealth]] = list,
) -> Callable[[], Health]:
    """Return what tells the daemon's own health; `status` is "ok" or what is wrong."""
    since = time.monotonic()

    def told() -> Health:
        stored = storage()
        found: Health = {
            "status": "ok" if stored["ok"] else "storage",
            "server_pid": os.getpid(),
            "keeper_pid": keeper_pid,
            "server_starts": server_starts,
            "uptime_s": round(time.monotonic() - since, 3),
            "version": __version__,
            "jobs": in_each_state(entries()),
            "storage": stored,
        }
        if told_of := receivers():
            found["notify"] = told_of
        return found

    return told
