"""Libraries that are imported once, in a process beside the keeper."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from helpers.daemon import Daemon, children, spares
from helpers.waiting import until

LIBRARY = "xml.dom.minidom"  # of the standard library, and not among what the keeper loads


def preloading(daemon: Daemon, *modules: str) -> None:
    daemon.settings(f"preload = {list(modules)!r}")


def zygotes(daemon: Daemon) -> list[int]:
    """Return the children of the keeper that are neither the server nor a run, nor forked ahead for one."""
    found = children(daemon.keeper_pid)
    others = {daemon.server_pid(), *spares(daemon.keeper_pid), *(job["pid"] for job in daemon.jobs().values())}
    return [pid for pid in found if pid not in others]


def test_a_run_finds_what_is_preloaded_and_is_the_keepers_child(daemon: Daemon) -> None:
    preloading(daemon, LIBRARY)
    daemon.job("one", "Imports", args=[LIBRARY])
    daemon.start()
    status = daemon.status("one")
    assert status["preloaded"]
    assert status["parent"] == daemon.keeper_pid
    assert daemon.hb("one")["pid"] == status["pid"]
    old = status["pid"]
    daemon.get("/jobs/one/restart")
    daemon.wait_for(lambda: daemon.status("one")["pid"] != old, "the next run")
    assert daemon.status("one")["preloaded"]


def test_no_two_runs_draw_the_same_numbers_from_numpys_global_generator(daemon: Daemon, tmp_path: Path) -> None:
    library = tmp_path / "numpy"  # that seeds a generator when it is imported, as the real one does
    library.mkdir()
    (library / "__init__.py").write_text("")
    (library / "random.py").write_text("import random\ndrawn = random.Random()\nseed = drawn.seed\n")
    job = tmp_path / "draws.py"
    job.write_text("""
from harnessd import Cradle
class Draws(Cradle):
    def run(self):
        import numpy.random
        self.set_status(numpy.random.drawn.random())
        self.get_msg(timeout=None)
""")
    preloading(daemon, "numpy.random")
    for name in ("one", "two", "three"):
        daemon.write(name, f'entrypoint = "{job}:Draws"')
    daemon.start(PYTHONPATH=str(tmp_path))
    drawn = {daemon.wait_for(lambda name=name: daemon.status(name), f"{name} draws") for name in daemon.jobs()}
    assert len(drawn) == 3


def test_without_preload_nothing_is(daemon: Daemon) -> None:
    daemon.job("one", "Imports", args=[LIBRARY])
    daemon.start()
    assert not daemon.status("one")["preloaded"]


def test_a_preload_that_fails_is_reported_and_the_jobs_are_forked_without(daemon: Daemon) -> None:
    preloading(daemon, "there_is_no_such_library")
    daemon.job("one", "Imports", args=[LIBRARY])
    daemon.start()
    assert not daemon.status("one")["preloaded"]
    assert "cannot preload 'there_is_no_such_library'" in daemon.log
    until(lambda: daemon.rows("SELECT 1 FROM event WHERE kind = 'preload-failed'"), "the event")
    until(lambda: zygotes(daemon) == [], "there is no zygote")  # what was just forked ahead has no name yet


def test_a_preload_that_leaves_a_thread_is_reported(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "threading_library.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
    )
    preloading(daemon, "threading_library")
    daemon.job("one", "Imports", args=[LIBRARY])
    daemon.start(PYTHONPATH=str(tmp_path))
    assert not daemon.status("one")["preloaded"]
    assert "left threads running" in daemon.log


def launch_with_a_slow_preload(daemon: Daemon, folder: Path) -> None:
    (folder / "slow_library.py").write_text("import time\ntime.sleep(1000)\n")
    preloading(daemon, "slow_library")
    daemon.job("one", "Imports", args=[LIBRARY])
    daemon.launch(PYTHONPATH=str(folder))


def test_a_preload_that_takes_its_time_keeps_nobody_from_asking(daemon: Daemon, tmp_path: Path) -> None:
    launch_with_a_slow_preload(daemon, tmp_path)
    daemon.wait_serving()
    assert daemon.jobs()["one"]["state"] == "starting"
    preloading(daemon)
    daemon.reload()
    assert not daemon.status("one")["preloaded"]


def test_a_daemon_whose_preload_takes_its_time_ends_when_it_is_told_to(daemon: Daemon, tmp_path: Path) -> None:
    launch_with_a_slow_preload(daemon, tmp_path)
    daemon.wait_serving()
    assert daemon.stop() == 0


def test_a_reload_that_is_asked_for_before_the_daemon_serves_is_done(daemon: Daemon, tmp_path: Path) -> None:
    launch_with_a_slow_preload(daemon, tmp_path)
    daemon.wait_for(lambda: len(children(daemon.keeper_pid)) == 2, "it has read the settings and preloads")
    preloading(daemon)
    daemon.tell(signal.SIGHUP)
    daemon.wait_serving()
    assert not daemon.status("one")["preloaded"]


def test_reload_takes_up_a_changed_preload_and_touches_no_run(daemon: Daemon) -> None:
    daemon.job("one", "Imports", args=[LIBRARY])
    daemon.job("two", "Imports", args=[LIBRARY])
    daemon.start()
    old = daemon.status("one")["pid"]
    preloading(daemon, LIBRARY)
    daemon.reload()
    assert daemon.hb("one")["pid"] == old
    second = daemon.status("two")["pid"]
    daemon.get("/jobs/two/restart")
    daemon.wait_for(lambda: daemon.status("two")["pid"] != second, "the next run")
    assert daemon.status("two")["preloaded"]
    assert daemon.hb("one")["pid"] == old


def test_when_the_zygote_dies_its_runs_live_on_and_others_are_forked_plainly(daemon: Daemon) -> None:
    preloading(daemon, LIBRARY)
    daemon.job("one", "Imports", args=[LIBRARY])
    daemon.start()
    old = daemon.status("one")["pid"]
    (zygote,) = zygotes(daemon)
    os.kill(zygote, signal.SIGKILL)
    daemon.wait_for(lambda: "has died" in daemon.log, "the report")
    assert daemon.hb("one")["pid"] == old
    daemon.get("/jobs/one/restart")
    daemon.wait_for(lambda: daemon.status("one")["pid"] != old, "the next run")
    assert not daemon.status("one")["preloaded"]


def test_no_run_outlives_the_keeper_that_was_forked_from_the_zygote(daemon: Daemon) -> None:
    preloading(daemon, LIBRARY)
    daemon.job("one", "Imports", args=[LIBRARY])
    daemon.start()
    daemon.status("one")
    os.kill(daemon.keeper_pid, signal.SIGKILL)
    daemon.wait()
    until(lambda: not daemon.left(), "everything to be gone")


def test_what_a_killed_server_had_asked_the_zygote_for_never_runs_beside_what_the_next_one_asks_for(
    daemon: Daemon, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    (tmp_path / "slow_library.py").write_text(
        f"import os, time\nwhile not os.path.exists({str(go)!r}):\n    time.sleep(0.01)\n"
    )
    preloading(daemon, "slow_library")
    daemon.job("one", "Imports", args=["slow_library"])
    daemon.job("two", "Imports", args=["slow_library"])
    daemon.start(PYTHONPATH=str(tmp_path))
    killed = daemon.server_pid()
    os.kill(killed, signal.SIGKILL)
    daemon.wait_for(lambda: daemon.server_pid() not in (0, killed), "the next server")
    go.touch()
    for name in ("one", "two"):
        assert daemon.status(name)["preloaded"]
        assert daemon.hb(name)["pid"] == daemon.status(name)["pid"]
    until(lambda: len(zygotes(daemon)) == 1, "nothing but the zygote, the server and the two runs")
    until(lambda: daemon.rows("SELECT count(*) FROM run") == [(2,)], "two runs there were")
    assert daemon.rows("SELECT 1 FROM run WHERE reason = 'lost'") == []
