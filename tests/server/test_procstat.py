from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from harnessd.server import procstat

HAS_CHILDREN = """
import subprocess, threading
def has_one():
    child = subprocess.Popen(["cat"])
    begun.wait()
    child.wait()
begun = threading.Barrier(6)
for _ in range(5):
    threading.Thread(target=has_one).start()
begun.wait()
print("begun", flush=True)
"""


@pytest.fixture
def parent() -> Iterator[int]:
    """A process with five threads, each of which has a child."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HAS_CHILDREN], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"begun\n"
        yield process.pid
        process.stdin.close()


def test_children_of_all_threads_are_counted(parent: int) -> None:
    assert procstat._count_children(parent) == 5
    assert procstat._count_children(os.getpid()) >= 6


def test_of_very_many_threads_the_first_ones_are_looked_at(parent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procstat, "_MOST_THREADS", 3)
    assert procstat._count_children(parent) == 2
