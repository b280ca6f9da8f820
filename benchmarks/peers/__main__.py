"""harnessd side by side with what people pick today: the same worker, one machine, one run, in turns.

    python benchmarks/peers --tools FOLDER [--rows startup,memory,...] [--jobs 1,10,100,500] [--turns 3]

Prints Markdown tables with ratios to harnessd. The tools of pip and npm are installed into the folder; runit and s6 are
Debian's packages. A tool that is not there, or cannot do a row, says so in the table.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import host
import rows
from tools import TOOLS, Tool, provision


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare harnessd with other supervisors.")
    parser.add_argument("--tools", type=Path, default=Path(tempfile.gettempdir()) / "harnessd-peers")
    parser.add_argument("--rows", default=",".join(rows.ROWS), help=f"of {', '.join(rows.ROWS)}")
    parser.add_argument("--only", default="", help="names of tools, by commas")
    parser.add_argument("--jobs", default="1,10,100,500")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--idle-seconds", type=float, default=60.0)
    asked = parser.parse_args()
    provision(asked.tools)
    wanted = [name for name in asked.only.split(",") if name]
    present = [tool for tool in TOOLS if tool(asked.tools, Path()).find() and (not wanted or tool.name in wanted)]
    plan = rows.Plan([int(number) for number in asked.jobs.split(",")], asked.turns, asked.idle_seconds)
    print(f"{_machine()}\n\n{', '.join(_versions(present, asked.tools))}\n", flush=True)
    for missing in TOOLS:
        if missing not in present and not wanted:
            print(f"{missing.name}: not on this machine\n")
    for name in asked.rows.split(","):
        rows.ROWS[name](lambda tool: _running(tool, asked.tools), present, plan)


def _machine() -> str:
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")
    date = time.strftime("%Y-%m-%d")
    return f"{date}, {os.cpu_count()} cores ({model}), Linux {platform.release()}, Python {platform.python_version()}"


def _versions(tools: list[type[Tool]], folder: Path) -> Iterator[str]:
    for tool in tools:
        if " " not in tool.name:
            yield f"{tool.name} {tool(folder, Path.cwd()).version()}"


@contextmanager
def _running(tool: type[Tool], tools: Path) -> Iterator[Tool]:
    """Give the tool a folder of its own; whatever it has started is ended afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f"{tool.name.split()[0]}-"))
    one = tool(tools, folder)
    try:
        yield one
    finally:
        with suppress(Exception):
            one.stop()
            host.wait_for(lambda: not host.processes(one.token), 20, "its end", 0.05)
        host.end_all(one.token)
        with suppress(Exception):
            one._root and one._root.wait(5)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(f"/dev/shm/{one.token}", ignore_errors=True)


if __name__ == "__main__":
    main()
