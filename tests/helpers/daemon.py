"""`harnessd serve` as a real process, on a config directory that a test writes."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
from helpers.brand import Brand, is_alive
from helpers.waiting import DEADLINE_S, until

from harnessd import tree

COMMAND = (str(Path(sys.executable).with_name("harnessd")), "serve")
JOBS = Path(__file__).with_name("jobs.py")
T = TypeVar("T")


def free_port() -> int:
    """Return a port that nothing listens on and that the kernel gives to no connection of its own choice.

    A port of the kernel's own choice may be taken again, by any connection, before the server under test has bound it.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(10_240, max(lowest, 20_480))))
            return int(probe.getsockname()[1])


def entrypoint(name: str) -> str:
    """Return the entrypoint of one of the jobs in helpers/jobs.py."""
    return f"{JOBS}:{name}"


def children(pid: int) -> dict[int, str]:
    """Return the children of the process and their states as proc(5) has them."""
    found: dict[int, str] = {}
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found |= {int(child): "" for child in file.read().split()}
    for child in found:
        with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{child}/stat") as file:
            found[child] = file.read().rpartition(") ")[2][:1]
    return found


def spares(keeper: int) -> list[int]:
    """Return the children of the keeper that wait to become a run."""
    return [pid for pid in children(keeper) if title(pid) == "harnessd: spare"]


def title(pid: int) -> str:
    """Return what `ps` shows of the process; nothing when it is gone."""
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().rstrip(b"\0 ").decode()
    return ""


class Daemon:
    """Writes the config directory, starts the daemon and speaks with it; `close` ends it and looks at what is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config"
        self.state = folder / "state"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._brand = Brand()
        (self.config / "jobs").mkdir(parents=True)
        self.settings()
        # One connection a request shows what a new client meets; `kept` is one that keeps its connection open.
        options: dict[str, Any] = {"timeout": DEADLINE_S, "trust_env": False, "verify": False}
        self._http = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), **options)
        self.kept = httpx.Client(base_url=self.url, **options)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # files

    def settings(self, more: str = "", http: str = "") -> None:
        """Write harnessd.toml; `more` stands at the top level, `http` in [http]."""
        text = f'state_dir = "{self.state}"\nruntime_dir = "{self.folder}/run"\n{more}\n'
        (self.config / "harnessd.toml").write_text(f'{text}[http]\nhost = "127.0.0.1"\nport = {self.port}\n{http}\n')

    def job(self, name: str, runs: str | Sequence[str], **keys: Any) -> Path:
        """Write the file of a job: one of helpers/jobs.py or any entrypoint by name, or a command's arguments.

        A run has come up after 0.1 s unless it says otherwise.
        """
        if isinstance(runs, str):
            keys = {"entrypoint": runs if ":" in runs else entrypoint(runs)} | keys
        else:
            keys = {"command": list(runs)} | keys
        return self.write(name, json.dumps({"start_seconds": 0.1} | keys), ".json")

    def write(self, name: str, text: str, suffix: str = ".toml") -> Path:
        """Put a job's file in place whole, as a careful editor does."""
        path = self.config / "jobs" / (name + suffix)
        path.with_name(f".{path.name}").write_text(text)
        path.with_name(f".{path.name}").rename(path)
        return path

    @property
    def log(self) -> str:
        return (self.folder / "daemon.log").read_text(errors="replace")

    def output(self, job: str) -> str:
        """Return what the job wrote to stdout and stderr."""
        path = self.state / "log" / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return rows of the database."""
        with closing(sqlite3.connect(f"file:{self.state}/harnessd.db?mode=ro", uri=True, timeout=DEADLINE_S)) as db:
            return db.execute(query, values).fetchall()

    # the process

    def launch(self, command: Sequence[str] = COMMAND, **env: str) -> None:
        """Start the process and go on at once."""
        with open(self.folder / "daemon.log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, str(self.config)],
                cwd=self.folder,
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=self._brand.wear,
                start_new_session=True,
            )

    def start(self, command: Sequence[str] = COMMAND, **env: str) -> None:
        """Start it and wait until it serves."""
        self.launch(command, **env)
        self.wait_serving()

    def wait_serving(self) -> None:
        """Wait until the daemon that was launched serves."""
        self.wait_for(lambda: self._exit_code() is not None or self._serves(), "the daemon serves")
        assert self._exit_code() is None, f"the daemon has ended:\n{self.log}"

    def _serves(self) -> bool:
        try:
            return self.get("/healthz").is_success
        except httpx.ConnectError:
            return False

    def _exit_code(self) -> int | None:
        assert self.process
        return self.process.poll()

    @property
    def keeper_pid(self) -> int:
        assert self.process
        return self.process.pid

    def server_pid(self) -> int:
        return int(self.health()["server_pid"])

    def kill_server(self) -> int:
        """SIGKILL the server. Return its pid."""
        pid = self.server_pid()
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_new_server(self, old_pid: int) -> None:
        self.wait_for(lambda: self.server_pid() != old_pid, "a new server serves")

    def tell(self, number: signal.Signals) -> None:
        assert self.process
        self.process.send_signal(number)

    def wait(self) -> int:
        """Return the exit code of the daemon."""
        assert self.process
        return self.process.wait(DEADLINE_S)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it as an operator does. Return its exit code; what it left behind fails the test."""
        self.tell(number)
        code = self.wait()
        until(lambda: not self.left(), "nothing of the daemon is left")
        return code

    def left(self) -> list[int]:
        """Return every live process that has come from this daemon, however it was detached from it."""
        return sorted({*self._brand.members(), *self.wearing_a_mark()})

    def wearing_a_mark(self) -> list[int]:
        """Return the live processes of all runs that the database knows."""
        with suppress(sqlite3.Error):  # there is none yet
            marks = {mark for (mark,) in self.rows("SELECT mark FROM run") if mark}
            return [pid for pids in tree.members(marks).values() for pid in pids]
        return []

    def close(self) -> None:
        """End it, whatever the test has done; raise AssertionError when a process or a zombie stays."""
        self._http.close()
        self.kept.close()
        if self.process is None:
            return
        try:
            if self.process.poll() is None:
                until(lambda: "Z" not in children(self.keeper_pid).values(), "the keeper has reaped its children")
                self.process.terminate()
            self.wait()
            until(lambda: not self.left(), "nothing of the daemon is left")
        finally:
            self._brand.kill()
            with suppress(sqlite3.Error):
                tree.end_all({mark for (mark,) in self.rows("SELECT mark FROM run") if mark})
            self.process.wait(DEADLINE_S)

    # HTTP

    def get(self, path: str, **query: Any) -> httpx.Response:
        return self._http.get(self.url + path, params=query)

    def post(self, path: str, data: Any = None, **query: Any) -> httpx.Response:
        return self._http.post(self.url + path, json=data, params=query)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._http.request(method, self.url + path, **options)

    def health(self) -> dict[str, Any]:
        return dict(self.get("/healthz").json())

    def hb(self, job: str) -> dict[str, Any]:
        return dict(self.get(f"/jobs/{job}/hb").json())

    def jobs(self, **query: Any) -> dict[str, dict[str, Any]]:
        """Return the list of the jobs, by their names."""
        return {job["name"]: job for job in self.get("/jobs", **query).json()["jobs"]}

    def status(self, job: str) -> Any:
        """Return the last status of the job, once there is one."""
        return self.wait_for(lambda: self.get(f"/jobs/{job}/status").json()["status"], f"{job} has reported")

    def wait_status(self, job: str, **expected: Any) -> None:
        def says() -> bool:
            status = self.get(f"/jobs/{job}/status").json()["status"] or {}
            return {key: status.get(key) for key in expected} == expected

        self.wait_for(says, f"{job} reports {expected}")

    def wait_state(self, job: str, *states: str) -> dict[str, Any]:
        """Return the heartbeat of the job once it is in one of the states."""

        def there() -> dict[str, Any] | None:
            hb = self.hb(job)
            return hb if hb["state"] in states else None

        return self.wait_for(there, f"{job} is {' or '.join(states)}") or {}

    def wait_all(self, state: str, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """Return the list of the jobs once all of them, or those named, are in the state."""
        wanted = set(names) if names is not None else None

        def there() -> dict[str, dict[str, Any]] | None:
            jobs = {name: job for name, job in self.jobs().items() if wanted is None or name in wanted}
            return jobs if jobs and all(job["state"] == state for job in jobs.values()) else None

        return self.wait_for(there, f"all jobs are {state}") or {}

    def reload(self) -> dict[str, Any]:
        answer = self.post("/reload")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait_for(self, condition: Callable[[], T], what: str) -> T:
        """Return the first true value; a request that a dying server took with it counts as not yet."""

        def tried() -> T | None:
            try:
                return condition()
            except (httpx.RemoteProtocolError, httpx.ReadError):
                return None

        try:
            found = until(tried, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log[-4000:]}") from None
        assert found is not None
        return found


def pids_of(jobs: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {name: job["pid"] for name, job in jobs.items()}


def ended(pid: int) -> bool:
    return not is_alive(pid)
