"""Reports what this host is doing: load, CPU, memory, disk, network and processes, from `/proc` (see proc(5)).

The first `cpu_percent` is the mean since boot, each later one that since the look before. CONFIG takes `interval`, the
seconds between two looks.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from harnessd import Command, Cradle

PROC = Path("/proc")
LONGEST_INTERVAL_SECONDS = 3600


@dataclass(frozen=True)
class CpuTicks:
    busy: int
    total: int


def parse_cpu(stat: str) -> CpuTicks:
    """The ticks of all CPUs since boot, from the text of `/proc/stat`."""
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return CpuTicks(busy, busy + idle + iowait)


def cpu_percent(before: CpuTicks, after: CpuTicks) -> float | None:
    """How busy all CPUs together were, 0 to 100; None if no tick has passed."""
    total = after.total - before.total
    return round(min(100.0, max(0.0, 100 * (after.busy - before.busy) / total)), 1) if total > 0 else None


def parse_memory_bytes(meminfo: str) -> dict[str, int]:
    """Every field of `/proc/meminfo` that is in kB, in bytes."""
    fields = (line.split() for line in meminfo.splitlines())
    return {name.rstrip(":"): int(unit[0]) * 1024 for name, *unit in fields if unit[1:] == ["kB"]}


def parse_network_bytes(net_dev: str) -> tuple[int, int]:
    """(received, sent) of all interfaces but the loopback since boot, from the text of `/proc/net/dev`."""
    received = sent = 0
    for line in net_dev.splitlines()[2:]:
        name, _, counters = line.partition(":")
        if name.strip() != "lo":
            received += int(counters.split()[0])
            sent += int(counters.split()[8])
    return received, sent


def look() -> dict[str, object]:
    memory_bytes = parse_memory_bytes((PROC / "meminfo").read_text())
    received_bytes, sent_bytes = parse_network_bytes((PROC / "net/dev").read_text())
    disk = shutil.disk_usage("/")
    return {
        "load": [round(average, 2) for average in os.getloadavg()],
        "cpus": os.cpu_count(),
        "memory_total_bytes": memory_bytes["MemTotal"],
        "memory_available_bytes": memory_bytes["MemAvailable"],
        "disk_total_bytes": disk.total,
        "disk_free_bytes": disk.free,
        "network_received_bytes": received_bytes,
        "network_sent_bytes": sent_bytes,
        "processes": sum(entry.name.isdigit() for entry in PROC.iterdir()),
    }


class WatchHost(Cradle):
    def run(self, *args: str) -> int:
        self.interval = 2.0
        self.config_error = self.change(self.get_config())
        self.paused = False
        ticks = CpuTicks(0, 0)
        while True:
            before, ticks = ticks, parse_cpu((PROC / "stat").read_text())
            self.seen = {"cpu_percent": cpu_percent(before, ticks), **look()}
            self.report()
            if not self.wait_for_next_look():
                return 0

    def wait_for_next_look(self) -> bool:
        """Waits one interval, or as long as it is paused, and obeys what comes meanwhile; False after a STOP."""
        while msg := self.get_msg(timeout=None if self.paused else self.interval):
            match msg["cmd"]:
                case Command.STOP:
                    return False
                case Command.PAUSE:
                    self.paused = True
                case Command.START | Command.RESUME:
                    self.paused = False
                case Command.CONFIG:
                    self.config_error = self.change(msg["data"])
            self.report()
        return True

    def change(self, wanted: object) -> str | None:
        """Takes `interval` from `wanted` if it is valid; returns what is wrong with it, or None."""
        if not isinstance(wanted, dict):
            return f"settings must be an object, not {wanted!r}"
        value = wanted.get("interval", self.interval)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LONGEST_INTERVAL_SECONDS:
            return f"interval must be a number above 0 and at most {LONGEST_INTERVAL_SECONDS}, not {value!r}"
        self.interval = float(value)
        return None

    def report(self) -> None:
        about_itself = {"interval": self.interval, "paused": self.paused, "config_error": self.config_error}
        self.set_status(status=self.seen | about_itself)
