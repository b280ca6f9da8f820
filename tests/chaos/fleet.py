"""The thirty jobs and the files that define them: written, edited, broken, removed and mended."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Spec = dict[str, Any]

_COMMON: Spec = {
    "start_seconds": 0.2,
    "kill_grace": 1.0,
    "backoff": {"first_s": 0.2, "max_s": 2.0, "reset_after_s": 10},
    "max_failures": 1000,
}


def _entry(kind: str, crash: float = 0.0, **keys: Any) -> Spec:
    return _COMMON | {"entrypoint": f"{HERE}/jobs.py:{kind}", "args": [str(crash)], "config": {"level": 0}} | keys


def _program(*command: str, **keys: Any) -> Spec:
    return _COMMON | {"command": list(command)} | keys


def _other_python() -> str:
    """Return another interpreter from 3.11 up, if this host has one."""
    found = sorted(Path.home().glob(".pyenv/versions/3.1[1-9].*/bin/python"))
    others = [str(path) for path in found if path.resolve() != Path(sys.executable).resolve()]
    return others[-1] if others else sys.executable


def specs() -> dict[str, Spec]:
    """Return what each job's file says, by the job's name. The name is put before the other arguments."""
    python, script, other = f"{HERE}/program.py", f"{HERE}/program.sh", _other_python()
    jobs = {
        "poll-steady-0": _entry("Polls", tags=["steady"]),
        "poll-steady-1": _entry("Polls", tags=["steady"], restart="always"),
        "poll-always": _entry("Polls", 0.02, restart="always", tags=["brief"]),
        "poll-never": _entry("Polls", 0.02, restart="never", tags=["brief"]),
        "poll-crash": _entry("Polls", 0.1, tags=["brief"]),
        "poll-gives-up": _entry("Polls", 0.5, max_failures=3, tags=["brief"]),
        "loop-steady": _entry("Loops", tags=["steady"]),
        "loop-always": _entry("Loops", 0.05, restart="always", tags=["brief"]),
        "deaf-steady": _entry("Deaf", tags=["steady"], restart="always"),
        "deaf-crash": _entry("Deaf", 0.03, tags=["brief"]),
        "deaf-never": _entry("Deaf", 0.01, restart="never"),
        "threads-steady": _entry("Threads", tags=["steady", "many"]),
        "threads-crash": _entry("Threads", 0.03, restart="always", tags=["many"]),
        "forks-steady": _entry("Forks", tags=["steady", "many"]),
        "forks-crash": _entry("Forks", 0.03, restart="always", tags=["many"]),
        "forks-other": _entry("Forks", 0.01, python=other, tags=["many"]),
        "daemonises": _entry("Daemonises", restart="always", tags=["many"]),
        "daemonises-crash": _entry("Daemonises", 0.03, kill_grace=0.3, tags=["many"]),
        "signals": _entry("Signals", control="signals", restart="always"),
        "signals-crash": _entry("Signals", 0.03, control="signals"),
        "slow": _entry("Slow", tags=["slow"]),
        "slow-patient": _entry("Slow", 0.01, kill_grace=3.0, restart="always", tags=["slow"]),
        "chatty": _entry("Chatty", log={"max_bytes": 200_000, "keep": 3, "compress": False}),
        "chatty-two": _entry("Chatty", 0.01, restart="always", log={"max_bytes": 100_000, "keep": 2, "merge": False}),
        "floods": _entry("Floods", restart="always"),
        "other-python": _entry("Polls", 0.01, python=other, restart="always"),
        "program": _program(sys.executable, python, args=["0"], restart="always"),
        "program-hears": _program(sys.executable, python, args=["0.01", "hears"], control="messages"),
        "shell": _program("/bin/sh", script, args=["steady"], restart="always"),
        "shell-brief": _program("/bin/sh", script, args=["brief"], restart="always"),
    }
    return {name: spec | {"args": [name, *spec["args"]]} for name, spec in jobs.items()}


def may_rest(spec: Spec, state: str, how: str) -> bool:
    """Return whether the job's rules leave it in the state after a run that ended so."""
    restart = spec.get("restart", "on-failure")
    if state == "failed":
        return spec["max_failures"] < _COMMON["max_failures"] or (restart == "never" and how != "completed")
    return state == "exited" and how == "completed" and restart != "always"


class Fleet:
    """A config directory with all of them."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._settings = dict(settings)
        self._specs = specs()
        self.names = sorted(self._specs)
        (folder / "jobs").mkdir(parents=True)
        self.mend_settings()
        for name in self.names:
            self.mend(name)

    def edit(self, name: str, number: int) -> str:
        """Change one of the job's keys. Return what was changed."""
        spec = self._specs[name]
        key = ("config", "env", "tags", "backoff")[number % 4]
        if key == "config" and "entrypoint" in spec:
            spec["config"] = {"level": number}
        elif key == "tags":
            spec["tags"] = [*spec.get("tags", [])[:2], f"edit-{number % 10}"]
        elif key == "backoff":
            spec["backoff"] = {**spec["backoff"], "first_s": 0.1 + number % 5 / 10}
        else:
            key = "env"
            spec["env"] = {"EDIT": str(number)}  # needs a new run
        self.mend(name)
        return key

    def mend(self, name: str) -> None:
        self._put(self._path(name), json.dumps(self._specs[name], indent=1))

    def damage(self, name: str, number: int) -> None:
        """Leave half of the job's file, a key that there is not, or no JSON at all."""
        text = json.dumps(self._specs[name])
        unknown = json.dumps(deepcopy(self._specs[name]) | {"restrat": "always"})
        self._put(self._path(name), (text[: len(text) // 2], unknown, "\x00\xff")[number % 3])

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def mend_settings(self) -> None:
        self._put(self.folder / "harnessd.json", json.dumps(self._settings))

    def damage_settings(self) -> None:
        self._put(self.folder / "harnessd.json", '{"http": {"prot": 1}}')

    def preload(self, modules: list[str]) -> None:
        self._settings["preload"] = modules
        self.mend_settings()

    def _path(self, name: str) -> Path:
        return self.folder / "jobs" / f"{name}.json"

    def _put(self, path: Path, text: str) -> None:
        partial = path.with_name(f".{path.name}")
        partial.write_text(text)
        os.replace(partial, path)
