"""Does what the plan says, when it says so, and undoes what does not last."""

from __future__ import annotations

import heapq
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

from chaos.clients import post_quietly
from chaos.ground import Disk, Ground
from chaos.plan import Fault
from chaos.processes import Process, Table, read
from chaos.proxy import Proxy
from chaos.witness import now

Undo = Callable[[], object]
_LOCKER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=2, isolation_level=None)
db.execute("BEGIN EXCLUSIVE")
sys.stdin.read()
"""
_FLOOD, _FLOOD_PART = 400, 20  # commands, and how many of them over one connection


class Driver:
    """Injects faults. `done` counts those that met something, by kind; `log` has a line for each."""

    def __init__(self, ground: Ground, table: Table, proxy: Proxy, log: Callable[[str], None]) -> None:
        self._ground = ground
        self._table = table
        self._proxy = proxy
        self._log = log
        self._undo: list[tuple[float, int, Fault, Undo]] = []
        self._order = count()
        self._posting: list[threading.Thread] = []
        self.done: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()

    def run(self, faults: list[Fault], seconds: float) -> None:
        """Inject the faults, each at its time; return after so many seconds, with all healed."""
        began = time.monotonic()
        for fault in faults:
            self._wait(began, fault.at_s)
            self._inject(fault)
        self._wait(began, seconds)
        self.heal()

    def heal(self) -> None:
        while self._undo:
            self._undo_one()
        for disk in (self._ground.state, self._ground.runtime):
            disk.empty()
        for name in self._ground.fleet.names:
            self._ground.fleet.mend(name)
        self._ground.fleet.mend_settings()
        for thread in self._posting:
            thread.join()

    def _wait(self, began: float, at_s: float) -> None:
        while True:
            now_s = time.monotonic() - began
            if self._undo and self._undo[0][0] <= min(now_s + began, at_s + began):
                self._undo_one()
            elif now_s >= at_s:
                return
            else:
                due_s = min(at_s, self._undo[0][0] - began) if self._undo else at_s
                time.sleep(max(0.0, due_s - now_s))

    def _inject(self, fault: Fault) -> None:
        action: Callable[[Fault], tuple[str, Undo | None] | None] = getattr(self, "_" + fault.kind.replace("-", "_"))
        since = now()
        done = action(fault)
        if done is None:
            self.missed[fault.kind] += 1
            self._log(f"{fault}: nothing to do it to")
            return
        what, undo = done
        number = next(self._order)
        self.done[fault.kind] += 1
        self._ground.driver.note("fault", number=number, kind=fault.kind, since=since, lasts=bool(undo), what=what)
        self._log(f"{fault}: {what}")
        if undo:
            heapq.heappush(self._undo, (time.monotonic() + fault.lasts_s, number, fault, undo))

    def _undo_one(self) -> None:
        _, number, fault, undo = heapq.heappop(self._undo)
        undo()
        self._ground.driver.note("healed", number=number, kind=fault.kind)

    # processes of the daemon

    def _server_kill(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._signal(self._table.server(), signal.SIGKILL)

    def _zygote_kill(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._signal(self._table.zygote(), signal.SIGKILL)

    def _spare_kill(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._signal(self._table.spare(), signal.SIGKILL)

    def _spare_stop(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._freeze(self._table.spare())

    def _keeper_kill(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._signal(self._keeper(), signal.SIGKILL)

    def _server_replace(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._signal(self._keeper(), signal.SIGUSR2)

    def _hangup(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._signal(self._keeper(), signal.SIGHUP)

    def _server_stop(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._freeze(self._table.server())

    def _keeper_stop(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._freeze(self._keeper())

    def _keeper(self) -> Process | None:
        pid = self._ground.init.pid
        found = read(pid) if pid else None
        # One that has no server yet has not set up its signals: no init system sends it any.
        return found if found and self._table.server() else None

    # processes of the jobs

    def _job_kill(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._signal(self._of_a_job(fault.number, first=True), signal.SIGKILL)

    def _child_kill(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._signal(self._of_a_job(fault.number, first=False), signal.SIGKILL)

    def _job_stop(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._freeze(self._of_a_job(fault.number, first=fault.number % 3 > 0))

    def _fork_cut(self, fault: Fault) -> tuple[str, Undo | None] | None:
        """Hold the keeper up while it is to end a run and fork the next, say more of that one, and kill the server."""
        name, verb = self._name(fault.number), ("kill?wait=0", "stop", "pause", "restart")[fault.number % 4]
        self._post(f"/jobs/{name}/restart")
        time.sleep(fault.number % 100 / 1000)
        frozen = self._freeze(self._keeper())
        if frozen is None:
            return None
        self._post(f"/jobs/{name}/{verb}")

        def go_on() -> None:
            if fault.number % 3:
                self._signal(self._table.server(), signal.SIGKILL)
            frozen[1]()

        return f"{verb} to {name}", go_on

    def _of_a_job(self, number: int, *, first: bool) -> Process | None:
        found = [family[:1] if first else family[1:] for family in self._table.by_job().values()]
        processes = sorted((process for family in found for process in family), key=lambda process: process.pid)
        return processes[number % len(processes)] if processes else None

    def _signal(self, process: Process | None, number: signal.Signals) -> tuple[str, Undo | None] | None:
        if process is None or not process.is_alive():
            return None
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
        job = self._table.job_of(process.mark) if process.mark else None
        return f"{number.name} to {process.pid}{f' of {job[0]}, run {job[1]}' if job else ''}", None

    def _freeze(self, process: Process | None) -> tuple[str, Undo] | None:
        done = self._signal(process, signal.SIGSTOP)
        return (done[0], lambda: self._signal(process, signal.SIGCONT)) if done else None

    # what the daemon stands on

    def _disk_full(self, fault: Fault) -> tuple[str, Undo | None] | None:
        server = self._table.server()
        return self._fill(self._ground.state, server.pid if server else None)

    def _journals_full(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._fill(self._ground.runtime, None)

    def _fill(self, disk: Disk, server_pid: int | None) -> tuple[str, Undo | None] | None:
        return (f"{disk.folder.name} is full", disk.empty) if disk.fill(server_pid) else None

    def _descriptors_out(self, fault: Fault) -> tuple[str, Undo | None] | None:
        process = self._keeper() if fault.number % 2 else self._table.server()
        if process is None:
            return None
        try:
            opened = len(os.listdir(f"/proc/{process.pid}/fd"))
            before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (opened + fault.number % 5, before[1]))
        except OSError:
            return None

        def give_back() -> None:
            if process.is_alive():
                with suppress(ProcessLookupError):
                    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)

        return f"{process.pid} has {opened} and gets few more", give_back

    def _database_lock(self, fault: Fault) -> tuple[str, Undo | None] | None:
        if not self._ground.database.exists():
            return None
        argv = [sys.executable, "-S", "-c", _LOCKER, str(self._ground.database)]
        locker = subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return "locked", lambda: locker.communicate(b"")

    # the configuration

    def _job_edit(self, fault: Fault) -> tuple[str, Undo | None] | None:
        name = self._name(fault.number)
        key = self._ground.fleet.edit(name, fault.number)
        self._reload(fault.number)
        return f"{key} of {name}", None

    def _job_break(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._harm(fault, lambda name: self._ground.fleet.damage(name, fault.number))

    def _job_remove(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return self._harm(fault, self._ground.fleet.remove)

    def _harm(self, fault: Fault, harm: Callable[[str], None]) -> tuple[str, Undo | None]:
        name = self._name(fault.number)

        def mend() -> None:
            self._ground.fleet.mend(name)
            self._reload(fault.number)

        harm(name)
        self._reload(fault.number)
        return name, mend

    def _settings_break(self, fault: Fault) -> tuple[str, Undo | None] | None:
        def mend() -> None:
            self._ground.fleet.mend_settings()
            self._reload(fault.number)

        self._ground.fleet.damage_settings()
        self._reload(fault.number)
        return "settings", mend

    def _preload(self, fault: Fault) -> tuple[str, Undo | None] | None:
        modules: list[list[str]] = [[], ["decimal"], ["decimal", "csv"], ["no_such_module"], ["slow_module"]]
        chosen = modules[fault.number % 5]
        self._ground.fleet.preload(chosen)
        self._reload(fault.number)
        return f"{chosen}", None

    def _reload(self, number: int) -> None:
        """Have the files read again, over HTTP or by a signal; or leave that to whatever comes next."""
        if number % 5 < 2:
            self._signal(self._keeper(), signal.SIGHUP)
        elif number % 5 < 4:
            self._post("/reload")

    def _name(self, number: int) -> str:
        names = self._ground.fleet.names
        return names[number // 7 % len(names)]

    # what comes in

    def _flood(self, fault: Fault) -> tuple[str, Undo | None] | None:
        name = self._name(fault.number)
        path = f"/jobs/{name}/{('config', 'resume', 'config')[fault.number % 3]}"
        for part in range(_FLOOD // _FLOOD_PART):
            self._post(path, [{"level": part * _FLOOD_PART + number} for number in range(_FLOOD_PART)])
        return f"{_FLOOD} commands to {name}", None

    def _connections_cut(self, fault: Fault) -> tuple[str, Undo | None] | None:
        return f"{self._proxy.cut()} connections", None

    def _post(self, path: str, bodies: Sequence[Any] = (None,)) -> None:
        """Ask for it and go on; whoever answers it does so when it can."""
        self._posting = [thread for thread in self._posting if thread.is_alive()]
        thread = threading.Thread(target=post_quietly, args=(self._ground.driver, self._ground.port, path, bodies))
        self._posting.append(thread)
        thread.start()
