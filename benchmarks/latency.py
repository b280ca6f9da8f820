"""How long a command takes from its POST to the job's get_msg(), how many heartbeats a second one core answers, and how
soon the API answers again when the server is killed.

    python benchmarks/latency.py

A real daemon serves a config directory made for this. The job notes the monotonic time at which get_msg(timeout=None)
returned, the client the time just before it sent: one clock for all processes. For the heartbeats the server is held
to one core and the clients, one process over raw sockets, to the others; an empty uvicorn takes turns with it. A
killed server is followed by one that has all cores; it is asked over a connection made after the kill.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import re
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMANDS = 300
TURNS = 3
TURN_S = 1.5
CLIENTS = (1, 16)
KILLS = 7
SETTLED_S = 12.0  # one that has lived for ten seconds is followed by the next after 0.1 s, not later
CORES = sorted(os.sched_getaffinity(0))

JOB = """
import os, struct, time
from harnessd import Cradle

class Echo(Cradle):
    def run(self, path):
        answers = os.open(path, os.O_WRONLY)
        while True:
            self.get_msg(timeout=None)
            os.write(answers, struct.pack("d", time.monotonic()))
"""

EMPTY = """
import socket, sys, uvicorn, uvloop

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})

config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, proxy_headers=False, ws="none",
                        http="httptools", loop="uvloop")
uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
"""


def main() -> None:
    if sys.argv[1:2] == ["clients"]:
        load(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
        return
    print(f"\n{machine()}\n")
    with tempfile.TemporaryDirectory(prefix="harnessd-") as name:
        folder = Path(name)
        os.mkfifo(folder / "answers")
        with daemon(folder) as port, empty_server(folder) as (empty_port, empty_pid):
            report_commands(folder / "answers", port)
            os.sched_setaffinity(server_pid(port), CORES[:1])
            os.sched_setaffinity(empty_pid, CORES[:1])
            report_heartbeats({"hb": (port, "/hb"), "empty": (empty_port, "/")})
            report_kills(port)


def machine() -> str:
    """Return what the figures were measured on, and when."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    when = time.strftime("%Y-%m-%d %H:%M")
    return f"{cpu}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, {when}"


# the servers


@contextmanager
def daemon(folder: Path) -> Iterator[int]:
    """Give the port of a daemon with the one job."""
    port = free_port()
    config = folder / "config"
    (config / "jobs").mkdir(parents=True)
    (config / "harnessd.toml").write_text(
        f'state_dir = "{folder}/state"\nruntime_dir = "{folder}/run"\n[http]\nhost = "127.0.0.1"\nport = {port}\n'
    )
    (config / "echo.py").write_text(JOB)
    (config / "jobs" / "echo.toml").write_text(f'entrypoint = "../echo.py:Echo"\nargs = ["{folder}/answers"]\n')
    program = "from harnessd.cli import main; main()"
    with ended([sys.executable, "-c", program, "serve", str(config)], folder / "daemon.log"):
        get_when_up(port, "/healthz")
        yield port


@contextmanager
def empty_server(folder: Path) -> Iterator[tuple[int, int]]:
    """Give the port and pid of a uvicorn that answers two bytes to anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
        port = listening.getsockname()[1]
        argv = [sys.executable, "-c", EMPTY, str(listening.fileno())]
        with ended(argv, folder / "empty.log", pass_fds=[listening.fileno()]) as process:
            get_when_up(port, "/")
            yield port, process.pid


@contextmanager
def ended(argv: list[str], log: Path, pass_fds: list[int] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, pass_fds=pass_fds or ())
    try:
        yield process
    except BaseException:
        sys.stderr.write(log.read_text())
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=15)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def server_pid(port: int) -> int:
    return int(json.loads(get_when_up(port, "/healthz"))["server_pid"])


def get_when_up(port: int, path: str) -> bytes:
    deadline = time.monotonic() + 15
    while True:
        try:
            return exchange(http.client.HTTPConnection("127.0.0.1", port), "GET", path)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def exchange(connection: http.client.HTTPConnection, method: str, path: str) -> bytes:
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    if response.status >= 300:
        raise SystemExit(f"{method} {path}: {response.status} {body!r}")
    return body


# commands


def report_commands(answers: Path, port: int) -> None:
    """Print how long a POST takes to wake the job, over one connection and over a fresh one each time."""
    print("| from just before the POST until get_msg() has returned | p50 ms | p99 ms | to hold |")
    print("|---|---:|---:|---:|")
    fd = os.open(answers, os.O_RDWR)
    kept = http.client.HTTPConnection("127.0.0.1", port)
    ways: dict[str, Callable[[], http.client.HTTPConnection]] = {
        "one kept connection": lambda: kept,
        "a fresh connection each time, as curl": lambda: http.client.HTTPConnection("127.0.0.1", port),
    }
    for label, connection in ways.items():
        spent_ms = [command_ms(fd, connection()) for _ in range(COMMANDS + 20)][20:]
        print(f"| {label} | {statistics.median(spent_ms):.2f} | {percentile(spent_ms, 99):.2f} | 2 (p50) |")
    kept.close()
    os.close(fd)


def command_ms(answers: int, connection: http.client.HTTPConnection) -> float:
    began = time.monotonic()
    exchange(connection, "POST", "/start")
    if not select.select([answers], [], [], 10)[0]:
        raise SystemExit("the job did not answer within 10 s")
    (woke,) = struct.unpack("d", os.read(answers, 8))
    return float(woke - began) * 1000


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


# heartbeats


def report_heartbeats(targets: dict[str, tuple[int, str]]) -> None:
    """Print requests a second and latency of each target, beside those of the empty application."""
    print("\n| clients | what | requests/s | p50 ms | p99 ms | of an empty uvicorn | to hold |")
    print("|---:|---|---:|---:|---:|---:|---|")
    for clients in CLIENTS:
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in targets}
        for _ in range(TURNS):
            for name, (port, path) in targets.items():
                turns[name].append(clients_process(port, path, clients))
        found = {name: {key: statistics.median(one[key] for one in of) for key in of[0]} for name, of in turns.items()}
        for name, figures in found.items():
            ratio = figures["rate"] / found["empty"]["rate"]
            to_hold = "6,000/s; p99 10 ms" if (name, clients) == ("hb", 16) else ""
            rate, p50, p99 = (figures[key] for key in ("rate", "p50_ms", "p99_ms"))
            print(f"| {clients} | {name} | {rate:,.0f} | {p50:.2f} | {p99:.2f} | {ratio:.2f} | {to_hold} |")


def report_kills(port: int) -> None:
    """Print how long after SIGKILL of the server the next one answers."""
    spent_s = []
    for _ in range(KILLS):
        time.sleep(SETTLED_S)
        pid = server_pid(port)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        while server_pid(port) == pid:
            pass
        spent_s.append(time.monotonic() - began)
    print("\n| from SIGKILL of the server until the API answers | median s | worst s | to hold |")
    print("|---|---:|---:|---:|")
    print(f"| {KILLS} kills | {statistics.median(spent_s):.2f} | {max(spent_s):.2f} | 0.8 |")


def clients_process(port: int, path: str, clients: int) -> dict[str, float]:
    argv = [sys.executable, __file__, "clients", str(port), path, str(clients)]
    ran = subprocess.run(argv, stdout=subprocess.PIPE, check=True, timeout=60)
    found: dict[str, float] = json.loads(ran.stdout)
    return found


def load(port: int, path: str, clients: int) -> None:
    """Be the clients: each asks again as soon as it is answered. Prints the figures as JSON."""
    if len(CORES) > 1:
        os.sched_setaffinity(0, CORES[1:])
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(clients)]
    epoll = select.epoll()
    asked: dict[int, float] = {}
    by_fd: dict[int, tuple[socket.socket, bytearray]] = {}
    for one in sockets:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        epoll.register(one, select.EPOLLIN)
        by_fd[one.fileno()] = (one, bytearray())
    spent_s: list[float] = []
    began = time.perf_counter()
    warm, until = began + 0.2, began + 0.2 + TURN_S
    for one in sockets:
        asked[one.fileno()] = time.perf_counter()
        one.sendall(request)
    while (now := time.perf_counter()) < until:
        for fd, _ in epoll.poll(1):
            one, buffer = by_fd[fd]
            buffer += one.recv(65536)
            if not is_whole(buffer):
                continue
            buffer.clear()
            now = time.perf_counter()
            if asked[fd] >= warm:
                spent_s.append(now - asked[fd])
            asked[fd] = now
            one.sendall(request)
    milliseconds = [spent * 1000 for spent in spent_s]
    figures: dict[str, Any] = {"rate": len(spent_s) / TURN_S, "p50_ms": statistics.median(milliseconds)}
    print(json.dumps({**figures, "p99_ms": percentile(milliseconds, 99)}))


_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.IGNORECASE)


def is_whole(answer: bytearray) -> bool:
    """Return whether all of the answer is there; an answer that is no 200 ends the benchmark."""
    if not answer.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"unexpected answer: {bytes(answer[:200])!r}")
    head = answer.find(b"\r\n\r\n")
    found = _LENGTH.search(answer, 0, head + 2) if head >= 0 else None
    return found is not None and len(answer) >= head + 4 + int(found[1])


if __name__ == "__main__":
    main()
