"""What systemd is told, and the unit that is shipped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.daemon import Daemon
from helpers.documents import ROOT, Shell, fenced, section
from helpers.waiting import DEADLINE_S

UNIT = ROOT / "docs" / "systemd" / "harnessd.service"
analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")


class Manager:
    """Hears what a service says to its manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(DEADLINE_S)

    def hear(self, word: str) -> str:
        """Return the next message that has the word, passing over others."""
        while word not in (message := self._socket.recv(4096).decode()):
            self.said.append(message)
        self.said.append(message)
        return message

    def drain(self) -> None:
        self._socket.setblocking(False)
        try:
            while True:
                self.said.append(self._socket.recv(4096).decode())
        except BlockingIOError:
            self._socket.settimeout(DEADLINE_S)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


def test_ready_watchdog_reload_and_stopping_are_told_by_the_keeper(daemon: Daemon, manager: Manager) -> None:
    daemon.job("looking", ["sh", "-c", "env; exec sleep 1000"])
    daemon.launch(NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC="100000")
    ready = manager.hear("READY=1")
    assert f"MAINPID={daemon.keeper_pid}" in ready and "STATUS=serving" in ready
    assert daemon.get("/healthz").is_success  # it serves by then

    server = daemon.server_pid()
    os.kill(server, signal.SIGSTOP)
    manager.drain()
    for _ in range(3):
        manager.hear("WATCHDOG=1")
    os.kill(server, signal.SIGCONT)

    daemon.tell(signal.SIGHUP)
    assert re.search(r"MONOTONIC_USEC=\d+", manager.hear("RELOADING=1"))
    manager.hear("READY=1")

    os.kill(server, signal.SIGKILL)
    assert "the jobs go on" in manager.hear("STATUS=")
    manager.hear("READY=1")

    daemon.wait_for(lambda: "PATH=" in daemon.output("looking"), "the job has its environment")
    assert not re.search("NOTIFY_SOCKET|WATCHDOG_", daemon.output("looking"))
    environment = Path(f"/proc/{daemon.server_pid()}/environ").read_bytes()
    assert b"NOTIFY_SOCKET" not in environment and b"WATCHDOG_" not in environment
    assert daemon.stop() == 0
    assert "EXTEND_TIMEOUT_USEC=" in manager.hear("STOPPING=1")


def test_a_watchdog_of_another_process_is_none_of_the_keepers(daemon: Daemon, manager: Manager) -> None:
    daemon.job("idle", "Idle")
    daemon.launch(NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC="50000", WATCHDOG_PID="1")
    manager.hear("READY=1")
    daemon.stop()
    manager.hear("STOPPING=1")
    manager.drain()
    assert not any("WATCHDOG" in message for message in manager.said)


def test_a_manager_that_is_gone_harms_nothing(daemon: Daemon, tmp_path: Path) -> None:
    daemon.job("idle", "Idle")
    daemon.start(NOTIFY_SOCKET=str(tmp_path / "nobody"), WATCHDOG_USEC="50000")
    daemon.wait_state("idle", "running")


@analyze
def test_the_unit_is_valid(tmp_path: Path) -> None:
    program = tmp_path / "harnessd"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/harnessd/bin/harnessd", str(program)))
    unit.chmod(0o644)  # whatever the umask is: one that all may write is told of
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert UNIT.name not in done.stderr, done.stderr


@analyze
def test_the_unit_is_rated_as_not_exposed() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    found = re.search(r"exposure level for .*: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) < 5.0


def test_the_upgrade_of_the_page_leaves_the_jobs_alone(daemon: Daemon) -> None:
    daemon.job("idle", "Idle")
    daemon.start()
    pid, server = daemon.wait_state("idle", "running")["pid"], daemon.server_pid()
    (block,) = fenced(section("docs/service.md", "Upgrade without stopping a job"), "sh")
    backup, install, replace = block.splitlines()
    shell = Shell(daemon.folder, daemon.port)
    shell(backup.replace("/opt/harnessd/bin/", "").replace("/etc/harnessd", str(daemon.config)))
    assert (daemon.folder / "before-upgrade.db").stat().st_size > 0
    assert install == "/opt/harnessd/bin/pip install --upgrade harnessd"
    assert replace == "systemctl kill --kill-whom=main --signal=USR2 harnessd"
    shell(f"kill -USR2 {daemon.keeper_pid}")
    daemon.wait_new_server(server)
    assert daemon.hb("idle")["pid"] == pid


def test_the_commands_of_the_page_are_those_of_the_unit(daemon: Daemon) -> None:
    (install,) = fenced(section("docs/service.md", "Install"), "sh")
    (moved,) = fenced(section("docs/service.md", "Move to another host"), "sh")
    lines = f"{install}{moved}".splitlines()
    assert (ROOT / lines[3].split()[1]) == UNIT
    folder = re.search(r"^ExecStart=(\S+)/bin/harnessd serve (\S+)$", UNIT.read_text(), re.MULTILINE)
    assert folder and {f"python3 -m venv {folder[1]}", f"mkdir -p {folder[2]}/jobs"} <= {*lines}
    daemon.job("idle", "Idle")
    shell = Shell(daemon.folder, daemon.port)
    shell(lines[4].replace(f"{folder[1]}/bin/", "").replace(folder[2], str(daemon.config)))
    state = daemon.state
    state.mkdir()
    shell(lines[-1].replace("/etc/harnessd", str(daemon.config)).replace("/var/lib/harnessd", str(state)))
    assert (daemon.folder / "harnessd.tar.gz").exists()
    for line in lines:
        assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0
