"""What the server does again and again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from harnessd.daemon import _tick
from harnessd.server import archive
from harnessd.server.records import Keep

DEADLINE_S = 30


def until_called_again(chore: Any, seen: list[Any], times: int) -> None:
    """Run the chore until so much was seen."""

    async def run() -> None:
        task = asyncio.create_task(chore)
        async with asyncio.timeout(DEADLINE_S):
            while len(seen) < times and not task.done():  # noqa: ASYNC110 - the chore has no event
                await asyncio.sleep(0.001)
        assert not task.done()
        task.cancel()

    asyncio.run(run())


def test_a_tick_that_fails_is_told_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []

    def tick() -> None:
        seen.append("tick")
        raise ValueError("unforeseen")

    supervisor: Any = SimpleNamespace(tick=tick, sample=lambda *part: seen.append(part))
    until_called_again(_tick(supervisor, 0.001), seen, 4)
    assert seen[:4] == ["tick", (0, 1)] * 2
    assert "cannot look after the jobs" in caplog.text and "unforeseen" in caplog.text


def test_a_trim_that_fails_is_told_and_the_next_one_comes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_FIRST_TRIM_S", 0.001)
    monkeypatch.setattr(archive, "_TRIM_S", 0.001)
    seen: list[Any] = []

    def trim(*kept: object) -> None:
        seen.append(kept)
        raise ValueError("unforeseen")

    store: Any = SimpleNamespace(trim=trim)
    until_called_again(archive.trim_now_and_then(store, lambda: (Keep(), {})), seen, 2)
    assert "cannot forget old history" in caplog.text and "unforeseen" in caplog.text
