"""The command, and a daemon for it to speak with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Command, Going
from helpers.daemon import Daemon

SPEAKS = ["sh", "-c", "echo first; echo second >&2; i=0; while sleep 0.05; do i=$((i+1)); echo line $i; done"]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with some jobs, of which a test leaves running what it found running."""
    made = Daemon(tmp_path_factory.mktemp("daemon"))
    made.job("feed-a", "Idle", tags=["x"], config={"target_vol": 4.0, "book": {"depth": 5}})
    made.job("feed-b", "Idle", tags=["x", "y"])
    made.job("speaks", SPEAKS)
    made.job("late", "Idle", autostart=False)
    made.start()
    made.wait_all("running", ["feed-a", "feed-b", "speaks"])
    made.status("feed-a")
    made.status("feed-b")
    yield made
    made.close()


@pytest.fixture
def harnessd(daemon: Daemon, tmp_path: Path) -> Command:
    """The command, by the config directory of the daemon."""
    return Command(tmp_path, HARNESSD_CONFIG=str(daemon.config))


@pytest.fixture
def alone(tmp_path: Path) -> Command:
    """The command where no daemon is."""
    return Command(tmp_path)


@pytest.fixture
def going(harnessd: Command) -> Iterator[Callable[..., Going]]:
    """Starts commands that go on, and ends them."""
    started: list[Going] = []

    def start(*args: str, **options: Any) -> Going:
        started.append(Going(options.pop("command", harnessd), *args, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()
