from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harnessd import Command
from harnessd.examples.checksum_tree import ChecksumTree, list_files

CONTENTS = {"a.py": b"a", "b.py": b"", "json/decoder.py": b"x" * 300_000, "json-b.py": b"\x00\xff", "é.txt": b"\n"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in {**CONTENTS, "__pycache__/a.pyc": b"no", "site-packages/p/q.py": b"no"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return tmp_path


def test_list_has_every_file_with_its_size_in_order_and_no_caches_or_packages(tree: Path) -> None:
    assert list_files(tree) == [(name, len(CONTENTS[name])) for name in sorted(CONTENTS)]


def test_final_status_has_the_totals_of_the_tree(run_scripted: Any, tree: Path) -> None:
    job = run_scripted(ChecksumTree, [None] * len(CONTENTS), args=("--root", str(tree)))
    final = job.statuses[-1]
    assert (job.exit_code, final["finished"], final["current"]) == (0, True, None)
    assert (final["files_done"], final["files_total"], final["files_skipped"]) == (len(CONTENTS), len(CONTENTS), 0)
    assert final["bytes_done"] == final["bytes_total"] == sum(map(len, CONTENTS.values()))
    assert final["mb_per_s"] > 0


def test_digest_is_that_of_the_list_that_sha256sum_prints(run_scripted: Any, tree: Path) -> None:
    final = run_scripted(ChecksumTree, [None] * len(CONTENTS), args=("--root", str(tree))).statuses[-1]
    printed = subprocess.run(["sha256sum", *sorted(CONTENTS)], cwd=tree, capture_output=True, check=True).stdout
    assert final["digest"] == hashlib.sha256(printed).hexdigest()


def test_first_status_shows_progress(run_scripted: Any, tree: Path) -> None:
    first = run_scripted(ChecksumTree, [], args=("--root", str(tree))).statuses[0]
    assert (first["files_done"], first["files_total"], first["bytes_done"]) == (1, len(CONTENTS), 1)
    assert (first["current"], first["finished"], first["paused"]) == ("a.py", False, False)


def test_file_that_vanishes_is_counted_and_the_rest_hashed(run_scripted: Any, tree: Path) -> None:
    class Job(ChecksumTree):
        def add(self, root: Path, name: str) -> None:
            if name == "b.py":
                (tree / name).unlink()
            super().add(root, name)

    final = run_scripted(Job, [None] * len(CONTENTS), args=("--root", str(tree))).statuses[-1]
    assert (final["files_done"], final["files_skipped"]) == (len(CONTENTS) - 1, 1)
    assert final["finished"]


def test_stop_ends_it_between_two_files_with_0(run_scripted: Any, tree: Path) -> None:
    job = run_scripted(ChecksumTree, [None, (Command.STOP, None)], args=("--root", str(tree)))
    assert (job.exit_code, job.files_done) == (0, 2)
    assert not job.statuses[-1]["finished"]


def test_pause_waits_for_ever_until_resume(run_scripted: Any, tree: Path) -> None:
    script = [(Command.PAUSE, None), (Command.RESUME, None), *[None] * len(CONTENTS)]
    job = run_scripted(ChecksumTree, script, {"pause_ms": 50}, args=("--root", str(tree)))
    assert job.timeouts[:3] == [0.05, None, 0.05]
    assert [status["paused"] for status in job.statuses[:3]] == [False, True, False]
    assert job.statuses[-1]["finished"]


def test_config_sets_the_pause_and_refuses_nonsense(run_scripted: Any, tree: Path) -> None:
    changes = [{"pause_ms": 250}, {"pause_ms": -1}, {"pause_ms": True}, 7, None, {}]
    job = run_scripted(ChecksumTree, [(Command.CONFIG, change) for change in changes], args=("--root", str(tree)))
    assert job.timeouts == [0, *[0.25] * 6]
    assert [bool(status["config_error"]) for status in job.statuses[1:]] == [False, True, True, True, True, False]


def test_default_root_is_the_standard_library(run_scripted: Any) -> None:
    job = run_scripted(ChecksumTree, [])
    names = {name for name, _ in job.files}
    assert {"argparse.py", "asyncio/__init__.py"} <= names
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
