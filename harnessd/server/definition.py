"""A job as the supervisor needs it, whether a file or a script defined it."""

from __future__ import annotations

import math
import os
import pwd
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from harnessd.server.asked import Path, path_of
from harnessd.server.jobspec import JobSpec
from harnessd.server.policy import Rules
from harnessd.server.settings import History, ScriptSettings
from harnessd.wire import RunSpec

OWN_VARIABLES = "HARNESSD_"  # the daemon's own, its token among them: never a job's


@dataclass(frozen=True)
class Definition:
    """What a job is, in force for its next run."""

    name: str
    rules: Rules
    kill_grace_s: float
    config: Mapping[str, Any]
    run_spec: Callable[[RunSpec], RunSpec]  # fills in what the file says
    digest: str
    shown: dict[str, Any]  # as a route may show it: without secrets
    autostart: bool = True
    tags: tuple[str, ...] = ()
    counts_lines: bool = False  # what it writes into its journal has no numbers of its own
    max_rate: float = math.inf  # statuses a second that are stored
    metrics: tuple[tuple[str, Path], ...] = ()  # numbers in its statuses that are exposed
    spec: JobSpec | None = field(default=None, compare=False)


def from_file(spec: JobSpec, history: History) -> Definition:
    """Return the job that a file in the config directory defines."""
    backoff = spec.backoff
    rules = Rules(
        restart=spec.restart,
        start_seconds=spec.start_seconds,
        max_failures=spec.max_failures,
        first_s=backoff.first_s,
        factor=backoff.factor,
        max_s=backoff.max_s,
        jitter=backoff.jitter,
        reset_after_s=backoff.reset_after_s,
        messages=spec.control_mode == "messages",
    )
    return Definition(
        name=spec.name,
        rules=rules,
        kill_grace_s=spec.kill_grace,
        config=spec.config,
        run_spec=lambda run: _filled(run, spec),
        digest=spec.digest,
        shown=spec.masked(),
        autostart=spec.autostart,
        tags=tuple(spec.tags),
        counts_lines=spec.command is not None,
        max_rate=history.overridden(spec.history).max_rate,
        metrics=tuple((name, path_of(name)) for name in spec.metrics),
        spec=spec,
    )


def from_script(name: str, settings: ScriptSettings, args: list[str]) -> Definition:
    """Return the one job of a user's script: it runs once, and the harness ends with it."""
    return Definition(
        name=name,
        rules=Rules(restart="never", messages=settings.control == "messages"),
        kill_grace_s=settings.kill_grace,
        config=settings.config,
        run_spec=lambda run: replace(run, args=args),
        digest="",
        shown={"name": name, "script": sys.argv[0], "config": settings.config},
        max_rate=settings.history.max_rate,
    )


def _filled(run: RunSpec, spec: JobSpec) -> RunSpec:
    python = spec.python or ""
    if not python and spec.entrypoint and any(name.startswith("PYTHON") for name in spec.env):
        python = sys.executable  # what the interpreter reads at its start has no effect in a fork
    env: dict[str, str | None] = {name: None for name in os.environ if name.startswith(OWN_VARIABLES)}
    changes: dict[str, Any] = {
        "entrypoint": spec.entrypoint or "",
        "python": python,
        "command": list(spec.command or ()),
        "args": list(spec.args),
        "cwd": str(spec.cwd),
        "umask": spec.umask,
        "nice": spec.nice,
        "limits": spec.limits.rlimits(),
        "caps": spec.limits.caps(),
    }
    if spec.user is not None:
        user = pwd.getpwnam(spec.user)
        changes |= {"uid": user.pw_uid, "gid": user.pw_gid, "groups": os.getgrouplist(user.pw_name, user.pw_gid)}
        env |= {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
    return replace(run, env={**env, **spec.env}, **changes)
