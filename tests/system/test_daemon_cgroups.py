"""Limits of a run as a whole. What needs a controller that this host has not in version 2 is left out, and says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.daemon import COMMAND, Daemon
from helpers.waiting import until

LIMITS = {"memory": "48MiB", "cpu": 0.5, "pids": 16, "nofile": 64}
HOG = """
import os, time
while not os.path.exists("go"):
    time.sleep(0.01)
held = []
while True:
    held.append(bytearray(1 << 20))
    time.sleep(0.001)
"""
FORKING = """
import os, time
made = 0
try:
    while made < 100:
        if os.fork() == 0:
            time.sleep(1000)
        made += 1
except BlockingIOError:
    pass
print("made", made, flush=True)
time.sleep(1000)
"""


def enforced(daemon: Daemon, job: str) -> dict[str, str]:
    return dict(daemon.wait_for(lambda: daemon.hb(job)["limits"], f"{job} runs"))


def needs(daemon: Daemon, job: str, limit: str) -> None:
    if enforced(daemon, job)[limit] != "cgroup":
        pytest.skip(f"no controller of cgroup version 2 for {limit} can be enabled here")


def cgroup(daemon: Daemon, job: str) -> Path:
    """Return the cgroup of the job's run, where it has one."""
    pid = daemon.hb(job)["pid"]
    mine = next(line[3:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if line.startswith("0::"))
    points = [
        line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line
    ]
    found = next((Path(point + mine) for point in points if Path(point + mine).is_dir()), None)
    if found is None or not found.name.startswith("run-"):
        pytest.skip("there is no cgroup tree of version 2 that can be written")
    return found


def test_how_each_limit_is_enforced_is_told(daemon: Daemon) -> None:
    daemon.job("bound", ["sleep", "1000"], limits=LIMITS)
    daemon.job("free", ["sleep", "1000"])
    daemon.start()
    how = enforced(daemon, "bound")
    assert how.keys() == LIMITS.keys()
    assert how["nofile"] == "rlimit" and how["memory"] in ("cgroup", "rlimit")
    assert {how["cpu"], how["pids"]} <= {"cgroup", "none"}
    assert " ".join(f"{limit}={by}" for limit, by in how.items()) in daemon.log
    assert daemon.hb("free")["limits"] == {}


def test_a_run_past_its_memory_is_reported_as_such(daemon: Daemon) -> None:
    daemon.job("hog", [sys.executable, "-c", HOG], limits=LIMITS, restart="never", cwd=str(daemon.folder))
    daemon.start()
    needs(daemon, "hog", "memory")
    (daemon.folder / "go").touch()
    ended = daemon.wait_state("hog", "failed")["last_exit"]
    assert (ended["reason"], ended["signal"]) == ("oom", "SIGKILL") and "memory" in ended["error"]
    row = daemon.wait_for(lambda: daemon.get("/jobs/hog/runs").json()["rows"], "it is stored")[0]
    assert row["reason"] == "oom"


def test_without_a_cgroup_memory_is_the_address_space_of_each_process(daemon: Daemon) -> None:
    daemon.job("hog", [sys.executable, "-c", HOG], limits=LIMITS, restart="never", cwd=str(daemon.folder))
    daemon.start()
    if enforced(daemon, "hog")["memory"] == "cgroup":
        pytest.skip("here the whole run is limited")
    (daemon.folder / "go").touch()
    assert daemon.wait_state("hog", "failed")["last_exit"]["code"] == 1
    assert "MemoryError" in daemon.output("hog")


def test_cpu_and_swap_are_limited_in_the_cgroup(daemon: Daemon) -> None:
    daemon.job("bound", ["sleep", "1000"], limits=LIMITS)
    daemon.start()
    needs(daemon, "bound", "cpu")
    folder = cgroup(daemon, "bound")
    assert (folder / "cpu.max").read_text().split() == ["50000", "100000"]
    assert (folder / "memory.max").read_text().strip() == str(48 << 20)


def test_a_run_cannot_have_more_processes_than_its_limit(daemon: Daemon) -> None:
    daemon.job("forking", [sys.executable, "-c", FORKING], limits=LIMITS)
    daemon.start()
    needs(daemon, "forking", "pids")
    daemon.wait_for(lambda: "made 15" in daemon.output("forking"), "the limit holds")


@pytest.mark.parametrize("preload", [[], ["decimal"]])
def test_a_run_with_limits_has_a_cgroup_for_its_time(daemon: Daemon, preload: list[str]) -> None:
    daemon.settings(f"preload = {preload}")
    daemon.job("bound", "Idle", limits={"cpu": 1, "pids": 100})
    daemon.job("free", "Idle")
    daemon.start()
    daemon.wait_all("running")
    folder = cgroup(daemon, "bound")
    assert (folder / "cgroup.procs").read_text().split() == [str(daemon.hb("bound")["pid"])]
    kept = (folder.parent / "keeper" / "cgroup.procs").read_text().split()
    assert {str(daemon.keeper_pid), str(daemon.server_pid()), str(daemon.hb("free")["pid"])} <= {*kept}
    daemon.get("/jobs/bound/kill", grace=0)
    until(lambda: not folder.exists(), "it is removed")


def test_a_process_that_has_taken_its_mark_off_ends_with_its_run(daemon: Daemon) -> None:
    unmarked = "import os, resource, time\nif os.fork() == 0:\n    os.setsid()\n"
    unmarked += "    resource.setrlimit(10, (resource.RLIM_INFINITY,) * 2)\n    print(os.getpid(), flush=True)\n"
    hiding = [sys.executable, "-c", f"{unmarked}time.sleep(1000)"]
    daemon.job("hiding", hiding, limits={"pids": 100}, autostart=False)  # without a cgroup it would stay behind
    daemon.job("bound", ["sleep", "1000"], limits={"pids": 100})
    daemon.start()
    enforced(daemon, "bound")
    cgroup(daemon, "bound")
    daemon.get("/jobs/hiding/start")
    pid = int(daemon.wait_for(lambda: daemon.output("hiding").strip(), "it hides"))
    daemon.get("/jobs/hiding/kill", grace=0)
    assert not os.path.exists(f"/proc/{pid}/fd/0")  # a zombie has none


def test_what_a_killed_keeper_has_left_is_removed_by_the_next(daemon: Daemon) -> None:
    daemon.job("bound", ["sleep", "1000"], limits={"cpu": 1})
    daemon.start()
    daemon.wait_state("bound", "running")
    home = cgroup(daemon, "bound").parent
    daemon.tell(signal.SIGKILL)
    daemon.wait()
    until(lambda: not daemon.left(), "all has ended with it")
    daemon.start()
    until(lambda: not home.exists(), "its cgroups are removed")
    again: dict[str, Any] = daemon.wait_state("bound", "running")
    assert again["alive"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_mount_whose_name_is_no_utf_8_hurts_nobody(daemon: Daemon, tmp_path: Path) -> None:
    apart = ("unshare", "--mount")
    if subprocess.run([*apart, "true"]).returncode:
        pytest.skip("this root may not mount")
    point = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(point)
    daemon.job("bound", ["sleep", "1000"], limits=LIMITS)
    mounts = 'mount -t tmpfs none "$0" && exec "$@"'
    daemon.start([*apart, "sh", "-c", mounts, os.fsdecode(point), *COMMAND])
    assert enforced(daemon, "bound").keys() == LIMITS.keys()
