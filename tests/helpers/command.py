"""The installed command, as a person or a script runs it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import IO

from helpers.daemon import COMMAND
from helpers.waiting import DEADLINE_S, until

HARNESSD = COMMAND[0]

Ran = subprocess.CompletedProcess[str]


class Command:
    """Runs `harnessd` as a person does, who has said in the environment where the daemon is."""

    def __init__(self, folder: Path, **env: str) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HARNESSD_", "XDG_"))}
        self.env = kept | {"XDG_STATE_HOME": str(folder / "nowhere"), "TERM": "xterm", "COLUMNS": "100"} | env
        self.folder = folder

    def __call__(self, *args: object, stdout: int | IO[str] = subprocess.PIPE, **env: str) -> Ran:
        """Return what it printed and its exit code; both streams are pipes unless stdout is something else."""
        return subprocess.run(
            [HARNESSD, *map(str, args)],
            cwd=self.folder,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
        )

    def done(self, *args: object, **env: str) -> str:
        """Return its stdout; the test fails when its exit code is not 0."""
        ran = self(*args, **env)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr == ""
        return ran.stdout


class Going:
    """A `harnessd` that goes on until it is interrupted, with its output in a file or on a terminal of its own."""

    def __init__(self, command: Command, *args: str, terminal: bool = False, **env: str) -> None:
        self._ours, theirs = pty.openpty() if terminal else os.pipe()
        os.set_blocking(self._ours, False)
        self._seen = b""
        with open(command.folder / "stderr", "wb") as errors:
            self.process = subprocess.Popen(
                [HARNESSD, *args],
                cwd=command.folder,
                env=command.env | env,
                stdin=theirs if terminal else subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs if terminal else errors,
                start_new_session=True,
            )
        os.close(theirs)

    def seen(self) -> str:
        with suppress(BlockingIOError, OSError):  # nothing is there yet; the terminal's other end is gone
            while piece := os.read(self._ours, 65536):
                self._seen += piece
        return self._seen.decode(errors="replace")

    def until_seen(self, text: str) -> None:
        until(lambda: text in self.seen() or self.process.poll() is not None, f"it shows {text!r}")
        assert text in self.seen(), self.seen()

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)
        os.close(self._ours)
