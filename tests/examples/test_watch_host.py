from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harnessd import Command
from harnessd.examples.watch_host import CpuTicks, WatchHost, cpu_percent, parse_cpu, parse_memory_bytes
from harnessd.examples.watch_host import parse_network_bytes as network_bytes

STAT = "cpu  100 5 50 800 40 3 2 0 7 0\ncpu0 50 2 25 400 20 1 1 0 0 0\nintr 1 2 3\n"
MEMINFO = "MemTotal:       2048 kB\nMemAvailable:   1024 kB\nHugePages_Total:       3\nActive(anon):  7 kB\n"
NET_DEV = """Inter-|   Receive                  |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier
    lo: 999 9 0 0 0 0 0 0 999 9 0 0 0 0 0 0
  eth0: 1000 10 0 0 0 0 0 0 200 2 0 0 0 0 0 0
 wlan0:50 1 0 0 0 0 0 0 5 1 0 0 0 0 0 0
"""


def test_cpu_ticks_count_idle_and_iowait_as_not_busy() -> None:
    assert parse_cpu(STAT) == CpuTicks(busy=160, total=1000)


def test_cpu_ticks_of_this_host_grow_and_busy_is_at_most_all() -> None:
    first, second = (parse_cpu(Path("/proc/stat").read_text()) for _ in range(2))
    assert 0 < first.busy <= first.total <= second.total


def test_cpu_percent_is_the_busy_part_of_the_ticks_passed() -> None:
    assert cpu_percent(CpuTicks(100, 1000), CpuTicks(125, 1100)) == 25.0


def test_cpu_percent_is_none_when_no_tick_passed() -> None:
    assert cpu_percent(CpuTicks(100, 1000), CpuTicks(100, 1000)) is None


def test_cpu_percent_stays_within_0_and_100_when_counters_run_backwards() -> None:
    assert cpu_percent(CpuTicks(100, 1000), CpuTicks(90, 1010)) == 0.0


def test_memory_is_in_bytes_and_counts_without_a_unit_are_left_out() -> None:
    assert parse_memory_bytes(MEMINFO) == {"MemTotal": 2097152, "MemAvailable": 1048576, "Active(anon)": 7168}


def test_network_is_summed_over_all_interfaces_but_the_loopback() -> None:
    assert network_bytes(NET_DEV) == (1050, 205)


def test_status_shows_this_host(run_scripted: Any) -> None:
    job = run_scripted(WatchHost, [None])
    status = job.statuses[-1]
    assert (job.exit_code, len(job.statuses)) == (0, 2)
    assert json.loads(json.dumps(status)) == status
    assert status["disk_total_bytes"] == shutil.disk_usage("/").total
    assert 0 < status["memory_available_bytes"] <= status["memory_total_bytes"]
    assert status["processes"] >= 1
    assert len(status["load"]) == 3


def test_first_cpu_percent_is_the_mean_since_boot(run_scripted: Any) -> None:
    ticks = parse_cpu(Path("/proc/stat").read_text())
    reported = run_scripted(WatchHost, []).statuses[0]["cpu_percent"]
    assert reported == pytest.approx(100 * ticks.busy / ticks.total, abs=1)


def test_command_is_answered_with_what_was_seen_last(run_scripted: Any) -> None:
    seen, paused = run_scripted(WatchHost, [(Command.PAUSE, None)]).statuses
    assert paused == {**seen, "paused": True}


def test_it_looks_every_interval_and_waits_for_ever_while_paused(run_scripted: Any) -> None:
    script = [None, (Command.PAUSE, None), (Command.RESUME, None), None, (Command.STOP, None)]
    job = run_scripted(WatchHost, script, {"interval": 7})
    assert job.timeouts == [7.0, 7.0, None, 7.0, 7.0]
    assert [status["paused"] for status in job.statuses] == [False, False, True, False, False]


@pytest.mark.parametrize("bad", [{"interval": 0}, {"interval": "2"}, {"interval": True}, 3, None])
def test_invalid_interval_is_reported_and_ignored(run_scripted: Any, bad: object) -> None:
    status = run_scripted(WatchHost, [(Command.CONFIG, bad)], {"interval": 5}).statuses[-1]
    assert status["interval"] == 5.0
    assert status["config_error"]


def test_config_changes_the_interval(run_scripted: Any) -> None:
    job = run_scripted(WatchHost, [(Command.CONFIG, {"interval": 0.5})])
    assert job.timeouts == [2.0, 0.5]
    assert job.statuses[-1]["config_error"] is None
