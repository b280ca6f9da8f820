from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from harnessd import Command, Cradle

Script = list[tuple[Command, Any] | None]


@pytest.fixture
def run_scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a job in this process on scripted messages (None: none came in time); returns it with what it did.

    Reading past the end of the script is a STOP, so that no job runs for ever.
    """

    def run(job_class: type[Cradle], script: Script, config: Any = None, args: tuple[str, ...] = ()) -> Any:
        class Scripted(job_class):  # type: ignore[misc, valid-type]
            def get_config(self) -> Any:
                return {} if config is None else config

            def get_msg(self, timeout: float | None = 0) -> dict[str, Any] | None:
                self.timeouts.append(timeout)
                entry = self.script.pop(0) if self.script else (Command.STOP, None)
                return entry and {"cmd": entry[0], "data": entry[1], "id": len(self.timeouts), "time": 0.0}

            def set_status(self, status: Any = None) -> bool:
                self.statuses.append(status)
                return True

        monkeypatch.setattr(sys, "argv", ["job.py", *args])
        job = Scripted()
        job.script, job.timeouts, job.statuses = list(script), [], []
        job.exit_code = job.run(*args)
        return job

    return run
