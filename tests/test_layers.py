"""Imports go one way, and what runs inside a job or beside it stays light: read from the source, then tried out."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import harnessd

PACKAGE = Path(harnessd.__file__).parent
FORKING = {"harnessd.harness", "harnessd.root"}
COMPOSERS = FORKING | {"harnessd.daemon", "harnessd.offline"}
FOLDERS = {"job", "keeper", "server", "web", "cli", "examples"}

# What stands at the package's root is a word that all share, unless it composes.
MAY_IMPORT = {
    "word": {"word"},
    "job": {"word", "job"},
    "keeper": {"word", "keeper", "job"},
    "server": {"word", "server", "job"},
    "web": {"word", "web", "server"},
    "cli": {"word", "cli", "composer"},
    "examples": {"word", "job"},
    "composer": {"word", "job", "keeper", "server", "web", "composer"},
}
ONLY_THESE = {
    # of the job's side, the server knows the formats alone
    ("server", "job"): {"harnessd.job.pulse", "harnessd.job.journal"},
    ("examples", "job"): {"harnessd.job.cradle"},
}
# Of the keeper, only what runs after the fork may see a job's classes.
AFTER_THE_FORK = {
    "harnessd.keeper.spawn",
    "harnessd.keeper.bootstrap",
    "harnessd.keeper.zygote",
    "harnessd.keeper.spare",
}
JOB_CLASSES = {"harnessd.job.cradle", "harnessd.job.conduct"}

PURE = {"harnessd.server.policy", "harnessd.server.adoption", "harnessd.server.thin", "harnessd.server.records"}
PURE |= {"harnessd.server.notices", "harnessd.server.watchdog"}
ADAPTERS = {
    f"harnessd.server.{name}"
    for name in ("link", "reading", "procstat", "supervisor", "store", "database", "writer", "schema", "migrations")
}
IMPURE_LIBRARIES = {"asyncio", "os", "socket", "time", "random", "subprocess", "threading", "sqlite3"}
NOT_FOR_THE_WEB = ADAPTERS - {"harnessd.server.supervisor"}


@dataclass(frozen=True)
class Import:
    target: str
    when: str  # "loaded", "called" in a function, "typed" under TYPE_CHECKING


def source_files() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = source_files()
MODULES = sorted(FILES.keys() - {"harnessd"})


def layer(module: str) -> str:
    folder = module.split(".")[1]
    if folder in FOLDERS:
        return folder
    return "composer" if module in COMPOSERS else "word"


def imports(module: str) -> list[Import]:
    return list(_imports(ast.parse(FILES[module].read_text(encoding="utf-8")), "loaded"))


def _imports(node: ast.AST, when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (Import(_home(str(child.module), alias.name), when) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from _imports(child, "typed")
        else:
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, "called" if in_function else when)


def _home(module: str, name: str) -> str:
    if f"{module}.{name}" in FILES:
        return f"{module}.{name}"
    return harnessd._HOMES.get(name, module) if module == "harnessd" else module


def ours(module: str) -> list[Import]:
    """Return what it imports of harnessd; the package itself holds nothing but its version."""
    return [found for found in imports(module) if found.target.startswith("harnessd.")]


# read from the source


def test_every_folder_has_its_layer() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == FOLDERS


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_layer_may(module: str) -> None:
    mine = layer(module)
    for found in ours(module):
        theirs = layer(found.target)
        assert theirs in MAY_IMPORT[mine], f"{module} imports {found.target}"
        allowed = ONLY_THESE.get((mine, theirs))
        assert allowed is None or found.target in allowed, f"{module} imports {found.target}"


@pytest.mark.parametrize("module", [module for module in MODULES if layer(module) in ("word", "job", "keeper")])
def test_what_a_run_or_the_keeper_loads_is_standard_library(module: str) -> None:
    for found in imports(module):
        library = found.target.split(".")[0]
        assert library in sys.stdlib_module_names | {"harnessd"}, f"{module} imports {found.target}"


@pytest.mark.parametrize("module", [module for module in MODULES if layer(module) == "keeper"])
def test_the_keeper_knows_no_job_before_the_fork(module: str) -> None:
    seen = {found.target for found in ours(module)} & JOB_CLASSES
    assert not seen or module in AFTER_THE_FORK


@pytest.mark.parametrize("module", sorted(PURE & FILES.keys()))
def test_what_decides_has_no_clock_and_no_adapter(module: str) -> None:
    targets = {found.target for found in imports(module) if found.when != "typed"}
    assert not targets & ADAPTERS
    assert not {target.split(".")[0] for target in targets} & IMPURE_LIBRARIES


@pytest.mark.parametrize("module", [module for module in MODULES if layer(module) == "web"])
def test_the_http_face_calls_the_supervisor_and_never_what_is_behind_it(module: str) -> None:
    targets = {found.target for found in imports(module)}
    assert not targets & NOT_FOR_THE_WEB
    assert not {target.split(".")[0] for target in targets} & {"psutil", "sqlalchemy", "sqlite3", "alembic"}


@pytest.mark.parametrize("module", [module for module in MODULES if layer(module) != "web"])
def test_only_the_http_face_knows_how_http_is_served(module: str) -> None:
    assert not {found.target.split(".")[0] for found in imports(module)} & {"starlette", "uvicorn", "httptools"}


def test_no_two_modules_need_each_other() -> None:
    needs = {module: {found.target for found in ours(module) if found.when != "typed"} for module in MODULES}
    TopologicalSorter(needs).prepare()


def test_the_names_in_these_rules_are_those_of_modules() -> None:
    named = COMPOSERS | JOB_CLASSES | AFTER_THE_FORK | PURE | ADAPTERS | set().union(*ONLY_THESE.values())
    assert named <= FILES.keys()


# tried out


def loaded_by(*modules: str) -> set[str]:
    """Return what an interpreter of its own has loaded for these, beside what it starts with."""
    lines = ["import sys", "before = set(sys.modules)", *(f"import {module}" for module in modules)]
    program = "\n".join(
        [*lines, "after = set(sys.modules)", "import json", "print(json.dumps(sorted(after - before)))"]
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(ran.stdout))


def strangers(loaded: set[str]) -> set[str]:
    return {name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names | {"harnessd"}}


@pytest.mark.parametrize("folder", ["job", "keeper"])
def test_nothing_but_the_standard_library_is_loaded_beside_a_run(folder: str) -> None:
    loaded = loaded_by(*(module for module in MODULES if layer(module) in ("word", folder)))
    assert strangers(loaded) == set()
    assert not {name for name in loaded if name.startswith(("harnessd.server", "harnessd.web", "harnessd.cli"))}


def test_a_job_that_imports_its_cradle_pays_for_nothing_of_the_server() -> None:
    loaded = loaded_by("harnessd.job.cradle")
    assert strangers(loaded) == set()
    assert not loaded & {
        "asyncio",
        "socketserver",
        "http.client",
        "email",
        "ssl",
        "sqlite3",
        "logging",
        "typing_extensions",
    }


def test_the_package_alone_loads_almost_nothing() -> None:
    loaded = loaded_by("harnessd")
    assert {name for name in loaded if name.startswith("harnessd")} == {"harnessd"}
    assert not strangers(loaded) and not loaded & {"asyncio", "json", "socket", "dataclasses", "inspect"}


@pytest.mark.parametrize("module", sorted(FORKING))
def test_what_composes_loads_neither_web_nor_sql_before_the_keeper_is_forked(module: str) -> None:
    assert strangers(loaded_by(module)) == set()
