from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import get_type_hints

import pytest

import harnessd
from harnessd import Command, Cradle, ProcessHarness, launch

ROOT = Path(__file__).parent.parent
NAMES = ("Command", "Cradle", "ProcessHarness", "launch")


def test_the_public_names_are_these() -> None:
    assert sorted(harnessd.__all__) == sorted((*NAMES, "__version__"))
    assert dir(harnessd) == sorted(harnessd.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_that_of_its_home_and_says_what_it_is(name: str) -> None:
    found = getattr(harnessd, name)
    assert found is getattr(importlib.import_module(found.__module__), name)
    assert found.__module__ == harnessd._HOMES[name]
    assert inspect.getdoc(found)


@pytest.mark.parametrize("name", NAMES)
def test_the_earlier_import_path_has_the_same_names(name: str) -> None:
    earlier = importlib.import_module("bqm.harness")
    assert sorted(earlier.__all__) == sorted(NAMES)
    assert getattr(earlier, name) is getattr(harnessd, name)


def test_a_name_that_does_not_exist_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="'harnessd' has no attribute 'Craddle'"):
        harnessd.Craddle  # noqa: B018
    with pytest.raises(ImportError):
        exec("from harnessd import Craddle")


def test_a_star_import_brings_the_public_names_and_no_others() -> None:
    program = "import json; from harnessd import *; print(json.dumps([name for name in globals() if name[0] != '_']))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert sorted(json.loads(ran.stdout)) == sorted((*NAMES, "json"))


def test_the_version_is_one_and_the_distribution_has_the_same() -> None:
    assert [int(part) for part in harnessd.__version__.split(".")]
    try:
        installed = metadata.version("harnessd")
    except metadata.PackageNotFoundError:
        pytest.skip("harnessd is not installed here")
    assert installed == harnessd.__version__


def parameters(function: object) -> dict[str, object]:
    assert callable(function)
    return {name: found.default for name, found in inspect.signature(function).parameters.items() if name != "self"}


def test_a_cradle_has_exactly_what_a_job_is_promised() -> None:
    assert {name for name in vars(Cradle) if name[0] != "_"} == {"run", "get_msg", "set_status", "get_config"}
    assert parameters(Cradle.get_msg) == {"timeout": 0}
    assert parameters(Cradle.set_status) == {"status": None}
    assert parameters(Cradle.get_config) == {}
    assert inspect.signature(Cradle.run).parameters["args"].kind is inspect.Parameter.VAR_POSITIONAL
    assert all(inspect.getdoc(getattr(Cradle, name)) for name in ("run", "get_msg", "set_status", "get_config"))


def test_a_harness_is_made_of_a_config_and_main_takes_the_job() -> None:
    assert parameters(ProcessHarness) == {"config": None}
    assert inspect.iscoroutinefunction(ProcessHarness.main)
    assert next(iter(parameters(ProcessHarness.main))) == "job"


def test_launch_takes_a_job_and_returns_its_exit_code() -> None:
    found = parameters(launch)
    assert list(found)[:3] == ["job", "config", "exit"]
    assert (found["config"], found["exit"]) == (None, False)
    assert get_type_hints(launch)["return"] is int


def test_the_commands_are_five_and_read_as_plain_text() -> None:
    assert [str(command) for command in Command] == ["START", "STOP", "PAUSE", "RESUME", "CONFIG"]
    assert Command("CONFIG") is Command.CONFIG == "CONFIG"


def test_a_job_needs_no_init_of_its_base_and_works_without_a_harness() -> None:
    class Job(Cradle):
        def __init__(self) -> None:
            self.own = 1

        def run(self, *args: str) -> int:
            return len(args)

    job = Job()
    assert job.get_msg() is None
    assert job.get_msg(timeout=0.001) is None
    assert job.set_status({"a": 1}) is False
    assert job.get_config() == {}
    assert job.run("x") == 1


def test_the_command_line_is_the_entry_point_that_the_project_names() -> None:
    module, _, function = "harnessd.cli:main".partition(":")
    assert f'harnessd = "{module}:{function}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert callable(getattr(importlib.import_module(module), function))
