"""Jobs for the tests of the daemon, named by path in their job files. Standard library and harnessd only."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from harnessd import Command, Cradle


class Idle(Cradle):
    """Waits for commands and says what it was told; ends at STOP."""

    def run(self, *args: str) -> int:
        told: list[str] = []
        self.say(told)
        while True:
            message = self.get_msg(timeout=None)
            assert message
            told.append(message["cmd"])
            self.say(told)
            if message["cmd"] == Command.STOP:
                return 0

    def say(self, told: list[str]) -> None:
        self.set_status({"pid": os.getpid(), "told": told, "config": self.get_config(), "args": sys.argv[1:]})


class Late(Idle):
    """Begins to read its commands when the file that is named exists."""

    def run(self, *args: str) -> int:
        while not os.path.exists(args[0]):
            time.sleep(0.01)
        return super().run()


class Deaf(Cradle):
    """Never looks at its mailbox."""

    def run(self, *args: str) -> None:
        self.set_status({"pid": os.getpid()})
        while True:
            time.sleep(3600)


class Stubborn(Cradle):
    """Ignores SIGTERM."""

    def run(self, *args: str) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.set_status({"pid": os.getpid()})
        while True:
            time.sleep(3600)


class Waits(Cradle):
    """Reports once and ends, with the exit code given, when the file that is named exists."""

    def run(self, *args: str) -> int:
        path, code = args
        self.set_status({"pid": os.getpid()})
        while not os.path.exists(path):
            time.sleep(0.01)
        return int(code)


class Ends(Cradle):
    """Ends with the exit code given, after the seconds given."""

    def run(self, *args: str) -> int:
        code, after_s = args
        time.sleep(float(after_s))
        return int(code)


class Notes(Cradle):
    """Appends its pid to a file and ends, with an exit code that follows from the pid."""

    def run(self, *args: str) -> int:
        path, after_s = args
        time.sleep(float(after_s))
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{os.getpid()}\n".encode())
        return os.getpid() % 100 + 1


class Segfaults(Cradle):
    def run(self, *args: str) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self.set_status({"pid": os.getpid()})
        ctypes.string_at(0)


class KillsItself(Cradle):
    """Ends as the kernel's OOM killer ends a process."""

    def run(self, *args: str) -> None:
        self.set_status({"pid": os.getpid()})
        os.kill(os.getpid(), signal.SIGKILL)


class Forks(Cradle):
    """Leaves behind: a child that left the session, a daemonised grandchild, one without environment, a deaf one."""

    def run(self, *args: str) -> int:
        deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"
        started = [
            subprocess.Popen(
                [sys.executable, "-c", f"{deaf}; time.sleep(3600)"], stdout=subprocess.PIPE, start_new_session=True
            ),
            subprocess.Popen(["env", "-i", "/bin/sh", "-c", "echo up; exec sleep 3600"], stdout=subprocess.PIPE),
        ]
        pids = [process.pid for process in started]
        for process in started:
            assert process.stdout
            process.stdout.readline()
        pids.append(daemonised())
        self.set_status({"pid": os.getpid(), "pids": pids})
        message: Any = None
        while "stay" in args and not (message and message["cmd"] == Command.STOP):
            message = self.get_msg(timeout=None)
        return 0


def daemonised() -> int:
    """Return the pid of a process that has done all that a daemon does to get away."""
    reading, writing = os.pipe()
    if (first := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            os.chdir("/")
            os.write(writing, str(os.getpid()).encode())
            os.closerange(0, 10)
            time.sleep(3600)
        os._exit(0)
    os.waitpid(first, 0)
    return int(os.read(reading, 32))


class Fills(Cradle):
    """Writes more to stdout than any pipe holds."""

    def run(self, *args: str) -> None:
        line = "x" * 1023 + "\n"
        for _ in range(20_000):
            sys.stdout.write(line)
        self.set_status({"pid": os.getpid(), "written": 20_000})
        while True:
            self.get_msg(timeout=None)


class Floods(Cradle):
    """Reports as fast as it can, so many times, and ends."""

    def run(self, *args: str) -> None:
        for number in range(int(args[0])):
            self.set_status({"number": number})


class LosesCwd(Cradle):
    def run(self, *args: str) -> None:
        shutil.rmtree(os.getcwd())
        self.set_status({"pid": os.getpid(), "gone": True})
        while True:
            self.get_msg(timeout=None)


class Looks(Cradle):
    """Reports how its process is made."""

    def run(self, *args: str) -> None:
        umask = os.umask(0)
        os.umask(umask)
        self.set_status(
            {
                "args": sys.argv[1:],
                "cwd": os.getcwd(),
                "umask": umask,
                "nice": os.nice(0),
                "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
                "core": resource.getrlimit(resource.RLIMIT_CORE),
                "env": dict(os.environ),
                "ids": [os.getuid(), os.geteuid(), os.getgid(), os.getegid()],
                "groups": sorted(os.getgroups()),
                "executable": sys.executable,
                "readable": [path for path in args if _readable(path)],
            }
        )
        while True:
            self.get_msg(timeout=None)


def _readable(path: str) -> bool:
    try:
        with open(path, "rb"):
            return True
    except IsADirectoryError:
        return True
    except OSError:
        return False


class Counts(Cradle):
    """Says 1, 2, 3, ... without a pause worth the name, and STOP ends it; the last number goes into a file."""

    def run(self, *args: str) -> int:
        number = 0
        while self.get_msg() is None:
            number += 1
            while not self.set_status({"number": number}):
                time.sleep(0.01)
            time.sleep(0.0005)
        with open(args[0], "w") as file:
            file.write(str(number))
        return 0


class Imports(Cradle):
    """Says whether a module was there before it was imported."""

    def run(self, *args: str) -> int:
        self.set_status({"pid": os.getpid(), "preloaded": args[0] in sys.modules, "parent": os.getppid()})
        while self.get_msg(timeout=None)["cmd"] != Command.STOP:  # type: ignore[index]
            pass
        return 0
