"""docs/ has every route, key, table and kind of error, and what it tells a reader to write and to type works."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.daemon import Daemon
from helpers.documents import ROOT, Shell, commands, fenced, section, text, typed
from helpers.waiting import DEADLINE_S
from pydantic import BaseModel

from harnessd import errors
from harnessd.server.asked import KINDS
from harnessd.server.jobspec import JobSpec
from harnessd.server.schema import metadata, views
from harnessd.server.settings import ScriptSettings, Settings, Table
from harnessd.states import Command, ExitReason, State
from harnessd.web.app import ENDPOINTS
from harnessd.web.problem import STATUS, kinds

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rows(page: str) -> list[list[str]]:
    """Return the cells of every table on the page."""
    found = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in found]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    yield made
    made.close()


@pytest.fixture
def shell(daemon: Daemon) -> Shell:
    return Shell(daemon.folder, daemon.port)


# what there is


def test_the_documented_routes_are_those_of_the_table() -> None:
    table = [row for row in rows(text("docs/http.md").split("\n## ")[0]) if codes(row[0])]
    documented = {(path, method) for row in table for path in codes(row[0]) for method in row[1].split()}
    served = {(e.path.replace("{name}", "<name>"), method) for e in ENDPOINTS for method in e.methods}
    assert documented == {(path, method) for path, method in served if method != "HEAD"}


def test_the_documented_kinds_of_errors_are_those_that_are_raised() -> None:
    table = rows(section("docs/http.md", "Errors"))
    documented = {(row[0], kind) for row in table for kind in codes(row[2])}
    raised = {(str(status), cls.kind) for cls, status in STATUS.items() if cls is not errors.Refused}
    assert raised <= documented == {(str(status), kind) for status, each in kinds().items() for kind in each}


def test_the_heartbeat_has_the_documented_keys(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    daemon.start()
    keys = {key for row in rows(section("docs/http.md", "The heartbeat")) for key in codes(row[0])}
    assert keys == daemon.hb("idle").keys()


def test_the_documented_states_commands_and_reasons_are_all_there_are() -> None:
    page = " ".join(text("docs/http.md").split())
    assert f"`{' '.join(State)}`" in page
    assert f"`{' '.join(reason for reason in ExitReason)}`" in page
    assert f"`Command.{' '.join(Command)}`" in text("docs/job.md")


def test_every_table_and_view_is_documented() -> None:
    page = text("docs/sql.md")
    assert [name for name in (*metadata.tables, *views("sqlite")) if f"`{name}`" not in page] == []


def test_every_kind_of_event_is_documented() -> None:
    assert sorted(kind for row in rows(section("docs/sql.md", "Events")) for kind in codes(row[0])) == sorted(KINDS)


# the keys of the configuration


def keys(model: type[BaseModel], before: str = "") -> dict[str, Any]:
    """Return the default of each key."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=False)
        inner = next((cls for cls in Table.__subclasses__() if cls.__name__ in str(field.annotation)), None)
        if inner is not None:
            found |= keys(inner, f"{before}{name}.")
        else:
            found[before + name] = default
    return found


@pytest.mark.parametrize(
    ("title", "model", "left_out"),
    [("harnessd.toml", Settings, set()), ("jobs/NAME.toml", JobSpec, {"name", "file"})],
)
def test_the_documented_keys_and_defaults_are_those_of_the_model(
    title: str, model: type[Table], left_out: set[str]
) -> None:
    page = text("docs/config.md")
    part = page[page.index(f"\n## {title}") :].split("\n## ")[1]
    documented = {codes(row[0])[0]: row[2] for row in rows(part) if codes(row[0])}
    there = {key: default for key, default in keys(model).items() if key not in left_out}
    assert documented.keys() == there.keys()
    for key, cell in documented.items():
        shown = codes(cell)
        if there[key] not in (None, [], {}) and shown:
            assert default_as_read(model, key, shown[0]) == there[key], key


def default_as_read(model: type[Table], key: str, shown: str) -> Any:
    """Return what the model makes of the key with its documented default."""
    value: Any = tomllib.loads(f"it = {shown}")["it"]
    for name in reversed(key.split(".")):
        value = {name: value}
    needed = {"name": "a", "file": Path("/a.toml"), "command": ["true"]} if model is JobSpec else {}
    read: Any = model.parse(needed | value, "it")
    for name in key.split("."):
        read = getattr(read, name)
    return read


def test_a_script_has_the_documented_keys() -> None:
    part = section("docs/config.md", "ProcessHarness(config=...)")
    assert [key for key in ScriptSettings.model_fields if f"`{key}`" not in part] == []
    (block,) = fenced(part, "python")
    made: list[Table] = []
    exec(block, {"ProcessHarness": lambda config: made.append(ScriptSettings.parse(config, "config"))})
    assert made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


# what to write and to type


def test_the_jobs_of_the_page_on_jobs_work(daemon: Daemon) -> None:
    page = text("docs/job.md")
    (daemon.folder / "page.py").write_text("\n".join(fenced(page, "python")))
    report, read = fenced(page, "sh")
    daemon.job("vol-target", f"{daemon.folder}/page.py:VolTarget")
    daemon.job("poll-prices", f"{daemon.folder}/page.py:poll_prices")
    acknowledge = """id=${message#*'"id":'}; echo '{"ack":' ${id%%,*} '}' >> "$HARNESS_JOURNAL"; echo ${#message}"""
    shell = f"{report}{read}{acknowledge}\n{read}{acknowledge}\nexec sleep 1000"
    daemon.job("shell", ["sh", "-c", shell], control="messages")
    daemon.start()

    daemon.wait_status("shell", done=3)
    daemon.wait_status("poll-prices", price=42)
    daemon.wait_status("vol-target", target_vol=4.0)
    assert daemon.post("/jobs/vol-target/config", {"target_vol": 10}, wait=DEADLINE_S).status_code == 200
    daemon.wait_status("vol-target", target_vol=10)
    daemon.get("/jobs/vol-target/stop")
    daemon.get("/jobs/poll-prices/stop")
    assert daemon.wait_state("vol-target", "stopped")["last_exit"]["code"] == 0
    assert daemon.wait_state("poll-prices", "stopped")["last_exit"]["code"] == 0


def test_a_shell_reads_a_large_command_whole_and_not_more(daemon: Daemon) -> None:
    _, read = fenced(text("docs/job.md"), "sh")
    go = daemon.folder / "go"
    program = f"until test -e {go}; do sleep 0.05; done\n" + 2 * f"{read}echo ${{#message}}\n"
    daemon.job("shell", ["sh", "-c", program], control="messages")
    daemon.start()
    daemon.post("/jobs/shell/config", {"pad": "x" * 100_000})
    daemon.post("/jobs/shell/config", {"pad": ""})
    go.touch()
    daemon.wait_for(lambda: daemon.output("shell").count("\n") == 2, "both are read")
    large, small = map(int, daemon.output("shell").split())
    assert large > 100_000 > small


def test_the_requests_of_the_page_on_http_are_answered(daemon: Daemon, shell: Shell) -> None:
    daemon.job("vol-target", "harnessd.examples.vol_target:VolTarget", config={"step_seconds": 0.01})
    daemon.start()
    daemon.status("vol-target")
    page = text("docs/http.md")
    follow = [command for command in commands(page, "curl") if "follow" in command]
    for command in commands(page, "curl"):
        if command not in follow and "?at=" not in command:
            assert shell(command)
    (at,) = [command for command in commands(page, "curl") if "?at=" in command]
    assert json.loads(shell(at))["status"] is None  # it was not there a minute ago
    daemon.wait_status("vol-target", target_vol=4.2)
    for command in follow:
        with subprocess.Popen(["bash", "-c", f"exec {shell.here(command)}"], stdout=subprocess.PIPE) as going:
            assert going.stdout and going.stdout.readline() == b": events\n"
            going.terminate()


def test_the_requests_of_the_page_on_output_are_answered(daemon: Daemon, shell: Shell) -> None:
    (daemon.config / "harnessd.toml").write_text(
        f'state_dir = "{daemon.state}"\nruntime_dir = "{daemon.folder}/run"\n[http]\nport = {daemon.port}\n'
    )
    page = text("docs/logs.md")
    (settings,) = [block for block in typed(page) if block.startswith("[log]")]
    assert '"10MB"' in settings
    daemon.write("etl", f'command = ["sh", "-c", "seq 2000; exec sleep 1000"]\n{settings.replace("10MB", "4KiB")}')
    daemon.start()
    whole = "".join(f"{number}\n" for number in range(1, 2001))
    daemon.wait_for(lambda: len([*daemon.state.glob("log/etl.log.0*.gz")]) == 2, "its log is rotated twice")
    (read,) = commands(page, "cat")
    assert shell(f"cd {daemon.state}/log; {read} | tr -d '\\0'") == whole  # on tmpfs a head that was cut is a hole
    run = str(daemon.hb("etl")["run"])
    lines = [re.sub(r"run=\d+", f"run={run}", line) for block in typed(page) for line in block.splitlines()]
    requests = [line for line in lines if line.startswith("curl '")]
    assert [len(shell(line).splitlines()) for line in requests] == [200, 1000, 2000, 2000]
    (offset,) = [block for block in typed(page) if block.startswith("offset=")]
    assert shell(offset) == "" and (daemon.folder / "new").read_text() == whole
