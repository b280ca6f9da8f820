"""When a journal is done with."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import RUN

from harnessd.errors import StoreError
from harnessd.server.reading import Reader
from harnessd.server.tape import Tape


class SlowStore:
    """Commits nothing before the test says so."""

    def __init__(self) -> None:
        self.flushed: Future[Any] = Future()

    def put_lines(self, *_: object, **__: object) -> Future[Any]:
        raise AssertionError("the run has said nothing")

    def full(self) -> bool:
        return False

    def flush(self) -> Future[Any]:
        return self.flushed


@pytest.mark.parametrize("fails", [False, True])
def test_a_journal_stays_until_the_row_of_its_run_is_stored(tmp_path: Path, fails: bool) -> None:
    path, store = tmp_path / "1.jsonl", SlowStore()
    path.touch()
    ended: list[str] = []

    async def reads() -> None:
        reader = Reader(store, lambda run: ended.append(f"{run} is done"))
        reader.follow(RUN, Tape(path, RUN), path, lambda _: None, 1.0)
        reader.finish(RUN, lambda: ended.append("ended"))
        await asyncio.sleep(0)
        assert path.exists() and ended == ["ended"]
        if fails:
            store.flushed.set_exception(StoreError("the store is closed"))
        else:
            store.flushed.set_result(None)
        await asyncio.sleep(0)
        reader.close()

    asyncio.run(reads())
    assert path.exists() == fails
    assert ended == (["ended"] if fails else ["ended", f"{RUN} is done"])
