"""What Prometheus scrapes, in its text format or in OpenMetrics.

It is collected from the supervisor at each scrape, job by job, and made into text in pieces, so that whoever runs the
loop can turn to others in between. Loaded by the first scrape: a daemon that nobody scrapes does not pay for it.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from harnessd import tree
from harnessd.server.asked import Path
from harnessd.server.entry import Entry
from harnessd.server.health import COMMIT_BOUNDS_S, CommitTimes
from harnessd.server.procstat import Sampler
from harnessd.server.shapes import Health
from harnessd.server.tally import Tally
from harnessd.states import State, Want

_SAMPLES_A_PIECE = 300  # some milliseconds
_END = b"# EOF\n"
_MOST = sys.float_info.max  # JSON knows greater numbers

# Of jobs. What ends in _total counts, all else is as it is now.
JOB: dict[str, tuple[Sequence[str], str]] = {
    "harnessd_job_state": (("state",), "1 for the state that the job is in, 0 for the others"),
    "harnessd_job_wanted": ((), "1 if the job is wanted up, 0 if down"),
    "harnessd_job_up": ((), "1 if the job has a process, 0 if not"),
    "harnessd_job_restarts_total": ((), "Runs that were started without being asked for, in the job's life"),
    "harnessd_job_exits_total": (("reason",), "Ends of runs by reason, since the server started"),
    "harnessd_job_cpu_seconds_total": ((), "CPU time of the run's first process"),
    "harnessd_job_resident_memory_bytes": ((), "Resident memory of the run's first process"),
    "harnessd_job_threads": ((), "Threads of the run's first process"),
    "harnessd_job_open_fds": ((), "File descriptors that the run's first process has open"),
    "harnessd_job_uptime_seconds": ((), "Age of the run"),
    "harnessd_job_status_age_seconds": ((), "Time since the last status"),
    "harnessd_job_pulse_age_seconds": ((), "Time since the run last asked for messages, if it ever did"),
    "harnessd_job_commands_waiting": ((), "Commands in the mailbox that the run has not read"),
    "harnessd_job_commands_total": (("outcome",), "Commands by what became of them, since the server started"),
    "harnessd_job_journal_backlog_bytes": ((), "What the run has written into its journal that is not stored yet"),
    "harnessd_job_status_value": (("field",), "Numbers in the last status that the job's file names"),
}
# Of the daemon.
DAEMON: dict[str, tuple[Sequence[str], str]] = {
    "harnessd_build_info": (("version", "python"), "1; the labels tell the versions"),
    "harnessd_cpu_seconds_total": (("process",), "CPU time of the server and of the keeper"),
    "harnessd_resident_memory_bytes": (("process",), "Resident memory of the server and of the keeper"),
    "harnessd_open_fds": (("process",), "File descriptors that the server and the keeper have open"),
    "harnessd_server_starts_total": ((), "Servers that the keeper has started"),
    "harnessd_server_uptime_seconds": ((), "Age of the server"),
    "harnessd_refused_requests_total": ((), "Requests that were refused because of who asked, or from where"),
    "harnessd_dropped_clients_total": ((), "Clients that followed events too slowly and were dropped"),
    "harnessd_storage_ok": ((), "1 if what happens can be stored, 0 if it waits in the journals"),
    "harnessd_storage_queue_records": ((), "Records that wait to be stored"),
    "harnessd_storage_queue_lines": ((), "Lines of journals that wait to be stored"),
    "harnessd_storage_dropped_records_total": ((), "Records that were given up, as they could not be stored"),
    "harnessd_storage_wal_bytes": ((), "Size of SQLite's write-ahead log"),
}
_Row = tuple[tuple[str, ...], float]  # the values of the labels, and the value
COMMITS = "harnessd_storage_commit_seconds"


class Scrape:
    """One scrape. Add jobs and the daemon, then take the pieces."""

    def __init__(self) -> None:
        self._rows: dict[str, list[_Row]] = {name: [] for name in (*JOB, *DAEMON)}
        self._commits: CommitTimes | None = None

    def add_job(self, entry: Entry, backlog_bytes: int) -> None:
        """Take what is known of the job now; the figures of its process are at most a second old."""
        name, job, status = entry.name, entry.job, entry.last_status
        for state in State:
            self._add("harnessd_job_state", job.state is state, name, state)
        self._add("harnessd_job_wanted", job.want is Want.UP, name)
        self._add("harnessd_job_up", entry.live is not None, name)
        self._add("harnessd_job_restarts_total", job.restarts, name)
        for reason, times in entry.exits.items():
            self._add("harnessd_job_exits_total", times, name, reason)
        for outcome, times in entry.commands.items():
            self._add("harnessd_job_commands_total", times, name, outcome)
        self._add("harnessd_job_journal_backlog_bytes", backlog_bytes, name)
        self._add_run(entry)
        if (age_s := entry.status_age_s()) is not None:
            self._add("harnessd_job_status_age_seconds", age_s, name)
        if status and entry.definition.metrics:
            for field, value in _numbers(status.text, entry.definition.metrics):
                self._add("harnessd_job_status_value", value, name, field)

    def _add_run(self, entry: Entry) -> None:
        name, live = entry.name, entry.live
        waiting = len(entry.outbox) + (len(live.unread) if live else 0)
        self._add("harnessd_job_commands_waiting", waiting, name)
        if live is None:
            return
        self._add("harnessd_job_uptime_seconds", live.info.uptime_s(), name)
        if (age_s := live.pulse()["age_s"]) is not None:
            self._add("harnessd_job_pulse_age_seconds", age_s, name)
        if figures := live.sampler.sample():
            self._add("harnessd_job_cpu_seconds_total", figures.cpu_s, name)
            self._add("harnessd_job_resident_memory_bytes", figures.rss_bytes, name)
            self._add("harnessd_job_threads", figures.threads, name)
            self._add("harnessd_job_open_fds", figures.fds, name)

    def add_daemon(self, health: Health, tally: Tally, commits: CommitTimes | None) -> None:
        """Take what is known of the daemon itself; without commits it has no storage."""
        self._add("harnessd_build_info", 1, health["version"], platform.python_version())
        for process, pid in (("server", health["server_pid"]), ("keeper", health["keeper_pid"])):
            if figures := Sampler(pid, tree.start_ticks(pid), 0).sample():
                self._add("harnessd_cpu_seconds_total", figures.cpu_s, process)
                self._add("harnessd_resident_memory_bytes", figures.rss_bytes, process)
                self._add("harnessd_open_fds", figures.fds, process)
        self._add("harnessd_server_starts_total", health["server_starts"])
        self._add("harnessd_server_uptime_seconds", health["uptime_s"])
        self._add("harnessd_refused_requests_total", tally.refused)
        self._add("harnessd_dropped_clients_total", tally.dropped_clients)
        if commits:
            storage = health["storage"]
            self._add("harnessd_storage_ok", storage["ok"])
            self._add("harnessd_storage_queue_records", storage["queue"])
            self._add("harnessd_storage_queue_lines", storage["lines_waiting"])
            self._add("harnessd_storage_dropped_records_total", storage["dropped"])
            self._add("harnessd_storage_wal_bytes", storage["wal_bytes"])
            self._commits = commits

    def pieces(self, *, as_openmetrics: bool) -> Iterator[bytes]:
        """Return the text, each piece made in some milliseconds."""
        encode: Callable[[Collector], bytes] = openmetrics.generate_latest if as_openmetrics else generate_latest
        for name, rows in self._rows.items():
            for start in range(0, len(rows), _SAMPLES_A_PIECE):
                text = encode(_Part(_family(name, rows[start : start + _SAMPLES_A_PIECE]))).removesuffix(_END)
                yield text if start == 0 else _without_head(text)
        if self._commits:
            yield encode(_Part(_histogram(self._commits))).removesuffix(_END)
        if as_openmetrics:
            yield _END

    def _add(self, name: str, value: float, *labels: str) -> None:
        self._rows[name].append((labels, value))


def media_type(*, as_openmetrics: bool) -> str:
    return openmetrics.CONTENT_TYPE_LATEST if as_openmetrics else CONTENT_TYPE_PLAIN_0_0_4


class _Part(Collector):
    """A family of metrics, or some of its samples."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def _without_head(text: bytes) -> bytes:
    """Return the samples without the lines that describe their family."""
    while text.startswith(b"#"):
        text = text.partition(b"\n")[2]
    return text


def _family(name: str, rows: Iterable[_Row]) -> Metric:
    labels, told = JOB[name] if name in JOB else DAEMON[name]
    names = ("job", *labels) if name in JOB else labels
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name, told, labels=names)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _histogram(commits: CommitTimes) -> Metric:
    buckets = [(str(bound), count) for bound, count in zip((*COMMIT_BOUNDS_S, "+Inf"), commits.counts, strict=True)]
    return HistogramMetricFamily(COMMITS, "How long it took to store what waited", buckets, commits.sum_s)


def _numbers(text: str, fields: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, float]]:
    """Return those fields of the status that are numbers or booleans."""
    try:
        status = json.loads(text)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists: one job's fault alone
        return
    for name, path in fields:
        value = _at(status, path)
        if isinstance(value, int | float) and abs(value) <= _MOST:
            yield name, value


def _at(value: Any, path: Path) -> Any:
    """Return what stands at the path in the status, None if nothing does."""
    for step in path:
        match value, step:
            case dict(), str():
                value = value.get(step)
            case list(), int():
                value = value[step] if step < len(value) else None
            case _:
                return None
    return value
