"""No block of README.md and docs/ escapes: each is of a kind that is looked at here, on a page that a test runs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers.documents import ROOT, fenced, text, typed

from harnessd.errors import ConfigError
from harnessd.server.jobspec import JobSpec
from harnessd.server.settings import Settings

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# The tests that write and type what stands on a page.
RUN_BY = {
    "README.md": ["test_readme.py"],
    "access.md": ["system/test_daemon_access.py"],
    "cli.md": ["test_howto.py", "cli/test_docs.py"],
    "config.md": ["test_howto.py", "test_docs.py", "server/test_configdir.py"],
    "hardening.md": ["system/test_daemon_tls.py"],
    "howto.md": ["test_howto.py"],
    "http.md": ["test_docs.py"],
    "job.md": ["test_docs.py"],
    "logs.md": ["test_docs.py"],
    "monitoring.md": ["system/test_daemon_metrics.py"],
    "notifications.md": ["system/test_daemon_notify.py"],
    "service.md": ["system/test_daemon_systemd.py", "system/test_daemon_logging.py"],
    "sql.md": ["test_sql_docs.py"],
    "testing.md": ["chaos/test_chaos.py"],
    "tutorial.md": ["test_howto.py"],
    "watchdog.md": ["system/test_daemon_watchdog.py"],
}
LANGUAGES = {"toml", "python", "json", "yaml", "sql", "sh"}
THEIRS = r"there is no (file|program|folder|user)|no such file"
SAMPLES = {  # what is to be looked at and not to be written or typed
    ("architecture.md", ""): "a picture",
    ("config.md", ""): "problems, compared with what `harnessd check` says",
    ("tutorial.md", "text"): "a list of jobs, compared with what `harnessd ps` says",
}


def languages(page: str) -> set[str]:
    return set(re.findall(r"^```(\w*)\n.*?^```$", page, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_kind_that_is_run_or_is_a_known_sample(page: Path) -> None:
    content = page.read_text()
    assert {language for language in languages(content) if (page.name, language) not in SAMPLES} <= LANGUAGES
    assert content.count("\n```") == 2 * sum(len(fenced(content, language)) for language in languages(content))
    if languages(content) & LANGUAGES or typed(content):
        assert RUN_BY.get(page.name), "no test runs its blocks"
    for name in RUN_BY.get(page.name, []):
        assert page.name in (ROOT / "tests" / name).read_text()


def test_every_sample_is_there() -> None:
    there = {(page.name, language) for page in PAGES for language in languages(page.read_text())}
    assert SAMPLES.keys() <= there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_can_be_read(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEED_PASSWORD", "x")
    content = page.read_text()
    for block in fenced(content, "toml"):
        assert problems(block) == []
    for block in fenced(content, "python"):
        ast.parse(block)
    for block in fenced(content, "json"):
        json.loads(block)
    if page.name == "logs.md":  # the keys of [log], which are indented as what is typed is
        (keys,) = (block for block in typed(content) if block.startswith("[log]"))
        assert problems(f'command = ["true"]\n{keys}') == []
    script = "\n".join([*fenced(content, "sh"), *(block for block in typed(content) if "[log]" not in block)])
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def problems(block: str) -> list[str]:
    """Return what the daemon would say of a file with this content, files aside that only the reader has."""
    table: dict[str, Any] = tomllib.loads(block)
    try:
        if table.keys() & {"entrypoint", "command"}:
            JobSpec.parse({"name": "a", "file": Path("/a.toml")} | table, "it", block)
        else:
            Settings.parse(table, "it", block)
    except ConfigError as error:
        return [problem for problem in error.problems if not re.search(THEIRS, problem)]
    return []


def test_the_first_command_of_the_page_on_sql_opens_a_database(tmp_path: Path) -> None:
    (block,) = fenced(text("docs/sql.md"), "sh")
    for line in ("CREATE TABLE a (b)", "INSERT INTO a VALUES (1)"):
        subprocess.run(["sqlite3", tmp_path / "harnessd.db", line], check=True, timeout=30)
    command = block.replace("/var/lib/harnessd", str(tmp_path)).strip()
    done = subprocess.run(f"{command} 'SELECT b FROM a'", shell=True, capture_output=True, text=True, timeout=30)
    assert (done.returncode, "1" in done.stdout) == (0, True), done.stderr
