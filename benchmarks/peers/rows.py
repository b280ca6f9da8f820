"""What is compared: each row starts the tools in turns, measures, and prints a table."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.request import Request, urlopen

import host
from tools import LOG_BYTES, PORT, WORKER, BareFork, Harnessd, HarnessdProgram, Tool
from worker import LINE_BYTES, STEADY_MB_A_SECOND, STEADY_S

Running = Callable[[type[Tool]], AbstractContextManager[Tool]]
STATUS_CLIENT = Path(__file__).with_name("status_client.py")
READY_S = 300.0
SETTLE_S = 3.0
CHATTER_MB = 60
SURVIVORS = 20
GROWTH = (10, 100, 1000)


@dataclass(frozen=True)
class Plan:
    jobs: list[int]
    turns: int
    idle_s: float


class Ready(NamedTuple):
    pid: int
    at: float


def ready(tool: Tool) -> dict[str, list[Ready]]:
    """Return who has said that it is ready, and when."""
    found: dict[str, list[Ready]] = defaultdict(list)
    try:
        lines = (tool.folder / "ready").read_text().splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        name, pid, at = line.split()
        found[name].append(Ready(int(pid), float(at)))
    return found


def start(tool: Tool, workers: Sequence[str]) -> float:
    """Start the tool. Return the seconds from the command until the last worker was ready."""
    tool.write(workers)
    began = time.monotonic()
    tool.start()
    host.wait_for(lambda: len(ready(tool)) >= len(workers), READY_S, f"{tool.name}: {len(workers)} ready", 0.02)
    return max(last[-1].at for last in ready(tool).values()) - began


def named(count: int, kind: str = "worker") -> list[str]:
    return [f"{kind}-{number:03d}" for number in range(count)]


def worker_pids(tool: Tool) -> set[int]:
    return {one.pid for several in ready(tool).values() for one in several if host.alive(one.pid)}


def daemon_pids(tool: Tool) -> set[int]:
    """Return the tool's processes; pm2's daemon has written its title over its environment."""
    return ({tool.root()} | set(host.processes(tool.token))) - worker_pids(tool)


def table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    print(f"### {title}\n\n| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for line in lines:
        print(f"| {' | '.join([*line, *[''] * (len(columns) + 1 - len(line))])} |")
    print(flush=True)


def ratio(value: float, ours: float) -> str:
    return f" ({value / ours:.1f}×)" if ours else ""


Cell = float | str


def shown(cells: dict[str, list[Cell]], unit: str, digits: int) -> list[list[str]]:
    """Return the lines of a table: each figure with its ratio to harnessd's."""
    ours = cells.get("harnessd", [])
    lines = []
    for name, values in cells.items():
        line = [name]
        for number, value in enumerate(values):
            if isinstance(value, str):
                line.append(value)
                continue
            base = ours[number] if number < len(ours) else 0.0
            against = ratio(value, base) if name != "harnessd" and isinstance(base, float) else ""
            line.append(f"{value:.{digits}f}{unit}{against}")
        lines.append(line)
    return lines


Found = TypeVar("Found")


def in_turns(
    running: Running, tools: Sequence[type[Tool]], turns: int, one: Callable[[Tool], Found]
) -> dict[str, list[Found] | str]:
    """Return what each tool's turns have found, or why it cannot; the tools take turns."""
    found: dict[str, list[Found]] = {tool.name: [] for tool in tools}
    failed: dict[str, str] = {}
    for _ in range(turns):
        for tool in tools:
            if tool.name not in failed:
                try:
                    with running(tool) as it:
                        found[tool.name].append(one(it))
                except Exception as error:  # whatever it is, the others are measured and its cell says why
                    failed[tool.name] = f"failed: {_why(error)}"
    return found | failed


def medians(found: dict[str, list[list[float]] | str]) -> dict[str, list[Cell]]:
    """Return the median of each figure."""
    return {
        name: [of] if isinstance(of, str) else [statistics.median(figures) for figures in zip(*of, strict=True)]
        for name, of in found.items()
    }


def _why(error: Exception) -> str:
    """Return the end of what was said, fit for a table."""
    said = getattr(error, "stderr", None) or str(error) or type(error).__name__
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    return text.strip().rpartition("\n")[2].replace("|", "/")[-100:]


def plain(tools: Sequence[type[Tool]]) -> list[type[Tool]]:
    """Leave out what differs from harnessd only when its keeper is killed."""
    return [tool for tool in tools if tool.name != "harnessd (keeper)"]


def startup(running: Running, tools: Sequence[type[Tool]], plan: Plan) -> None:
    cells: dict[str, list[Cell]] = defaultdict(list)
    for count in plan.jobs:
        found = in_turns(running, [*plain(tools), BareFork], plan.turns, partial(_started, count))
        for name, values in medians(found).items():
            cells[name] += values
    table("From the command to all ready", [f"{count} jobs" for count in plan.jobs], shown(cells, " s", 2))


def _started(count: int, it: Tool) -> list[float]:
    return [start(it, named(count))]


def memory(running: Running, tools: Sequence[type[Tool]], plan: Plan) -> None:
    """PSS and idle CPU of the same start, with 100 jobs; once, as it takes a minute."""
    count = 100

    def one(it: Tool) -> list[float]:
        start(it, named(count))
        time.sleep(SETTLE_S)
        daemon, workers = daemon_pids(it), worker_pids(it)
        ours, theirs = host.pss_bytes(daemon) / 1e6, host.pss_bytes(workers) / 1e6
        before = host.cpu_s(daemon)
        time.sleep(plan.idle_s)
        return [ours, theirs / count, ours + theirs, 100 * (host.cpu_s(daemon) - before) / plan.idle_s]

    cells = medians(in_turns(running, plain(tools), 1, one))
    sizes, idle = ({name: each[part] for name, each in cells.items()} for part in (slice(3), slice(-1, None)))
    table(f"Memory with {count} idle jobs (PSS)", ["daemon", "a job", "all"], shown(sizes, " MB", 2))
    table(f"CPU of the daemon in {plan.idle_s:g} idle seconds with {count} jobs", ["of a core"], shown(idle, " %", 2))


def crash(running: Running, tools: Sequence[type[Tool]], plan: Plan) -> None:
    def one(it: Tool) -> list[float]:
        start(it, named(10))
        times = []
        for name in named(5):
            time.sleep(2.5)  # up for long enough to count as up with each of them
            times.append(_killed(it, name))
        return [1000 * statistics.median(times)]

    cells = medians(in_turns(running, [*plain(tools), BareFork], plan.turns, one))
    table("SIGKILL of a job to ready again", ["median"], shown(cells, " ms", 1))


def _killed(it: Tool, name: str) -> float:
    """SIGKILL the worker. Return the seconds until it is ready again."""
    victim = ready(it)[name][-1]
    killed = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    host.wait_for(lambda: ready(it)[name][-1].pid != victim.pid, 60, "ready again")
    return ready(it)[name][-1].at - killed


def stop(running: Running, tools: Sequence[type[Tool]], plan: Plan) -> None:
    def one(it: Tool) -> list[float]:
        start(it, named(100))
        time.sleep(SETTLE_S)
        workers = worker_pids(it)
        began = time.monotonic()
        it.stop()
        host.wait_for(lambda: not any(map(host.alive, workers)), 120, "all stopped", 0.01)
        return [time.monotonic() - began]

    cells = medians(in_turns(running, plain(tools), plan.turns, one))
    table("Stop of 100 jobs and the daemon", ["to nothing left"], shown(cells, " s", 2))


def status(running: Running, tools: Sequence[type[Tool]], plan: Plan) -> None:
    columns = ["p50, 1 client", "p99, 1 client", "p50, 16 clients", "p99, 16 clients"]

    def one(it: Tool) -> list[float]:
        start(it, named(10))
        time.sleep(SETTLE_S)
        alone, many = _asked(it, 1), _asked(it, 16)
        figures = [figure for answer in (alone, many) for figure in _p50_p99_ms(answer["times"])]
        return figures + [len(answer["times"]) / answer["seconds"] for answer in (alone, many)]

    ours = [HarnessdProgram] if Harnessd in tools else []
    cells = medians(in_turns(running, [*plain(tools), *ours], plan.turns, one))
    times, rates = ({name: each[part] for name, each in cells.items()} for part in (slice(4), slice(-2, None)))
    table("Asking for the status of a job (pm2, runit, s6: by their program)", columns, shown(times, " ms", 2))
    table("The same, answers a second", ["1 client", "16 clients"], shown(rates, "", 0))


def _p50_p99_ms(times: Sequence[float]) -> tuple[float, float]:
    return 1000 * times[len(times) // 2], 1000 * times[int(len(times) * 0.99)]


def _asked(it: Tool, clients: int) -> dict[str, Any]:
    argv = [it.client_python(), str(STATUS_CLIENT), str(it.asked_by), str(clients), "5", it.address("worker-003")]
    answer: dict[str, Any] = json.loads(subprocess.run(argv, check=True, capture_output=True, timeout=120).stdout)
    return answer


def logs(running: Running, tools: Sequence[type[Tool]], plan: Plan) -> None:
    """Medians, and the bytes that were lost in all turns together."""
    found = in_turns(running, plain(tools), plan.turns, _logged)
    cells = medians(found)
    for tool in plain(tools):
        if not isinstance(turns := found[tool.name], str):
            lost = f"{sum(turn[2] for turn in turns):,}" + (f"; {tool.log_note}" if tool.log_note else "")
            cells[tool.name][1:] = [f"{cells[tool.name][1]:.0f}", lost]
    after = f"then {STEADY_MB_A_SECOND} MB/s for {STEADY_S} s"
    title = f"One job writes {CHATTER_MB} MB as fast as it goes, {after}, rotated every {LOG_BYTES // 1_000_000} MB"
    table(title, ["MB/s at first", "rotations", "bytes lost"], shown(cells, "", 1))


def _logged(it: Tool) -> list[float]:
    """Return MB a second of the first part, and the rotations and lost bytes of all of it."""
    worker = f"chatter-{CHATTER_MB}"
    start(it, [worker])
    host.wait_for((it.folder / "chattered").exists, 300, "written", 0.05)
    said = json.loads((it.folder / "chattered").read_text())
    time.sleep(SETTLE_S)
    it.stop()
    host.wait_for(it.stopped, 60, "stopped", 0.05)
    there = bytearray(said["lines"])
    for line in re.finditer(rb"^\d{99}$", it.logged(worker), re.MULTILINE):
        there[int(line[0])] = 1
    return [CHATTER_MB / said["seconds"], len(it.log_files(worker)) - 1, there.count(0) * LINE_BYTES]


def survival(running: Running, tools: Sequence[type[Tool]], plan: Plan) -> None:
    """SIGKILL of the daemon, and what its user finds afterwards of jobs that write and of those that do not."""
    columns = ["writing jobs undisturbed", "quiet ones", "running twice", "orphaned", "exit meanwhile known"]
    found = in_turns(running, tools, 1, _survived)
    lines = [[name, *([each] if isinstance(each, str) else each[0])] for name, each in found.items()]
    table("The daemon is killed with SIGKILL and started again", [*columns, "log lines lost"], lines)


def _survived(it: Tool) -> list[str]:
    kinds = named(SURVIVORS, "talker"), named(SURVIVORS, "quiet")
    names = [*kinds[0], *kinds[1]]
    start(it, [*names, "leaver-000"])
    time.sleep(SETTLE_S)
    before = {name: each[-1].pid for name, each in ready(it).items()}
    asked = it.folder / "leaver-000.exit"
    it.crash()
    asked.write_text("7")
    time.sleep(SETTLE_S)
    left = not asked.exists()
    asked.unlink(missing_ok=True)  # not for the one that comes after it
    undisturbed = [f"{sum(host.alive(before[name]) for name in kind)} of {len(kind)}" for kind in kinds]
    it.recover()
    _settle(it)
    now, its_own = ready(it), daemon_pids(it)
    alive = {name: [one.pid for one in now[name] if host.alive(one.pid)] for name in names}
    twice = sum(len(pids) > 1 for pids in alive.values())
    orphaned = sum(_parent(pid) not in its_own for pids in alive.values() for pid in pids)
    code = _known(it, before["leaver-000"], left)
    said = {name: _said(it, name) for name in kinds[0]}
    time.sleep(1.0)
    lost = sum(_lost(said[name], it.logged(name)) for name in kinds[0])
    return [*undisturbed, str(twice), str(orphaned), code, str(lost)]


def _settle(it: Tool) -> None:
    """Wait until no worker has been about to become ready for five seconds, and eight at least."""
    since, seen = time.monotonic() + SETTLE_S, -1
    latest = since + 120
    while since + 5 > time.monotonic() < latest:
        count = sum(map(len, ready(it).values()))
        begun = {pid for pid, line in host.processes(it.token).items() if WORKER.name in line}
        if count != seen or begun - worker_pids(it):
            since, seen = max(since, time.monotonic()), count
        time.sleep(0.2)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _known(it: Tool, pid: int, left: bool) -> str:
    """Say whether it knows the code with which the worker has left; one that could not was ended with the daemon."""
    try:
        code = it.exit_code("leaver-000", pid)
    except Exception as error:
        return f"no ({_why(error)})"
    if not left:
        return f"no: ended with the daemon, told as {code}"
    return "yes" if code == "7" else "no"


def _said(it: Tool, name: str) -> dict[int, int]:
    """Return how many lines the worker says that it has written, by the pid that wrote them."""
    return {int(path.suffix[1:]): int(path.read_text() or 0) for path in it.folder.glob(f"{name}.said.*")}


def _lost(said: dict[int, int], text: bytes) -> int:
    """Return how many of the lines are not in the log, wherever they are missing."""
    found: dict[int, set[int]] = defaultdict(set)
    for number, pid in re.findall(rb"said (\d+) by (\d+)\n", text):
        found[int(pid)].add(int(number))
    return sum(len(set(range(lines)) - found[pid]) for pid, lines in said.items())


def preload(running: Running, tools: Sequence[type[Tool]], plan: Plan) -> None:
    """A job that imports numpy and pandas, killed: harnessd with them preloaded."""

    class Preloaded(Harnessd):
        name = "harnessd"
        preload = ("numpy", "pandas")

    def one(it: Tool) -> list[float]:
        start(it, ["pandas-000"])
        time.sleep(4)
        return [1000 * _killed(it, "pandas-000")]

    title = "SIGKILL of a job that imports numpy and pandas to ready again (harnessd: preloaded)"
    if missing := [name for name in Preloaded.preload if find_spec(name) is None]:
        print(f"### {title}\n\ncannot: {missing[0]} is not installed\n", flush=True)
        return
    others = [tool for tool in plain(tools) if tool is not Harnessd]
    cells = medians(in_turns(running, [Preloaded, *others], plan.turns, one))
    table(title, ["median"], shown(cells, " ms", 1))


def growth(running: Running, tools: Sequence[type[Tool]], plan: Plan) -> None:
    """What harnessd's own costs come to with more jobs; the last figure is of a reload that finds nothing changed."""
    columns = ["hb p50, ms", "hb p99, ms", "daemon's idle CPU, % of a core", "daemon's PSS, MB", "reload, ms"]
    lines = []
    for count in GROWTH:
        figures = medians(in_turns(running, [Harnessd], 1, partial(_grown, count, plan.idle_s)))["harnessd"]
        lines.append([f"{count} jobs", *(each if isinstance(each, str) else f"{each:.2f}" for each in figures)])
    table("How harnessd's own costs grow with the jobs", columns, lines)


def _grown(count: int, idle_s: float, it: Tool) -> list[float]:
    start(it, named(count))
    time.sleep(SETTLE_S)
    hb = _p50_p99_ms(_asked(it, 1)["times"])
    daemon = daemon_pids(it)
    before = host.cpu_s(daemon)
    time.sleep(idle_s)
    idle = 100 * (host.cpu_s(daemon) - before) / idle_s
    began = time.monotonic()
    urlopen(Request(f"http://127.0.0.1:{PORT}/reload", method="POST")).read()
    reloaded_ms = 1000 * (time.monotonic() - began)
    return [*hb, idle, host.pss_bytes(daemon) / 1e6, reloaded_ms]


ROWS: dict[str, Callable[[Running, Sequence[type[Tool]], Plan], None]] = {
    "startup": startup,
    "memory": memory,
    "crash": crash,
    "stop": stop,
    "status": status,
    "logs": logs,
    "survival": survival,
    "preload": preload,
    "growth": growth,
}
