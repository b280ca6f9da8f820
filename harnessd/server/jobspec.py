"""One job, as its file in `config/jobs/` describes it."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema, model_validator

from harnessd.errors import BadRequest, ConfigError
from harnessd.server.asked import MOST_FIELDS, path_of
from harnessd.server.nearest import did_you_mean, printable, shown
from harnessd.server.settings import (
    Control,
    HistoryOverride,
    JsonTable,
    Name,
    Seconds,
    Size,
    Table,
    absolute,
    check_text,
    program,
)

MASK = "***"
ENTRYPOINT_FORMS = '"pkg.mod:Class" or "path/to/file.py:Class"'

_MODULE_AND_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_FILE_AND_CLASS = re.compile(r"(?s)(.*\.py):([^\W\d]\w*)")
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)\}|(?P<bad>\{))")


def _folder(info: ValidationInfo) -> Path:
    file = info.data.get("file")
    return file.parent if isinstance(file, Path) else Path.cwd()


def _check_entrypoint(entrypoint: str, info: ValidationInfo) -> str:
    found = _FILE_AND_CLASS.fullmatch(entrypoint)
    if found is None:
        if not _MODULE_AND_CLASS.fullmatch(entrypoint):
            raise ValueError(f"must be {ENTRYPOINT_FORMS}, not {shown(entrypoint)}")
        return entrypoint
    path = absolute(found[1], _folder(info))
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {printable(path)}")
    return f"{path}:{found[2]}"


def _read_cwd(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str | Path):
        return value
    path = absolute(str(value), _folder(info))
    if not os.path.isdir(path):
        raise ValueError(f"there is no folder {printable(path)}")
    return path


def _check_python(python: str, info: ValidationInfo) -> str:
    return program(python, _folder(info))


def _check_user(user: str) -> str:
    try:
        pwd.getpwnam(check_text(user))
    except (KeyError, UnicodeEncodeError):
        names = [entry.pw_name for entry in pwd.getpwall()]
        raise ValueError(f"this host has no user {shown(user)}{did_you_mean(user, names)}") from None
    return user


def _check_url(url: str) -> str:
    parts = urlsplit(check_text(url))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"must be a URL, such as http://127.0.0.1:8000/health, not {shown(url)}")
    if parts.username is not None:
        raise ValueError("must not hold a name or a password: it is shown")
    return url


def _read_umask(value: object) -> object:
    if isinstance(value, str):
        if not re.fullmatch(r"(0o)?[0-7]{1,4}", value):
            raise ValueError(f'must be an octal string, such as "022", not {shown(value)}')
        return int(value, 8)
    return value


def _read_env(env: dict[str, str], info: ValidationInfo) -> dict[str, str]:
    environ: Mapping[str, str] | None = (info.context or {}).get("environ")
    for name, value in env.items():
        if not name or "=" in name or "\0" in name:
            raise ValueError(f"{shown(name)} cannot be the name of an environment variable")
        if "\0" in value:
            raise ValueError(f"{printable(name)} must not contain a NUL character")
    if environ is None:  # a spec that was loaded before: its values are what they stand for
        return env
    return {name: _expand(name, value, environ) for name, value in env.items()}


def _expand(name: str, value: str, environ: Mapping[str, str]) -> str:
    def replace(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        if found["bad"]:
            raise ValueError(f'{printable(name)} has a "${{" that is no ${{NAME}}; write $$ for a dollar sign')
        if found["name"] not in environ:
            hint = did_you_mean(found["name"], environ)
            raise ValueError(
                f"{printable(name)} needs ${{{found['name']}}}, which the daemon's environment lacks{hint}"
            )
        return environ[found["name"]]

    return _VARIABLE.sub(replace, value)


def _check_metric(name: str) -> str:
    try:
        path_of(check_text(name))
    except BadRequest as error:
        raise ValueError(str(error)) from None
    return name


def _check_twice(names: list[str]) -> list[str]:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{shown(twice)} is given twice")
    return names


def _default_cwd(data: dict[str, Any]) -> Path:
    file = data.get("file")
    return file.parent.resolve() if isinstance(file, Path) else Path.cwd()


Text = Annotated[str, AfterValidator(check_text)]
Action = Literal["restart", "notify"]
Umask = Annotated[
    int,
    BeforeValidator(_read_umask),
    Field(ge=0, le=0o777),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0, "maximum": 0o777}, {"type": "string"}]}),
]


class Backoff(Table):
    """How long a job that fails again and again waits for its next start."""

    first_s: float = Field(default=0.5, gt=0, le=86400, description="the first wait; seconds")
    factor: float = Field(default=2.0, ge=1, le=100, description="each wait is this many times the one before")
    max_s: float = Field(default=60.0, gt=0, le=86400, description="the longest wait; seconds")
    jitter: float = Field(default=0.2, ge=0, lt=1, description="share of each wait that is random, up or down")
    reset_after_s: Seconds = Field(default=60.0, description="up for so long, a run clears the count; seconds")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max_s < self.first_s:
            raise ValueError(f"max_s ({self.max_s}) must not be less than first_s ({self.first_s})")
        return self


_OF_THE_RUN = ("memory", "cpu", "pids")


class Limits(Table):
    """What a run may use: as a whole where there is a cgroup tree, else each of its processes (`setrlimit(2)`)."""

    nofile: int | None = Field(default=None, ge=3, le=1 << 30, description="open files")
    nproc: int | None = Field(default=None, ge=1, le=1 << 30, description="processes and threads of the job's user")
    memory: Size | None = Field(
        default=None, description="memory of the whole run; without a cgroup the address space of each process; bytes"
    )
    cpu: float | None = Field(default=None, ge=0.01, le=4096, description="CPU of the whole run, by a cgroup; cores")
    pids: int | None = Field(
        default=None, ge=1, le=1 << 22, description="processes and threads of the whole run, by a cgroup"
    )
    core: Size | None = Field(default=None, description="size of a core dump, 0 for none; bytes")
    cpu_seconds: int | None = Field(default=None, ge=1, le=1 << 30, description="CPU time; seconds")

    def rlimits(self) -> dict[str, int]:
        """Return the limits that are set, by the names of setrlimit(2) in lower case and without RLIMIT_."""
        each = self.model_dump(exclude_none=True, exclude=set(_OF_THE_RUN))
        return {"cpu" if key == "cpu_seconds" else key: limit for key, limit in each.items()}

    def caps(self) -> dict[str, float]:
        """Return the limits of the run as a whole that are set."""
        return self.model_dump(exclude_none=True, include=set(_OF_THE_RUN))


class LogSettings(Table):
    """What is kept of a job's stdout and stderr."""

    max_bytes: Size = Field(default=10_000_000, ge=4096, description="size at which a log is rotated; bytes")
    keep: int = Field(default=10, ge=0, le=10_000, description="rotated files that are kept")
    compress: bool = Field(default=True, description="whether rotated files are compressed")
    merge: bool = Field(default=True, description="whether stdout and stderr share one file")


class Watchdog(Table):
    """What is done about a job that stops polling."""

    pulse_seconds: float = Field(
        default=30.0, ge=1, le=86400, description="a job that has not polled for so long hangs; seconds"
    )
    action: Action = Field(default="restart", description="end it and start it again, or only record it")


class Check(Table):
    """How a job is asked from outside whether it is well: by HTTP or with a command."""

    http: Annotated[str, AfterValidator(_check_url)] | None = Field(
        default=None, description="URL to GET: 2xx and 3xx say that all is well"
    )
    command: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, strict=False, description="program to run as the job is run: exit code 0 says that all is well"
    )
    every: float = Field(default=10.0, ge=1, le=86400, description="time from one check to the next; seconds")
    timeout: float = Field(default=3.0, gt=0, le=3600, description="time that one may take; seconds")
    failures: int = Field(default=3, ge=1, le=1_000_000, description="failures in a row that make it unhealthy")
    action: Action = Field(default="restart", description="end it and start it again, or only record it")

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if (self.http is None) == (self.command is None):
            raise ValueError("needs http = URL or command = [...], one of the two")
        return self


def _job_schema(schema: dict[str, Any]) -> None:
    for given_by_the_path in ("name", "file"):
        schema["properties"].pop(given_by_the_path, None)
    schema.pop("required", None)
    schema["oneOf"] = [{"required": ["entrypoint"]}, {"required": ["command"]}]


class JobSpec(Table, json_schema_extra=_job_schema):
    """A job: what to run, as whom, and what to do when it ends. Relative paths start at its file's folder.

    `name` and `file` come from where the file lies; every other field is a key of the file.
    """

    name: Name
    file: Path
    entrypoint: Annotated[str, AfterValidator(_check_entrypoint)] | None = Field(
        default=None, description=f"the Cradle to run: {ENTRYPOINT_FORMS}"
    )
    command: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, strict=False, description="the program to run, with its arguments, in place of an entrypoint"
    )
    python: Annotated[str, AfterValidator(_check_python)] | None = Field(
        default=None, description="interpreter for the entrypoint; default: the daemon's own"
    )
    args: list[Text] = Field(default=[], strict=False, description="arguments of run(), or more of the command's")
    env: Annotated[dict[str, str], AfterValidator(_read_env)] = Field(
        default={}, repr=False, description="environment variables besides the daemon's; ${VAR} is the daemon's own"
    )
    cwd: Annotated[Path, BeforeValidator(_read_cwd)] = Field(
        default_factory=_default_cwd, description="working directory; default: the folder of the job's file"
    )
    user: Annotated[str, AfterValidator(_check_user)] | None = Field(
        default=None, description="user of this host to run as; default: the daemon's"
    )
    umask: Umask | None = Field(default=None, description="file mode bits to leave out, octal; default: the daemon's")
    nice: int = Field(default=0, ge=-20, le=19, description="added to the niceness; above 0 gives way to others")
    enabled: bool = Field(default=True, description="false leaves the job out as if it had no file")
    autostart: bool = Field(default=True, description="whether the job is started with the daemon")
    restart: Literal["on-failure", "always", "never"] = Field(
        default="on-failure", description="which ends of a run, not asked for, are followed by a new one"
    )
    start_seconds: Seconds = Field(default=1.0, description="a run that lasted so long has come up; seconds")
    max_failures: int = Field(
        default=5, ge=1, le=1_000_000, description="failures in a row after which a job that never came up has failed"
    )
    backoff: Backoff = Backoff()
    kill_grace: Seconds = Field(default=3.0, description="time between SIGTERM and SIGKILL; seconds")
    watchdog: Watchdog | None = Field(default=None, description="what is done about a job that stops polling")
    check: Check | None = Field(default=None, description="how the job is asked from outside whether it is well")
    control: Control | None = Field(
        default=None, description="verbs reach the job as messages (an entrypoint's default) or signals (a command's)"
    )
    config: JsonTable = Field(default={}, description="what get_config() returns until a CONFIG command changes it")
    limits: Limits = Limits()
    log: LogSettings = LogSettings()
    tags: list[Name] = Field(default=[], strict=False, description="words to select jobs by")
    metrics: Annotated[
        list[Annotated[str, AfterValidator(_check_metric)]], Field(max_length=MOST_FIELDS), AfterValidator(_check_twice)
    ] = Field(default=[], strict=False, description="paths to numbers in its statuses that /metrics shows")
    history: HistoryOverride | None = Field(default=None, description="what this job keeps differently from the others")

    @model_validator(mode="after")
    def _check_what_runs(self) -> Self:
        if self.entrypoint is None and self.command is None:
            raise ValueError(f"needs entrypoint = {ENTRYPOINT_FORMS} or command = [...]")
        if self.entrypoint is not None and self.command is not None:
            raise ValueError("has both entrypoint and command; keep one of them")
        if self.python is not None and self.command is not None:
            raise ValueError("has python beside command; python goes with an entrypoint")
        if self.watchdog is not None and self.command is not None:
            raise ValueError("has watchdog beside command, which has no pulse; take a check")
        return self

    @classmethod
    def read(cls, file: Path, raw: Mapping[str, Any], where: str, text: str = "") -> Self:
        """Return the job that `raw`, the contents of `file`, describes; ${VAR} in env is the process's own.

        Raises ConfigError, each problem beginning with `where`.
        """
        if given := [key for key in ("name", "file") if key in raw]:
            raise ConfigError(f"{where}: {key}: unknown key; a job's name is that of its file" for key in given)
        return cls.parse({**raw, "name": file.stem, "file": Path(os.path.abspath(file))}, where, text)

    @property
    def control_mode(self) -> Control:
        """How verbs reach the job: what the file says, else messages for an entrypoint and signals for a command."""
        return self.control or ("messages" if self.entrypoint else "signals")

    @property
    def digest(self) -> str:
        """The hash of all that a run is made from: as long as it is the same, a running run is up to date."""
        made_from = self.model_dump(include=_MADE_FROM, exclude_defaults=True) | {"control": self.control_mode}
        return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()

    def masked(self) -> dict[str, Any]:
        """Return the spec as JSON may show it: the values in env are secrets."""
        shown_keys = self.model_dump(mode="json", exclude={"env"})
        shown_keys["env"] = dict.fromkeys(self.env, MASK)
        shown_keys["umask"] = None if self.umask is None else f"{self.umask:03o}"
        shown_keys["control"] = self.control_mode
        return shown_keys


_MADE_FROM = {"entrypoint", "command", "python", "args", "env", "cwd", "user", "umask", "nice", "limits"}
