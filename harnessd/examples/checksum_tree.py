"""Hashes every file of Python's own standard library, or of the directory given as `--root`, and then ends.

The final `digest` is that of the list which `sha256sum` prints for the same files in the order of their paths, so
`sha256sum` can check it. CONFIG takes `pause_ms`, the pause after each file in milliseconds.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import stat
import sysconfig
import time
from pathlib import Path

from harnessd import Command, Cradle

NOT_THE_LIBRARY = {"__pycache__", "site-packages", "dist-packages"}
REPORT_SECONDS = 0.2
MOST_PAUSE_MS = 60_000


def list_files(root: Path) -> list[tuple[str, int]]:
    """(path below `root`, size in bytes) of every regular file, in the order of their paths."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_THE_LIBRARY]
        for path in (Path(folder, name) for name in names):
            try:
                found_stat = path.stat()
            except OSError:  # a dangling link, or it vanished: there is nothing to hash
                continue
            if stat.S_ISREG(found_stat.st_mode):
                found.append((path.relative_to(root).as_posix(), found_stat.st_size))
    return sorted(found)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hashes every file of a directory.")
    parser.add_argument("--root", type=Path, default=Path(sysconfig.get_path("stdlib")))
    return parser.parse_args()


class ChecksumTree(Cradle):
    def run(self, *args: str) -> int:
        root: Path = parse_arguments().root
        self.pause_ms = 0.0
        self.config_error = self.change(self.get_config())
        self.paused = False
        self.files = list_files(root)
        self.files_done = self.files_skipped = self.bytes_done = 0
        self.hashing_s = 0.0
        self.current: str | None = None
        self.digest = hashlib.sha256()
        reported_at = 0.0
        for name, _ in self.files:
            self.current = name
            self.add(root, name)
            if time.monotonic() - reported_at >= REPORT_SECONDS:
                self.report()
                reported_at = time.monotonic()
            if not self.may_go_on():
                return 0
        self.current = None
        self.report()
        return 0

    def add(self, root: Path, name: str) -> None:
        began = time.perf_counter()
        try:
            with (root / name).open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                self.bytes_done += file.tell()
        except OSError:  # it vanished since it was listed, or is not ours to read: the status says how many did
            self.files_skipped += 1
            return
        self.digest.update(f"{sha256}  {name}\n".encode(errors="surrogateescape"))
        self.files_done += 1
        self.hashing_s += time.perf_counter() - began

    def may_go_on(self) -> bool:
        """Waits `pause_ms`, or as long as it is paused, and obeys what comes meanwhile; False after a STOP."""
        while msg := self.get_msg(timeout=None if self.paused else self.pause_ms / 1000):
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
        """Takes `pause_ms` from `wanted` if it is valid; returns what is wrong with it, or None."""
        if not isinstance(wanted, dict):
            return f"settings must be an object, not {wanted!r}"
        pause_ms = wanted.get("pause_ms", self.pause_ms)
        if isinstance(pause_ms, bool) or not isinstance(pause_ms, (int, float)) or not 0 <= pause_ms <= MOST_PAUSE_MS:
            return f"pause_ms must be a number from 0 to {MOST_PAUSE_MS}, not {pause_ms!r}"
        self.pause_ms = float(pause_ms)
        return None

    def report(self) -> None:
        self.set_status(
            status={
                "files_done": self.files_done,
                "files_skipped": self.files_skipped,
                "files_total": len(self.files),
                "bytes_done": self.bytes_done,
                "bytes_total": sum(size for _, size in self.files),
                "mb_per_s": round(self.bytes_done / self.hashing_s / 1e6, 1) if self.hashing_s else None,
                "current": self.current,
                "digest": self.digest.hexdigest(),
                "finished": self.current is None,
                "paused": self.paused,
                "config_error": self.config_error,
            }
        )
