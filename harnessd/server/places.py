"""Where the daemon keeps its files: what lasts, and what lives in memory."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from harnessd import tree
from harnessd.errors import AlreadyRunning, HarnessError

DATABASE_NAME = "harnessd.db"  # in the state directory, where no other database is configured
_MEMORY = frozenset({"tmpfs", "ramfs"})
_SCRIPT = "script-"
_LEAVE_S = 8.0  # a server needs five when clients do not let go
_END_S = 2.0  # how long one that is killed may take to be gone


def state_dir(configured: Path | None) -> Path:
    """Return the directory of what lasts: as configured, /var/lib/harnessd as root, else $XDG_STATE_HOME/harnessd."""
    if configured:
        return configured
    if os.geteuid() == 0:
        return Path("/var/lib/harnessd")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "harnessd"


def runtime_dir(configured: Path | None) -> Path:
    """Return the directory of the journals: as configured, else the first usual one that lies in memory."""
    if configured:
        return configured
    usual = [Path("/run/harnessd")] if os.geteuid() == 0 else []
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        usual.append(Path(runtime) / "harnessd")
    in_memory = (path for path in usual if os.access(path.parent, os.W_OK) and _lies_in_memory(path.parent))
    return next(in_memory, Path(f"/dev/shm/harnessd-{os.geteuid()}"))


def _lies_in_memory(path: Path) -> bool:
    best, found = "", ""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            mount, _, device = line.partition(" - ")
            point = mount.split()[4]
            if len(point) >= len(best) and os.path.commonpath([point, path.resolve()]) == point:
                best, found = point, device.split()[0]
    return found in _MEMORY


def journals(where: str, runtime: Path, state: Path) -> Path:
    """Make and return the folder of the journals of whoever holds the state directory: in memory, or on "disk"."""
    folder = state / "journal" if where == "disk" else of_daemon(runtime, state)
    if folder.parent != state:
        make_private(folder.parent, traversable=True)
    make_private(folder, traversable=True)
    return folder


def journal_name(run: int, mark: int, job: str) -> str:
    """Return the name of a run's journal: it says whose it is, should nothing else have been stored of the run."""
    return f"{run}.{mark:x}.{job}.jsonl"


def journal_of(folder: Path, run: int) -> Path:
    """Return the run's journal in the folder."""
    return journals_of(folder, (run,))[run]


def journals_of(folder: Path, runs: Collection[int]) -> dict[int, Path]:
    """Return the journal of each of the runs; the folder is listed once for all, and for none not at all."""
    found = {run: path for run, _, _, path in journals_in(folder)} if runs else {}
    return {run: found.get(run, folder / f"{run}.jsonl") for run in runs}


def journals_in(folder: Path) -> Iterator[tuple[int, int, str, Path]]:
    """Yield the run, the mark and the job of each journal in the folder, and its path."""
    for path in folder.glob("*.jsonl"):
        run, _, rest = path.name.removesuffix(".jsonl").partition(".")
        mark, _, job = rest.partition(".")
        with suppress(ValueError):  # a file of somebody else's making
            yield int(run), int(mark, 16), job, path


def of_daemon(runtime: Path, state: Path) -> Path:
    """Return the daemon's own part of the runtime directory: two daemons of one user have two state directories."""
    return runtime / hashlib.blake2s(os.fsencode(state.resolve()), digest_size=8).hexdigest()


def of_script(runtime: Path) -> tuple[Path, int]:
    """Return a script's own part of the runtime directory, and the lock on it; what dead scripts left is removed.

    Scripts that start and end at once leave each other's alone: no name is used twice, who removes a folder holds its
    lock meanwhile, and one that was removed before its maker could lock it is made anew.
    """
    make_private(runtime, traversable=True)
    for left in runtime.glob(f"{_SCRIPT}*"):
        with suppress(AlreadyRunning, OSError):  # it is in use, or being removed by another
            held = lock(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{_SCRIPT}{os.getpid()}-", dir=runtime))
        except OSError as error:
            raise HarnessError(f"cannot use {runtime}: {error.strerror}") from error
        with suppress(AlreadyRunning, FileNotFoundError):
            held = lock(folder)
            make_private(folder, traversable=True)
            return folder, held


def make_private(folder: Path, *, traversable: bool = False) -> None:
    """Make the directory ours alone; with `traversable`, jobs of other users reach the files in it that are theirs.

    Raises HarnessError when it is somebody else's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
            raise HarnessError(f"cannot use {folder}: it belongs to another user")
        wanted = 0o711 if traversable else 0o700
        if stat.S_IMODE(found.st_mode) != wanted and found.st_uid == os.geteuid():
            folder.chmod(wanted)
    except OSError as error:
        raise HarnessError(f"cannot use {folder}: {error.strerror}") from error


def lock(folder: Path) -> int:
    """Lock the directory. Return the descriptor that holds the lock; raise AlreadyRunning, naming who has it.

    The server of a keeper that was killed is waited for: it stores what it knows, and leaves. One that hangs is ended.
    """
    try:
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        fd = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)  # a lock needs no writing
    give_up_at = time.monotonic() + _LEAVE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            (pid, ticks), *servers = _signers(fd) or [(0, 0)]
            late_s = time.monotonic() - give_up_at
            if not tree.is_over(pid, ticks) or late_s > (_END_S if servers else 0):
                os.close(fd)
                who = f"the harnessd with pid {pid}" if pid else "another harnessd"
                raise AlreadyRunning(f"cannot use {folder}: {who} holds it") from None
            if late_s > 0:
                _end_hanging(servers)
            time.sleep(0.02)
        else:
            if os.fstat(fd).st_nlink:
                return fd
            os.close(fd)  # who had it has removed it: a lock on it keeps nobody out
            return lock(folder)


def sign_lock(fd: int, *pids: int) -> None:
    """Write who holds the lock: a daemon's keeper, then its server; or a script."""
    with suppress(OSError):  # on a read-only filesystem the lock holds all the same
        os.ftruncate(fd, 0)
        os.pwrite(fd, "".join(f"{pid} {tree.start_ticks(pid)}\n" for pid in pids).encode(), 0)


def _signers(fd: int) -> list[tuple[int, int]]:
    """Return pid and start time of each that has signed the lock; nothing when it was not signed so."""
    with suppress(ValueError):
        found = [line.split() for line in os.pread(fd, 256, 0).splitlines()]
        return [(int(pid), int(ticks)) for pid, ticks in found]
    return []


def _end_hanging(servers: list[tuple[int, int]]) -> None:
    for pid, ticks in servers:
        if tree.end(pid, ticks):
            logging.getLogger(__name__).warning("the server %d of a killed keeper did not leave, and was killed", pid)
