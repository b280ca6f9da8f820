"""schemathesis asks a daemon whatever its contract allows and forbids: https://schemathesis.readthedocs.io."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from helpers.daemon import Daemon

HELPERS = Path(__file__).parents[1] / "helpers"
SEED, EXAMPLES = os.environ.get("CONTRACT_SEED", "1"), os.environ.get("CONTRACT_EXAMPLES", "3")
# DELETE of a config forgets the overrides: what stands there is still to be had.
NOT_FOR_US = "use_after_free,ensure_resource_availability"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    made.job("idle", "Idle", tags=["a"])
    made.job("stopped", "Idle", autostart=False)
    made.job("shell", ["sleep", "1000"])
    made.start()
    yield made
    made.close()


def found_by_schemathesis(daemon: Daemon, *more: str) -> str:
    """Return what schemathesis reports of that daemon, nothing when it finds nothing."""
    program = Path(sys.executable).with_name("schemathesis")
    config = ("--config-file", str(HELPERS / "schemathesis.toml"))
    asked = ("--phases", "coverage,fuzzing", "--max-examples", EXAMPLES, "--seed", SEED, "--no-shrink")
    env = os.environ | {"PYTHONPATH": str(HELPERS.parent), "SCHEMATHESIS_HOOKS": "helpers.contract_hooks"}
    done = subprocess.run(
        [program, *config, "run", f"{daemon.url}/openapi.json", *asked, "--continue-on-failure", *more],
        cwd=daemon.folder,
        env=env | {"CONTRACT_SEED": SEED, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 and "Tested:" in done.stdout else done.stdout + done.stderr


@pytest.mark.timeout(int(EXAMPLES) * 60)
def test_schemathesis_finds_nothing(daemon: Daemon) -> None:
    server = daemon.server_pid()
    found = found_by_schemathesis(daemon, "--checks", "all", "--exclude-checks", NOT_FOR_US)
    assert not found, f"{found}\n{daemon.log[-4000:]}"
    assert daemon.server_pid() == server
    assert "Traceback" not in daemon.log


def test_the_contract_is_served_as_it_is_made(daemon: Daemon) -> None:
    from harnessd.web.app import described

    answer = httpx.get(f"{daemon.url}/openapi.json", trust_env=False)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == described()
