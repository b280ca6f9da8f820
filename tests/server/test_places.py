"""The directories, used by more than one process at once."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from helpers.waiting import DEADLINE_S, until

from harnessd.server.places import lock, of_script

SCRIPT = """
import os, shutil, sys
from pathlib import Path
from harnessd.server.places import of_script
for _ in range(150):
    folder, held = of_script(Path(sys.argv[1]))
    assert (folder / "lock").exists(), folder
    (folder / "journal").write_text("kept")
    assert (folder / "journal").read_text() == "kept"
    shutil.rmtree(folder, ignore_errors=True)
    os.close(held)
"""


def test_scripts_that_start_and_end_at_once_keep_their_folders(tmp_path: Path) -> None:
    scripts = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    told = [script.communicate(timeout=DEADLINE_S)[1] for script in scripts]
    assert [script.returncode for script in scripts] == [0] * len(scripts), told
    last, held = of_script(tmp_path)
    os.close(held)
    assert list(tmp_path.iterdir()) == [last]


def test_a_lock_that_its_holder_has_removed_is_taken_anew(tmp_path: Path) -> None:
    held = lock(tmp_path)
    over = subprocess.Popen(["true"])
    over.wait(DEADLINE_S)
    os.pwrite(held, f"{over.pid} 1\n".encode(), 0)  # so that it is waited for
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(lock, tmp_path)
        until(lambda: opened(tmp_path / "lock") == 2, "another waits for it")
        (tmp_path / "lock").unlink()
        os.close(held)
        taken = waiting.result(DEADLINE_S)
    assert os.fstat(taken).st_ino == (tmp_path / "lock").stat().st_ino
    os.close(taken)


def opened(path: Path) -> int:
    """Return how many descriptors of this process are of the file."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{fd}") == str(path)
    return count
