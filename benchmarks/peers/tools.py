"""The tools that are compared: how each is told of its jobs, started, asked, stopped, and what it knows of an exit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from host import VARIABLE, end_all, processes

WORKER = Path(__file__).with_name("worker.py")
JOB = WORKER.with_name("job.py")
PORT = 23790
LOG_BYTES = 10_000_000
LOG_FILES = 50


class Tool(ABC):
    """One tool in a folder of its own. What `None` answers stands for, the tool cannot do."""

    name: ClassVar[str]
    program: ClassVar[str]
    asked_by: ClassVar[str | None] = None  # the client of status_client.py that speaks its protocol
    log_note: ClassVar[str] = ""

    def __init__(self, tools: Path, folder: Path) -> None:
        self.tools = tools
        self.folder = folder
        self.token = "-".join([*re.findall(r"\w+", self.name), str(os.getpid())])
        self._root: subprocess.Popen[bytes] | None = None

    def find(self) -> str | None:
        """Return the path of its program."""
        return shutil.which(self.program)

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def write(self, workers: Iterable[str]) -> None:
        """Write the configuration for these workers."""

    @abstractmethod
    def argv(self) -> list[str]:
        """Return the command that starts the daemon in the foreground."""

    def start(self) -> None:
        with open(self.folder / "tool.log", "ab") as log:
            self._root = subprocess.Popen(
                self.argv(), cwd=self.folder, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def environment(self) -> dict[str, str]:
        unwanted = ("HARNESSD_", "PYTHONDONTWRITEBYTECODE")  # as where they are used: with compiled modules on disk
        kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
        return kept | {VARIABLE: self.token, "WORKER_FOLDER": str(self.folder)}

    def root(self) -> int:
        assert self._root
        return self._root.pid

    def stop(self) -> None:
        """Ask the daemon to end with all of its jobs."""
        os.kill(self.root(), signal.SIGTERM)

    def stopped(self) -> bool:
        return self._root is None or self._root.poll() is not None

    def crash(self) -> None:
        """SIGKILL what a user would call the daemon."""
        os.kill(self.root(), signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            if self._root:
                self._root.wait(5)

    def recover(self) -> None:
        """Do what an init system does with a daemon that was killed."""
        self.start()

    def address(self, worker: str) -> str:
        return ""

    def client_python(self) -> str:
        return sys.executable

    def exit_code(self, worker: str, pid: int) -> str | None:
        """Return what it can tell of the exit of the worker that had the pid; of the last one if it tells no pids."""
        return None

    @abstractmethod
    def log_files(self, worker: str) -> list[Path]:
        """Return the files with the worker's output, the oldest first."""

    def logged(self, worker: str) -> bytes:
        """Return all that is left of the worker's output."""
        return b"".join(path.read_bytes() for path in self.log_files(worker) if path.is_file())

    def _ask(self, *argv: str) -> str:
        return subprocess.run(argv, cwd=self.folder, env=self.environment(), capture_output=True, text=True).stdout


class Harnessd(Tool):
    name = "harnessd"
    program = "harnessd"
    asked_by = "http"
    preload: tuple[str, ...] = ()

    def find(self) -> str | None:
        return shutil.which(self.program, path=str(Path(sys.executable).parent)) or shutil.which(self.program)

    def version(self) -> str:
        return self._ask(str(self.find()), "version").split()[-1]

    def write(self, workers: Iterable[str]) -> None:
        jobs = self.folder / "config" / "jobs"
        jobs.mkdir(parents=True, exist_ok=True)
        for worker in workers:
            (jobs / f"{worker}.toml").write_text(self.job(worker))
        preload = f"preload = {json.dumps(self.preload)}\n" if self.preload else ""
        (self.folder / "config" / "harnessd.toml").write_text(
            f'{preload}state_dir = "../state"\nruntime_dir = "/dev/shm/{self.token}"\n[http]\nport = {PORT}\n'
        )

    def job(self, worker: str) -> str:
        rotation = f"log = {{max_bytes = {LOG_BYTES}, keep = {LOG_FILES}, compress = false}}"
        return f'entrypoint = "{JOB}:Worker"\nargs = ["{worker}"]\nrestart = "always"\n{rotation}\n'

    def argv(self) -> list[str]:
        return [str(self.find()), "serve", "config"]

    def crash(self) -> None:
        os.kill(self.server(), signal.SIGKILL)

    def server(self) -> int:
        return next(pid for pid, line in processes(self.token).items() if "harnessd.daemon" in line)

    def recover(self) -> None:
        """Its keeper starts the next server by itself."""

    def address(self, worker: str) -> str:
        return f"127.0.0.1:{PORT}/jobs/{worker}/hb"

    def exit_code(self, worker: str, pid: int) -> str | None:
        runs = json.loads(self._ask("curl", "-s", f"http://127.0.0.1:{PORT}/jobs/{worker}/runs?limit=20"))["rows"]
        run = next(run for run in runs if run["pid"] == pid)
        return str(run["reason"] if run["exit_code"] is None else run["exit_code"])

    def log_files(self, worker: str) -> list[Path]:
        folder = self.folder / "state" / "log"
        return [*sorted(folder.glob(f"{worker}.log.[0-9]*")), folder / f"{worker}.log"]


class HarnessdExec(Harnessd):
    """The same worker as a program of its own, as the others start it: what is left without the fork."""

    name = "harnessd (command)"

    def job(self, worker: str) -> str:
        argv = json.dumps([sys.executable, str(WORKER), worker])
        return super().job(worker).replace(f'entrypoint = "{JOB}:Worker"\nargs = ["{worker}"]', f"command = {argv}")


class HarnessdKeeper(Harnessd):
    """Its keeper killed in place of its server: the process that the others have one of."""

    name = "harnessd (keeper)"

    def crash(self) -> None:
        Tool.crash(self)

    def recover(self) -> None:
        self.start()


class HarnessdProgram(Harnessd):
    """Asked by its own program, a process for each question, as pm2, runit and s6 are."""

    name = "harnessd (its own program)"
    asked_by = "program"

    def address(self, worker: str) -> str:
        return f"{self.find()} --url http://127.0.0.1:{PORT} hb {worker}"


class Supervisor(Tool):
    name = "supervisor"
    program = "supervisord"
    asked_by = "xmlrpc"

    def find(self) -> str | None:
        return shutil.which(self.program, path=str(self.tools / "venv" / "bin"))

    def version(self) -> str:
        return self._ask(str(self.find()), "--version").strip()

    def write(self, workers: Iterable[str]) -> None:
        """All in one group: groups are stopped one after the other, the programs of one at once."""
        workers = list(workers)
        lines = [
            "[supervisord]\nlogfile=supervisord.log\npidfile=supervisord.pid\nnodaemon=true\nminfds=8192\n",
            f"[inet_http_server]\nport=127.0.0.1:{PORT}\n",
            (
                "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory = "
                "supervisor.rpcinterface:make_main_rpcinterface\n"
            ),
            f"[group:all]\nprograms={','.join(workers)}\n",
        ]
        lines += [
            f"[program:{worker}]\ncommand={sys.executable} {WORKER} {worker}\nautorestart=true\n"
            f"stdout_logfile=logs/{worker}\nredirect_stderr=true\n"
            f"stdout_logfile_maxbytes={LOG_BYTES}\nstdout_logfile_backups={LOG_FILES}\n"
            for worker in workers
        ]
        (self.folder / "logs").mkdir(exist_ok=True)
        (self.folder / "supervisord.conf").write_text("\n".join(lines))

    def argv(self) -> list[str]:
        return [str(self.find()), "-n", "-c", "supervisord.conf"]

    def address(self, worker: str) -> str:
        return f"127.0.0.1:{PORT} all:{worker}"

    def exit_code(self, worker: str, pid: int) -> str | None:
        from xmlrpc.client import ServerProxy

        info = ServerProxy(f"http://127.0.0.1:{PORT}/RPC2").supervisor.getProcessInfo(f"all:{worker}")
        assert isinstance(info, dict)
        return str(info["exitstatus"])

    def log_files(self, worker: str) -> list[Path]:
        folder = self.folder / "logs"
        return [*sorted(folder.glob(f"{worker}.*"), key=lambda path: -int(path.suffix[1:])), folder / worker]


class Circus(Tool):
    name = "circus"
    program = "circusd"
    asked_by = "zmq"

    def find(self) -> str | None:
        return shutil.which(self.program, path=str(self.tools / "venv" / "bin"))

    def version(self) -> str:
        return self._ask(str(self.tools / "venv" / "bin" / "pip"), "show", "circus").split("Version: ")[1].split()[0]

    def write(self, workers: Iterable[str]) -> None:
        ends = "\n".join(
            f"{key} = tcp://127.0.0.1:{PORT + number}"
            for number, key in enumerate(("endpoint", "pubsub_endpoint", "stats_endpoint"))
        )
        lines = [f"[circus]\nstatsd = False\ncheck_delay = 1\nwarmup_delay = 0\n{ends}\n"]
        lines += [
            f"[watcher:{worker}]\ncmd = {sys.executable} {WORKER} {worker}\nnumprocesses = 1\ncopy_env = True\n"
            f"warmup_delay = 0\nmax_retry = -1\nstdout_stream.class = FileStream\n"
            f"stdout_stream.filename = {self.folder}/logs/{worker}\n"
            f"stdout_stream.max_bytes = {LOG_BYTES}\nstdout_stream.backup_count = {LOG_FILES}\n"
            for worker in workers
        ]
        (self.folder / "logs").mkdir(exist_ok=True)
        (self.folder / "circus.ini").write_text("\n".join(lines))

    def argv(self) -> list[str]:
        return [str(self.find()), "circus.ini"]

    def address(self, worker: str) -> str:
        return f"tcp://127.0.0.1:{PORT} {worker}"

    def client_python(self) -> str:
        return str(self.tools / "venv" / "bin" / "python")

    log_files = Supervisor.log_files


class Pm2(Tool):
    name = "pm2"
    program = "pm2"
    asked_by = "program"
    log_note = "no rotation of its own"

    def find(self) -> str | None:
        return shutil.which(self.program, path=str(self.tools / "npm" / "node_modules" / ".bin"))

    def environment(self) -> dict[str, str]:
        return super().environment() | {"PM2_HOME": str(self.folder / "pm2"), "PM2_DISCRETE_MODE": "true"}

    def version(self) -> str:
        about = self.tools / "npm" / "node_modules" / "pm2" / "package.json"
        return str(json.loads(about.read_text())["version"])

    def write(self, workers: Iterable[str]) -> None:
        (self.folder / "logs").mkdir(exist_ok=True)
        apps = [
            {
                "name": worker,
                "script": str(WORKER),
                "interpreter": sys.executable,
                "args": [worker],
                "exec_mode": "fork",
                "out_file": f"logs/{worker}",
                "error_file": f"logs/{worker}.err",
            }
            for worker in workers
        ]
        (self.folder / "apps.json").write_text(json.dumps({"apps": apps}))

    def argv(self) -> list[str]:
        return [str(self.find()), "start", "apps.json"]

    def root(self) -> int:
        return int((self.folder / "pm2" / "pm2.pid").read_text())

    def stop(self) -> None:
        self._ask(str(self.find()), "kill")

    def stopped(self) -> bool:
        return not any("God Daemon" in line for line in processes(self.token).values())

    def crash(self) -> None:
        os.kill(self.root(), signal.SIGKILL)

    def address(self, worker: str) -> str:
        return f"{self.find()} jlist"

    def exit_code(self, worker: str, pid: int) -> str | None:
        apps = json.loads(self._ask(str(self.find()), "jlist") or "[]")
        return next((str(app["pm2_env"].get("exit_code")) for app in apps if app["name"] == worker), None)

    def log_files(self, worker: str) -> list[Path]:
        return [self.folder / "logs" / worker]


class Services(Tool):
    """runit and s6: a folder for each service."""

    def write(self, workers: Iterable[str]) -> None:
        for worker in workers:
            service = self.folder / "services" / worker
            logs = self.folder / "logs" / worker
            logs.mkdir(parents=True, exist_ok=True)
            self._program(service / "run", f"exec 2>&1\nexec {sys.executable} {WORKER} {worker}")
            self._program(service / "log" / "run", self.logger(logs))
            self.more(service, logs)

    def _program(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    @abstractmethod
    def logger(self, logs: Path) -> str: ...

    def more(self, service: Path, logs: Path) -> None:
        pass

    def version(self) -> str:
        found = self._ask("dpkg-query", "-W", "-f", "${Version}", self.name)
        return found or "unknown"

    def log_files(self, worker: str) -> list[Path]:
        folder = self.folder / "logs" / worker
        return [*sorted(folder.glob("@*")), folder / "current"]


class Runit(Services):
    name = "runit"
    program = "runsvdir"
    asked_by = "program"

    def logger(self, logs: Path) -> str:
        return f"exec svlogd {logs}"

    def more(self, service: Path, logs: Path) -> None:
        (logs / "config").write_text(f"s{LOG_BYTES}\nn{LOG_FILES}\n")

    def argv(self) -> list[str]:
        return [str(self.find()), "services"]

    def stop(self) -> None:
        os.kill(self.root(), signal.SIGHUP)

    def address(self, worker: str) -> str:
        return f"sv status {self.folder}/services/{worker}"


class S6(Services):
    name = "s6"
    program = "s6-svscan"
    asked_by = "program"

    def logger(self, logs: Path) -> str:
        return f"exec s6-log n{LOG_FILES} s{LOG_BYTES} {logs}"

    def argv(self) -> list[str]:
        return [str(self.find()), "-c", "2000", "services"]

    def address(self, worker: str) -> str:
        return f"s6-svstat {self.folder}/services/{worker}"

    def exit_code(self, worker: str, pid: int) -> str | None:
        deaths = self._ask("s6-svdt", f"{self.folder}/services/{worker}").split()
        return deaths[-1] if deaths else None


class BareFork(Tool):
    """The limit of what forks: a process that has imported the worker, forks it, and forks it again when it ends."""

    name = "bare fork"
    program = sys.executable

    def version(self) -> str:
        return ""

    def write(self, workers: Iterable[str]) -> None:
        self.workers = list(workers)

    def argv(self) -> list[str]:
        return [self.program, str(WORKER.with_name("fork.py")), *self.workers]

    def stop(self) -> None:
        end_all(self.token)

    def log_files(self, worker: str) -> list[Path]:
        return []


TOOLS: tuple[type[Tool], ...] = (Harnessd, HarnessdExec, HarnessdKeeper, Supervisor, Circus, Pm2, Runit, S6)


def provision(tools: Path) -> None:
    """Install what pip and npm have of the tools into the folder; runit and s6 are the host's."""
    if not (tools / "venv").exists():
        subprocess.run([sys.executable, "-m", "venv", tools / "venv"], check=True)
        subprocess.run([tools / "venv" / "bin" / "pip", "install", "--quiet", "supervisor", "circus"], check=True)
    if shutil.which("npm") and not (tools / "npm").exists():
        subprocess.run(["npm", "install", "--silent", "--prefix", tools / "npm", "pm2"], check=True)
