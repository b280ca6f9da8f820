"""Where it all happens: folders and small disks of its own, and an init system that keeps `harnessd serve` running."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos.fleet import Fleet
from chaos.witness import FOLDER, SEED, Facts
from helpers.brand import Brand
from helpers.daemon import COMMAND, free_port

_DISK_BYTES = 2 << 30
_MS_REMOUNT, _MNT_DETACH = 32, 2  # mount(2), umount2(2)
_RESTART_S = 0.3  # as RestartSec= of a service
_IMPORT_S = 3.0  # of a module that is slow to import
_libc = ctypes.CDLL(None, use_errno=True)


class Disk:
    """A tmpfs of its own where mounting is allowed; else an ordinary folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._limited = 0
        self.is_mounted = self._mount(0, _DISK_BYTES)

    def fill(self, server_pid: int | None) -> bool:
        """Let nothing more be written: the disk gets as small as what is in it. Return whether that was done.

        Without a disk of its own, the server gets a limit on the size of files.
        """
        if not self.is_mounted:
            return self._limit(server_pid)
        for _ in range(20):
            stat = os.statvfs(self.folder)
            if self._mount(_MS_REMOUNT, (stat.f_blocks - stat.f_bfree) * stat.f_frsize):
                return True
        return False

    def empty(self) -> None:
        if self.is_mounted and not self._mount(_MS_REMOUNT, _DISK_BYTES):
            raise OSError(ctypes.get_errno(), f"cannot give {self.folder} its size back")
        if self._limited:
            with suppress(ProcessLookupError):
                hard = resource.prlimit(self._limited, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(self._limited, resource.RLIMIT_FSIZE, (hard, hard))
            self._limited = 0

    def close(self) -> None:
        if self.is_mounted:
            _libc.umount2(os.fsencode(self.folder), _MNT_DETACH)

    def _mount(self, flags: int, size_bytes: int) -> bool:
        options = f"size={max(1, size_bytes)},mode=700".encode()
        return _libc.mount(b"chaos", os.fsencode(self.folder), b"tmpfs", flags, options) == 0

    def _limit(self, server_pid: int | None) -> bool:
        database = self.folder / "harnessd.db"
        if server_pid is None or not database.exists():
            return False
        with suppress(ProcessLookupError):
            hard = resource.prlimit(server_pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(server_pid, resource.RLIMIT_FSIZE, (database.stat().st_size, hard))
            self._limited = server_pid
        return bool(self._limited)


class Ground:
    """A temporary folder with the config, the facts and two disks; `close` ends and removes all of it."""

    def __init__(self, seed: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.facts = self.folder / "facts"
        self.facts.mkdir()
        self.brand = Brand()
        self.state = Disk(self.folder / "state")
        self.runtime = Disk(self.folder / "run")
        self.port = free_port()
        self.fleet = Fleet(self.folder / "config", self._settings())
        modules = self.folder / "modules"
        modules.mkdir()
        (modules / "slow_module.py").write_text(f"import time\ntime.sleep({_IMPORT_S})\n")
        self.env = {FOLDER: str(self.facts), SEED: seed, "PYTHONPATH": str(modules)}
        self.driver = Facts(str(self.facts), "driver")
        self.init = Init(self)

    @property
    def database(self) -> Path:
        return self.state.folder / "harnessd.db"

    @property
    def log(self) -> Path:
        return self.folder / "daemon.log"

    def _settings(self) -> dict[str, Any]:
        return {
            "state_dir": str(self.state.folder),
            "runtime_dir": str(self.runtime.folder),
            "journal_max_bytes": 1_000_000,
            "preload": ["decimal"],
            "http": {"host": "127.0.0.1", "port": self.port},
            "history": {"max_rate": 1_000_000},
        }

    def keep(self, folder: Path) -> None:
        """Copy everything to look at it later."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))

    def close(self) -> None:
        self.init.close()
        deadline = time.monotonic() + 10
        while self.brand.members() and time.monotonic() < deadline:
            self.brand.kill()
            time.sleep(0.01)
        self.driver.close()
        self.state.close()
        self.runtime.close()
        shutil.rmtree(self.folder)


class Init:
    """Starts the daemon, and starts it again whenever it ends, until it is told to stop."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="init")
        self.has_served = threading.Event()

    def start(self) -> None:
        self._wanted.set()
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The keeper's pid, while it lives."""
        process = self._process
        return process.pid if process and process.poll() is None else None

    def stop(self, deadline_s: float) -> int | None:
        """End the daemon in order. Return its exit code; None when it did not end in time."""
        self._wanted.clear()
        process = self._process
        assert process
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(deadline_s)
        return None

    def close(self) -> None:
        self._wanted.clear()
        if self._process and self._process.poll() is None:
            self._process.kill()
        if self._thread.is_alive():
            self._thread.join()

    def _keep(self) -> None:
        while self._wanted.is_set():
            with open(self._ground.log, "ab") as log:
                self._process = subprocess.Popen(
                    [*COMMAND, str(self._ground.fleet.folder)],
                    cwd=self._ground.folder,
                    env=os.environ | self._ground.env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=self._ground.brand.wear,
                    start_new_session=True,
                )
            self._ground.driver.note("daemon-started", pid=self._process.pid)
            self._note_serving(self._process)
            code = self._process.wait()
            self._ground.driver.note("daemon-ended", pid=self._process.pid, code=code)
            time.sleep(_RESTART_S)

    def _note_serving(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            with suppress(OSError, http.client.HTTPException, ValueError):
                health = json.loads(answer(self._ground.port, "GET", "/healthz", 5)[1])
                if health["keeper_pid"] == process.pid:  # the server of a keeper killed just before may still answer
                    self._ground.driver.note("serving", pid=process.pid)
                    self.has_served.set()
                    return
            time.sleep(0.03)


def answer(port: int, method: str, path: str, timeout_s: float, body: bytes | None = None) -> tuple[int, bytes]:
    """Return status and body of one request over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request(method, path, body=body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def until(condition: Callable[[], bool], deadline_s: float, pause_s: float = 0.05) -> bool:
    """Return whether the condition came true in time."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True
