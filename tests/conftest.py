"""Real processes for every test that wants them, ended whatever becomes of the test."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.rig import Rig
from helpers.script import Script
from hypothesis import HealthCheck, settings

settings.register_profile("house", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

# A suite that was started with & or nohup has them ignored, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """Starts scripts that harness a job; whatever they leave behind fails the test."""
    with ExitStack() as scripts:

        def started(body: str, **options: Any) -> Script:
            folder = Path(tmp_path, f"script-{len(list(tmp_path.glob('script-*')))}")
            folder.mkdir()
            script = Script(folder, body, **options)
            scripts.callback(script.close)
            return script

        yield started


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A keeper that the tests of a module share, as it has runs of many jobs in its life."""
    made = Rig(tmp_path_factory.mktemp("keeper"))
    yield made
    made.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A keeper with nothing to keep yet."""
    made = Rig(tmp_path)
    yield made
    made.close()
