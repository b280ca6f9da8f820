from __future__ import annotations

import os
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from harnessd import Cradle

CONFIG = Path(__file__).parents[2] / "config"
JOBS = sorted((CONFIG / "jobs").glob("*.toml"))


def load(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def test_config_directory_has_the_four_example_jobs() -> None:
    assert [path.stem for path in JOBS] == ["checksum-tree", "disk-report", "vol-target", "watch-host"]
    assert load(CONFIG / "harnessd.toml")["http"] == {"host": "127.0.0.1", "port": 2222}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_starts_by_itself_and_names_what_exists(path: Path) -> None:
    job = load(path)
    assert job["autostart"] is True
    if "command" in job:
        assert os.access(path.parent / job["command"][1], os.X_OK)
    else:
        module, _, name = job["entrypoint"].partition(":")
        assert issubclass(getattr(import_module(module), name), Cradle)


@pytest.mark.parametrize("path", [path for path in JOBS if "entrypoint" in load(path)], ids=lambda path: path.stem)
def test_job_accepts_its_own_config_and_arguments(path: Path, run_scripted: Any) -> None:
    job = load(path)
    module, _, name = job["entrypoint"].partition(":")
    run = run_scripted(getattr(import_module(module), name), [], job["config"], tuple(job.get("args", ())))
    assert run.exit_code == 0
    assert run.statuses[0]["config_error"] is None
