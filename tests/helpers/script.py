"""A user's own script that harnesses one job, as a real process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from helpers.brand import Brand
from helpers.waiting import DEADLINE_S, until

import harnessd

ROOT = Path(harnessd.__file__).resolve().parent.parent
_HEAD = """\
import asyncio, os, signal, sys, threading, time
from bqm.harness import Cradle, Command, ProcessHarness, launch

"""
_TAIL = """

if __name__ == "__main__":
    sys.exit(asyncio.run(ProcessHarness(config={config!r}).main({job})))
"""


class Script:
    """Writes the script and starts it. A body without a `__main__` part is given one that runs `job` on a free port."""

    def __init__(
        self,
        folder: Path,
        body: str,
        *,
        job: str = "Job()",
        config: dict[str, Any] | None = None,
        argv: Sequence[str] = (),
        env: dict[str, str] | None = None,
        stdin: str = "",
        interpreter: Sequence[str] = (sys.executable,),
    ) -> None:
        self.folder = folder
        self.path = folder / "script.py"
        config = {"http": {"port": 0}} | (config or {})
        tail = "" if "if __name__" in body else _TAIL.format(config=config, job=job)
        self.path.write_text(_HEAD + textwrap.dedent(body).strip() + tail)
        (folder / "stdin").write_text(stdin)
        self._brand = Brand()
        self._url = ""
        with ExitStack() as files:
            streams = {name: files.enter_context(open(folder / name, mode)) for name, mode in _STREAMS.items()}
            self.process = subprocess.Popen(
                [*interpreter, str(self.path), *argv],
                cwd=folder,
                env=_ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (env or {}),
                preexec_fn=self._brand.wear,
                start_new_session=True,
                **streams,
            )
        self._http = httpx.Client(
            timeout=DEADLINE_S, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0), verify=False
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        if not self._url:
            until(lambda: self._find_url() or self.process.poll() is not None, "the script listens")
            assert self._url, f"the script ended with {self.process.returncode}:\n{self.err}"
        return self._url

    def _find_url(self) -> bool:
        found = re.search(r"listens on (http://\S+)\n", self.err)
        self._url = found[1] if found else ""
        return bool(found)

    def get(self, path: str, **query: Any) -> httpx.Response:
        return self._http.get(self.url + path, params=query)

    def post(self, path: str, data: str = "", **query: Any) -> httpx.Response:
        return self._http.post(self.url + path, content=data.encode(), params=query)

    def hb(self) -> dict[str, Any]:
        return dict(self.get("/hb").json())

    def status(self) -> Any:
        """Return the last status of the job, once there is one."""
        return until(lambda: self.get("/status").json()["status"], "the job has reported a status")

    def until_status(self, status: Any) -> None:
        until(lambda: self.get("/status").json()["status"] == status, f"the status is {status!r}")

    def job_pid(self) -> int:
        return int(until(lambda: self.hb()["pid"], "the job has a process"))

    def members(self) -> list[int]:
        """Return every live process that the script has brought into the world, itself included."""
        return self._brand.members()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Return the script's exit code once it has ended and nothing of it is left."""
        code = self.process.wait(DEADLINE_S)
        until(lambda: not self.members(), "nothing is left")
        return code

    def close(self) -> None:
        """End it as a person would; raise AssertionError if that leaves anything behind."""
        self._http.close()
        try:
            if self.process.poll() is None:
                self.process.terminate()
            self.wait()
        finally:
            self._brand.kill()
            self.process.wait(DEADLINE_S)


_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
_STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}
