"""A config directory: `harnessd.toml` and one file a job in `jobs/`, and what changed between two reads of it.

Nothing that stands in a file makes a read fail: a broken job is a problem under its name, and the others load.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from harnessd.errors import ConfigError
from harnessd.server.jobspec import JobSpec
from harnessd.server.nearest import did_you_mean, printable
from harnessd.server.settings import Settings

SETTINGS = "harnessd"
JOBS = "jobs"
SUFFIXES = (".toml", ".json")
MAX_FILE_BYTES = 1 << 20
_GONE = {
    SETTINGS: f"{SETTINGS}.toml is gone; an empty one stands for the defaults",
    JOBS: f"{JOBS}/ is gone; an empty one stands for no jobs",
}


@dataclass(frozen=True)
class Loaded:
    """What a config directory says. `settings` is None when its file is broken: `settings_problems` says how."""

    settings: Settings | None
    jobs: dict[str, JobSpec] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    settings_problems: list[str] = field(default_factory=list)
    disabled: list[str] = field(default_factory=list)
    there: frozenset[str] = field(default=frozenset(), compare=False)  # of SETTINGS and JOBS, which are optional

    def all_problems(self) -> list[str]:
        """Return one line for each thing wrong in any of the files, the settings' first."""
        return self.settings_problems + [line for name in sorted(self.problems) for line in self.problems[name]]

    def require_settings(self) -> Settings:
        """Return the settings; raises ConfigError when they are broken."""
        if self.settings is None:
            raise ConfigError(self.settings_problems)
        return self.settings


@dataclass(frozen=True)
class Diff:
    """What a reload has to do: names of jobs; `refused` are those left as they were, with the reasons."""

    added: list[str]
    changed: list[str]
    removed: list[str]
    unchanged: list[str]
    refused: dict[str, list[str]]


def load(config_dir: Path, before: Loaded | None = None) -> Loaded:
    """Return all that the directory holds, problems included.

    Raises ConfigError when the directory is none, cannot be read, or lacks what it had `before`: what is not seen there
    is not thereby removed.
    """
    try:
        settings_files = [path for path in _files(config_dir) if path.stem == SETTINGS]
        has_jobs = os.path.lexists(config_dir / JOBS)  # a link whose target is away is no lack of jobs
        job_files = _files(config_dir / JOBS) if has_jobs else []
    except OSError as error:
        raise ConfigError([f"{printable(error.filename)}: cannot be read: {_reason(error)}"]) from None
    if not settings_files and not has_jobs:
        raise ConfigError([f"{printable(config_dir)}: holds neither {SETTINGS}.toml nor {JOBS}/"])
    there = frozenset(name for name, found in ((SETTINGS, settings_files), (JOBS, has_jobs)) if found)
    if before and (gone := before.there - there):
        raise ConfigError(f"{printable(config_dir)}: {_GONE[name]}" for name in gone)
    by_stem: dict[str, list[Path]] = {}
    for path in job_files:
        by_stem.setdefault(path.stem, []).append(path)
    loaded = Loaded(None, there=there)
    for stem, files in by_stem.items():
        _load_job(stem, files, loaded)
    try:
        return replace(loaded, settings=_load_settings(config_dir, settings_files, loaded))
    except ConfigError as error:
        return replace(loaded, settings_problems=error.problems)


def diff(old: Mapping[str, JobSpec], new: Loaded) -> Diff:
    """Return what turns the jobs `old` into those of `new`. A job whose file is broken stays as it was."""
    kept = [name for name in new.jobs if name in old]
    return Diff(
        added=[name for name in new.jobs if name not in old],
        changed=[name for name in kept if new.jobs[name] != old[name]],
        removed=[name for name in old if name not in new.jobs and name not in new.problems],
        unchanged=[name for name in kept if new.jobs[name] == old[name]],
        refused=dict(new.problems),
    )


def read_file(path: Path) -> tuple[dict[str, Any], str]:
    """Return the table in a .toml file (any other is taken for JSON) and its text; raises ConfigError."""
    where = printable(path)
    try:
        text = _read_text(path)
        table = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, **_STRICT_JSON)
        json.dumps(table, ensure_ascii=False, default=str).encode()  # as deep, as long and as Unicode as it may be
    except OSError as error:
        raise ConfigError([f"{where}: cannot be read: {_reason(error)}"]) from None
    except UnicodeError:
        raise ConfigError([f"{where}: is not UTF-8 text"]) from None
    except RecursionError:
        raise ConfigError([f"{where}: is nested too deeply"]) from None
    except ValueError as error:
        raise ConfigError([f"{where}: {printable(str(error))}"]) from None
    if not isinstance(table, dict):
        raise ConfigError([f"{where}: must hold a table (a JSON object)"])
    return table, text


def json_schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of each kind of file, by its name in the config directory."""
    schemas = {f"{SETTINGS}.toml": Settings.model_json_schema(), f"{JOBS}/NAME.toml": JobSpec.model_json_schema()}
    return {name: {"$schema": "https://json-schema.org/draft/2020-12/schema"} | each for name, each in schemas.items()}


def _load_settings(config_dir: Path, files: list[Path], loaded: Loaded) -> Settings:
    where = printable(_the_only(files) if files else config_dir)
    raw, text = read_file(files[0]) if files else ({}, "")
    settings = Settings.parse(raw, where, text, folder=config_dir)
    known = {*loaded.jobs, *loaded.disabled, *loaded.problems}
    if settings.default_job is not None and settings.default_job not in known:
        hint = did_you_mean(settings.default_job, known)
        raise ConfigError([f"{where}: default_job: there is no job {settings.default_job!r}{hint}"])
    return settings


def _load_job(stem: str, files: list[Path], loaded: Loaded) -> None:
    try:
        path = _the_only(files)
        raw, text = read_file(path)
        if raw.get("enabled") is False:  # whatever else it says: it is to be left out
            loaded.disabled.append(printable(stem))
        else:
            loaded.jobs[stem] = JobSpec.read(path, raw, printable(path), text)
    except ConfigError as error:
        loaded.problems[printable(stem)] = error.problems


def _files(folder: Path) -> list[Path]:
    """Return the folder's files by name. Hidden ones are left out: editors keep their own there."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))


def _the_only(files: list[Path]) -> Path:
    if len(files) > 1:
        both = " and ".join(printable(path.name) for path in files)
        raise ConfigError(f"{printable(path)}: doubled name: {both} both stand for it; remove one" for path in files)
    return files[0]


def _read_text(path: Path) -> str:
    """Return the text of a regular file; raises OSError, UnicodeError, ValueError. Never waits, as for a FIFO."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("is no regular file")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES} bytes")
    return data.decode("utf-8-sig")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"doubled key: {key!r}")
        table[key] = value
    return table


_STRICT_JSON: dict[str, Any] = {"parse_constant": _refuse_constant, "object_pairs_hook": _refuse_doubled_keys}


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
