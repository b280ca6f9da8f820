"""What README.md and docs/ tell a reader to write and to type."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

from helpers.daemon import Daemon
from helpers.waiting import DEADLINE_S

ROOT = Path(__file__).parents[2]


def text(name: str) -> str:
    return (ROOT / name).read_text()


def section(name: str, title: str) -> str:
    """Return the document from that heading to the next, of whatever level from the second."""
    headings = [*re.finditer(r"^##+ (.*)$", text(name), re.MULTILINE)]
    ends = [found.start() for found in headings] + [len(text(name))]
    (where,) = (place for place, found in zip(pairwise(ends), headings, strict=True) if found[1] == title)
    return text(name)[slice(*where)]


def fenced(page: str, language: str) -> list[str]:
    """Return the blocks in that language; "" is those that name none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [block for named, block in blocks if named == language]


def typed(page: str) -> list[str]:
    """Return what stands indented, to be typed: a block each."""
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(found) for found in re.findall(r"(?:^ {4}\S?.*\n)+", prose, re.MULTILINE)]


def commands(page: str, program: str) -> list[str]:
    """Return the lines to be typed that call the program."""
    return [line for block in typed(page) for line in block.splitlines() if line.startswith(f"{program} ")]


def titled(block: str) -> str:
    """Return the path that the block's first line, a comment, says it is the content of."""
    return block.splitlines()[0].removeprefix("# ")


class Shell:
    """Types what a document says, where the programs of this Python come first and 2222 is another port."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}

    def here(self, page: str) -> str:
        """Return the text for the port of this shell; curl fails when the answer is an error."""
        page = page.replace("2222", str(self.port))
        return re.sub(r"\bcurl ", f"curl --fail-with-body --silent --show-error --max-time {DEADLINE_S:g} ", page)

    def __call__(self, command: str) -> str:
        """Return what it prints; the test fails when its exit code is not 0."""
        line = ["bash", "-c", "set -o pipefail\n" + self.here(command)]
        done = subprocess.run(line, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout


def described(daemon: Daemon, page: str) -> None:
    """Write the settings of a document, with what keeps the daemons of tests apart."""
    apart = f'runtime_dir = "{daemon.folder}/run"\n'
    if "[http]" not in page:
        page += f"\n[http]\nport = {daemon.port}\n"
    (daemon.config / "harnessd.toml").write_text(apart + page.replace("2222", str(daemon.port)))
