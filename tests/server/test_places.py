"""The directories, used by more than one process at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.waiting import DEADLINE_S

from harnessd.server.places import of_script

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
