"""Lines a job writes in a second while its log is rotated under it, beside a bare file, and whether one is lost.

    python benchmarks/logs.py [seconds] [directory]

The job is a process of its own that appends numbered lines of 100 bytes, one write(2) each, as fast as it goes. The
log is looked at every second, as the server does. Afterwards every line is read back through the rotated files.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

from harnessd.server.cursor import Cursor
from harnessd.server.jobspec import LogSettings
from harnessd.server.logs import Logs

LINE_BYTES = 100
WRITER = """
import os, sys, time
write, fd = os.write, os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
tail = b" " * 84 + b"\\n"
begin = now = time.perf_counter()
end, longest, number = begin + float(sys.argv[2]), 0.0, 0
while now < end:
    write(fd, b"%015d" % number + tail)
    after = time.perf_counter()
    longest = max(longest, after - now)
    now = after
    number += 1
print(number, now - begin, longest)
"""


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    where = sys.argv[2] if len(sys.argv) > 2 else None
    settings = {"keep": 10_000, "max_bytes": 10_000_000}
    bare = measure("a bare file", None, seconds, where)
    for name, log in (
        ("rotated every 10 MB", LogSettings(compress=False, **settings)),
        ("rotated and compressed", LogSettings(**settings)),
    ):
        rate = measure(name, log, seconds, where)
        print(f"{'':24} {rate / bare:8.2f} of bare")


def measure(name: str, log: LogSettings | None, seconds: float, where: str | None) -> float:
    """Return bytes a second."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        path = Path(folder, "job.log")
        lines, spent, longest = asyncio.run(write(path, log, seconds))
        rotated = len(list(path.parent.glob("job.log.0*")))
        lost = lines * LINE_BYTES - intact(Logs(path.parent), str(path))
    rate = lines * LINE_BYTES / spent
    print(f"{name:24} {rate / 1e6:8.1f} MB/s   {lines / spent:10,.0f} lines/s   longest write {longest * 1e3:7.2f} ms")
    print(f"{'':24} {rotated:8} rotated files, {lost} bytes lost")
    return rate


def start(path: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)


async def write(path: Path, settings: LogSettings | None, seconds: float) -> tuple[int, float, float]:
    """Return lines written, seconds spent, and those of the longest write."""
    writer = start(path, seconds)
    logs = Logs(path.parent)
    while writer.poll() is None:
        if settings:
            logs.tick([("job", settings)])
        await asyncio.sleep(1.0 if settings else 0.1)
    await logs.close()
    number, spent, longest = writer.communicate()[0].split()
    return int(number), float(spent), float(longest)


def intact(logs: Logs, path: str) -> int:
    """Return how many bytes there are from the first line on, with every line in its place."""
    cursor, number, rest = Cursor(logs.log(path), 0), 0, b""
    while data := cursor.read(1 << 20):
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if line != b"%015d" % number + b" " * 84:
                return number * LINE_BYTES
            number += 1
    return number * LINE_BYTES + len(rest)


if __name__ == "__main__":
    main()
