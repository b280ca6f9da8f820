from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.daemon import Daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that is not started yet; whatever it leaves behind fails the test."""
    made = Daemon(tmp_path)
    yield made
    made.close()
