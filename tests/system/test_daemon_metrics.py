"""What Prometheus makes of /metrics, and of what the page on monitoring says to write."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.daemon import Daemon, free_port
from helpers.documents import Shell, commands, fenced, text
from helpers.script import Script
from helpers.waiting import DEADLINE_S, until
from prometheus_client.parser import text_string_to_metric_families

PAGE = text("docs/monitoring.md")
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")), reason="there is no Prometheus here"
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    yield made
    made.close()


def metric(metrics: str, name: str, **labels: str) -> float | None:
    """Return the value of the sample with these labels."""
    samples = (sample for family in text_string_to_metric_families(metrics) for sample in family.samples)
    return next((sample.value for sample in samples if (sample.name, sample.labels) == (name, labels)), None)


def promtool(*arguments: str, given: str = "", folder: Path | None = None) -> str:
    line = ["promtool", *arguments]
    done = subprocess.run(line, input=given, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def block(of: str) -> str:
    (found,) = (each for each in fenced(PAGE, "yaml") if each.startswith(f"# {of}\n"))
    return found


def test_what_happens_to_a_job_is_counted(daemon: Daemon) -> None:
    daemon.job("idle", "Idle", restart="always", backoff={"first_s": 0.01, "max_s": 0.02})
    daemon.start()
    daemon.status("idle")

    def value(name: str, **labels: str) -> float | None:
        return metric(daemon.get("/metrics").text, name, job="idle", **labels)

    daemon.get("/jobs/idle/pause", wait=DEADLINE_S)
    assert value("harnessd_job_state", state="paused") == value("harnessd_job_up") == 1
    assert [value("harnessd_job_commands_total", outcome=how) for how in ("queued", "read")] == [1, 1]
    assert value("harnessd_job_resident_memory_bytes") > 1 << 20
    assert value("harnessd_job_cpu_seconds_total") is not None and value("harnessd_job_pulse_age_seconds") == 0

    pid = daemon.hb("idle")["pid"]
    os.kill(pid, signal.SIGKILL)
    daemon.wait_for(lambda: daemon.hb("idle")["restarts"] == 1, "it is started again")
    assert value("harnessd_job_exits_total", reason="signaled") == value("harnessd_job_restarts_total") == 1
    daemon.get("/jobs/idle/kill")
    assert daemon.get("/jobs/idle/pause").status_code == 409
    assert [value("harnessd_job_commands_total", outcome=how) for how in ("done", "refused")] == [1, 1]
    assert value("harnessd_job_wanted") == value("harnessd_job_up") == 0


def test_other_metrics_are_shown_after_a_reload_without_a_new_run(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    daemon.start()
    pid = daemon.status("idle")["pid"]
    daemon.job("idle", "Idle", metrics=["pid"])
    assert daemon.reload()["changed"] == ["idle"]
    assert metric(daemon.get("/metrics").text, "harnessd_job_status_value", job="idle", field="pid") == pid
    assert daemon.hb("idle")["pid"] == pid


def test_a_script_has_metrics(tmp_path: Path) -> None:
    body = (
        "class Job(Cradle):\n    def run(self):\n        self.set_status({'a': 1})\n        self.get_msg(timeout=None)"
    )
    script = Script(tmp_path, body, config={"name": "one"})
    try:
        script.status()
        metrics = script.get("/metrics").text
        assert metric(metrics, "harnessd_job_up", job="one") == metric(metrics, "harnessd_server_starts_total") == 1
        assert "harnessd_storage" not in metrics
    finally:
        script.close()


def test_the_requests_of_the_page_are_answered(daemon: Daemon) -> None:
    (toml,) = fenced(PAGE, "toml")
    (service,) = fenced(PAGE, "json")
    (daemon.folder / "feed.py").write_text(
        "from harnessd import Cradle\n\n\nclass Feed(Cradle):\n    def run(self):\n"
        "        self.set_status({'pnl': 2.5, 'book': {'bids': [{'size': 7}]}, 'connected': True})\n"
        "        self.get_msg(timeout=None)\n"
    )
    daemon.write("feed", toml.replace("../feed.py", f"{daemon.folder}/feed.py"))
    daemon.start()
    daemon.status("feed")
    shell = Shell(daemon.folder, daemon.port)
    (curl,) = commands(PAGE, "curl")
    metrics = shell(curl)
    fields = {"pnl": 2.5, "book.bids[0].size": 7, "connected": 1}
    assert {field: metric(metrics, "harnessd_job_status_value", job="feed", field=field) for field in fields} == fields
    check = json.loads(service)["service"]["check"]
    assert json.loads(shell(f"curl {check['http']}"))["alive"]


@needs_prometheus
def test_promtool_has_nothing_against_the_metrics(daemon: Daemon) -> None:
    daemon.job("idle", "Idle", metrics=["pid"])
    daemon.start()
    daemon.status("idle")
    daemon.get("/jobs/idle/pause", wait=DEADLINE_S)
    assert promtool("check", "metrics", given=daemon.get("/metrics").text) == ""


@needs_prometheus
def test_the_alert_rules_of_the_page_hold(tmp_path: Path) -> None:
    (tmp_path / "harnessd.rules.yml").write_text(block("harnessd.rules.yml"))
    promtool("check", "rules", "harnessd.rules.yml", folder=tmp_path)
    job = {"instance": "host", "job": "feed"}
    series = {
        "harnessd_job_wanted": "1x10",
        "harnessd_job_up": "0x10",
        "harnessd_job_commands_waiting": "2x10",
        "harnessd_job_pulse_age_seconds": "99x10",
        "harnessd_job_status_age_seconds": "999x10",
    }
    stated = {"running": "1x10", "exited": "0x10", "failed": "0x10"}
    inputs = [(_series(name, job), value) for name, value in series.items()]
    inputs += [(_series("harnessd_job_state", job | {"state": state}), value) for state, value in stated.items()]
    fires = {"JobDown": True, "JobSilent": True, "JobDeaf": True, "JobFailed": False}
    alerts = [
        {"eval_time": "8m", "alertname": name, "exp_alerts": _alerts(name, job, on=on)} for name, on in fires.items()
    ]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": value} for name, value in inputs],
        "alert_rule_test": alerts,
    }
    tests = {"rule_files": ["harnessd.rules.yml"], "tests": [test]}
    (tmp_path / "tests.yml").write_text(json.dumps(tests))
    promtool("test", "rules", "tests.yml", folder=tmp_path)


def _series(name: str, labels: dict[str, str]) -> str:
    return name + "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"


def _alerts(name: str, labels: dict[str, str], *, on: bool) -> list[dict[str, Any]]:
    said = {
        "JobDown": "feed is wanted up and has no process",
        "JobSilent": "feed has reported nothing for five minutes",
        "JobDeaf": "feed does not read its commands",
    }
    return [{"exp_labels": labels, "exp_annotations": {"summary": said[name]}}] if on else []


@needs_prometheus
def test_prometheus_scrapes_the_daemon(daemon: Daemon) -> None:
    daemon.job("idle", "Idle", metrics=["pid"])
    daemon.start()
    pid = daemon.status("idle")["pid"]
    config = block("prometheus.yml").replace("2222", str(daemon.port))
    (daemon.folder / "prometheus.yml").write_text(
        f"{config}\nglobal: {{scrape_interval: 200ms, scrape_timeout: 200ms}}\n"
    )
    (daemon.folder / "harnessd.rules.yml").write_text(block("harnessd.rules.yml"))
    with prometheus(daemon.folder) as ask:
        until(lambda: ask('harnessd_job_status_value{job="idle"}'), "it has scraped")
        assert ask('harnessd_job_status_value{job="idle",field="pid"}') == [pid]
        assert ask('up{job="harnessd"}') == [1]
        assert ask('harnessd_storage_commit_seconds_count{job="harnessd"} > 0')
        daemon.get("/jobs/idle/kill")
        until(lambda: ask('harnessd_job_up{job="idle"}') == [0], "it sees that the job is down")


@contextmanager
def prometheus(folder: Path) -> Iterator[Any]:
    """Run it on the files in the folder; give what answers a query."""
    port = free_port()
    line = [
        "prometheus",
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (
        open(folder / "prometheus.log", "wb") as log,
        subprocess.Popen(line, cwd=folder, stdout=log, stderr=log) as going,
    ):

        def ask(query: str) -> list[float]:
            try:
                url = f"http://127.0.0.1:{port}/api/v1/query"
                answer = httpx.get(url, params={"query": query}, trust_env=False, timeout=DEADLINE_S)
            except httpx.ConnectError:
                assert going.poll() is None, (folder / "prometheus.log").read_text()
                return []
            if answer.status_code == 503:  # it is not ready yet
                return []
            return [float(row["value"][1]) for row in answer.json()["data"]["result"]]

        try:
            yield ask
        finally:
            going.kill()
