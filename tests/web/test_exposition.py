from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.documents import ROOT
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain_text

from harnessd.errors import ConfigError
from harnessd.server.definition import Definition, from_file
from harnessd.server.exposition import COMMITS, DAEMON, JOB
from harnessd.server.health import COMMIT_BOUNDS_S, Health
from harnessd.server.jobspec import JobSpec
from harnessd.server.policy import Rules
from harnessd.server.records import Event
from harnessd.server.settings import History
from harnessd.server.supervisor import Folders, Supervisor
from harnessd.server.tally import Tally
from harnessd.server.tape import Line
from harnessd.states import ExitReason, State
from harnessd.web.app import make_app
from harnessd.web.call import Context
from harnessd.web.guard import GuardPolicy

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
Key = tuple[str, frozenset[tuple[str, str]]]


class NoHost:
    """A host on which nothing can be started."""

    on_exit: Any = None


def spec(**keys: Any) -> JobSpec:
    return JobSpec.parse({"name": "feed", "file": Path("/feed.toml"), "command": ["true"], **keys}, "feed.toml")


def supervisor_of(*definitions: Definition) -> Supervisor:
    supervisor = Supervisor(NoHost(), Folders(Path("/nonexistent"), 1 << 20), lambda _: None)  # type: ignore[arg-type]
    for definition in definitions:
        supervisor.add(definition)
    return supervisor


def job(name: str) -> Definition:
    return Definition(name, Rules(), 0.1, config={}, run_spec=lambda spec: spec, digest="", shown={})


def scrape(supervisor: Supervisor, accept: str = "text/plain", **more: Any) -> httpx.Response:
    storage = {"ok": True, "queue": 2, "lines_waiting": 3, "dropped": 1, "wal_bytes": 4096}
    pids = {"server_pid": os.getpid(), "keeper_pid": os.getppid()}
    health = {"version": "1.2", "server_starts": 3, "uptime_s": 9.5, "storage": storage, **pids}
    context = Context(supervisor, lambda: health, 1000, **more)  # type: ignore[arg-type, return-value]

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(context, GuardPolicy()), client=("127.0.0.1", 4000))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:2222") as client:
            return await client.get("/metrics", headers={"accept": accept})

    answer = asyncio.run(asked())
    assert answer.status_code == 200, answer.text
    return answer


def values(families: Iterable[Metric]) -> dict[Key, float]:
    found = [(sample, frozenset(sample.labels.items())) for family in families for sample in family.samples]
    assert len({(sample.name, labels) for sample, labels in found}) == len(found), "no sample is there twice"
    return {(sample.name, labels): sample.value for sample, labels in found}


def read(answer: httpx.Response) -> dict[Key, float]:
    return values(plain_text(answer.text))


def of(found: dict[Key, float], name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_the_documented_metrics_are_those_that_are_exposed() -> None:
    rows = [line.split("|") for line in (ROOT / "docs/monitoring.md").read_text().splitlines() if line[:3] == "| `"]
    documented = {row[1].strip(" `"): re.findall(r"`(\w+)`", row[2].partition(":")[0]) for row in rows}
    exposed = {name: list(labels) for name, (labels, _) in (JOB | DAEMON).items()}
    assert documented == exposed | {COMMITS: ["le"]}


def test_a_job_is_shown_with_its_counts() -> None:
    supervisor = supervisor_of(job("feed"), job("etl"))
    feed = supervisor.find("feed")
    feed.exits[ExitReason.CRASHED] += 2
    feed.commands["refused"] += 1
    found = read(scrape(supervisor))

    assert {state: of(found, "harnessd_job_state", job="feed", state=state) for state in State} == {
        state: float(state is State.STOPPED) for state in State
    }
    assert of(found, "harnessd_job_exits_total", job="feed", reason="crashed") == 2
    assert of(found, "harnessd_job_commands_total", job="feed", outcome="refused") == 1
    assert of(found, "harnessd_job_up", job="etl") == of(found, "harnessd_job_restarts_total", job="etl") == 0
    assert not [name for name, _ in found if name in ("harnessd_job_uptime_seconds", "harnessd_job_threads")]


def test_the_daemon_is_shown_with_its_storage() -> None:
    health, tally = Health(), Tally()
    health.committed(began=0.0)  # at the boot of the host: beyond all bounds
    tally(Event("refused", 1, data={"left_out": 4}))
    tally(Event("client-dropped", 1))
    found = read(scrape(supervisor_of(), commit_times=health.commit_times, tally=tally))

    assert of(found, "harnessd_refused_requests_total") == 5
    assert of(found, "harnessd_dropped_clients_total") == 1
    assert of(found, "harnessd_server_starts_total") == 3
    assert of(found, "harnessd_resident_memory_bytes", process="server") > 1 << 20
    assert of(found, "harnessd_storage_queue_records") == 2
    assert of(found, f"{COMMITS}_bucket", le=str(COMMIT_BOUNDS_S[-1])) == 0
    assert of(found, f"{COMMITS}_bucket", le="+Inf") == of(found, f"{COMMITS}_count") == 1


def test_without_a_store_nothing_is_said_of_storage() -> None:
    assert "harnessd_storage" not in scrape(supervisor_of(job("feed"))).text


def test_openmetrics_is_spoken_when_it_is_accepted() -> None:
    supervisor = supervisor_of(*(job(f"job-{number}") for number in range(100)))
    commits = Health().commit_times
    plain = scrape(supervisor, commit_times=commits)
    answer = scrape(supervisor, OPENMETRICS, commit_times=commits)
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert answer.text.endswith("\n# EOF\n") and answer.text.count("# EOF") == 1
    assert values(openmetrics(answer.text)).keys() == read(plain).keys()


def test_a_family_of_many_jobs_has_one_head() -> None:
    text = scrape(supervisor_of(*(job(f"job-{number}") for number in range(1000)))).text
    assert text.count("# TYPE harnessd_job_state gauge\n") == text.count("# HELP harnessd_job_state ") == 1
    assert text.count("\nharnessd_job_state{") == 1000 * len(State)


# numbers of statuses


def shown(status: str, *metrics: str) -> dict[str, float]:
    supervisor = supervisor_of(from_file(spec(metrics=list(metrics)), History()))
    supervisor.find("feed").last_status = Line(1, 1, 1, "status", status)
    found = read(scrape(supervisor))
    return {
        dict(labels)["field"]: value for (name, labels), value in found.items() if name == "harnessd_job_status_value"
    }


def test_numbers_of_the_last_status_are_shown_by_their_paths() -> None:
    status = '{"pnl": -1.5, "ok": true, "book": {"bids": [{"size": 3}]}, "size": {"a b": 0}}'
    assert shown(status, "pnl", "ok", "book.bids[0].size", "size.a b") == {
        "pnl": -1.5,
        "ok": 1,
        "book.bids[0].size": 3,
        "size.a b": 0,
    }


@pytest.mark.parametrize(
    "status",
    [
        "{}",
        "null",
        "[]",
        '{"a": "1"}',
        '{"a": null}',
        '{"a": {"b": 1}}',
        '{"a": [1]}',
        '{"a": 1e999}',
        f'{{"a": 1{"0" * 400}}}',
        f'{{"a": 1{"0" * 5000}}}',
        "[" * 100_000 + "]" * 100_000,
    ],
)
def test_what_is_missing_or_no_number_is_left_out(status: str) -> None:
    assert shown(status, "a", "a[1]", "[0].a") == {}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (["a..b"], "it takes paths"),
        ([""], "it takes paths"),
        (["pnl", "pnl"], "'pnl' is given twice"),
        ([1], "metrics"),
        ([f"f{number}" for number in range(51)], "metrics"),
        ("pnl", "metrics"),
    ],
)
def test_metrics_that_cannot_be_meant_are_refused(metrics: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=r"feed\.toml: metrics") as refused:
        spec(metrics=metrics)
    assert said in str(refused.value)


def test_other_metrics_need_no_new_run() -> None:
    before, after = spec(), spec(metrics=["pnl"])
    assert before.digest == after.digest
    assert from_file(before, History()) != from_file(after, History())
