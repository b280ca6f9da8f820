"""The queue of a receiver, with a courier that does as the test says; and the table behind it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harnessd.errors import ConfigError
from harnessd.server import outbox
from harnessd.server.courier import Program, Undelivered
from harnessd.server.outbox import Outbox
from harnessd.server.records import Event, Notice, NoticesDone, Record, TroublesOver
from harnessd.server.settings import Notify, Settings
from harnessd.server.store import Store


class Fake:
    """Takes messages, or raises what it is told to."""

    def __init__(self, *failures: Exception, down: bool = False) -> None:
        self.failures = list(failures)
        self.up = asyncio.Event()
        self.bodies: list[list[int]] = []
        if not down:
            self.up.set()

    async def send(self, body: bytes) -> None:
        await self.up.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.bodies.append(json.loads(body))

    async def close(self) -> None:
        pass


def notice(number: int, at_us: int | None = None, **more: Any) -> Notice:
    at_us = time.time_ns() // 1000 if at_us is None else at_us
    return Notice(number, "chat", "feed", 1, at_us, "failed", json.dumps({"id": number}), **more)


def box(courier: Any, records: list[Record], window_s: float = 0.0) -> Outbox:
    async def write(bodies: Sequence[dict[str, Any]]) -> bytes:
        return json.dumps([body["id"] for body in bodies]).encode()

    return Outbox("chat", courier, window_s, write, records.append)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FIRST_DELAY_S", 0.001)


def run(story: Any) -> None:
    asyncio.run(story)


def test_what_happens_in_the_window_goes_in_one_message_and_in_order() -> None:
    async def story() -> None:
        courier, records = Fake(), list[Record]()
        outbox = box(courier, records, window_s=0.1)
        now_us = time.time_ns() // 1000
        for number, after_us in ((1, 0), (2, 50_000), (3, 200_000)):
            outbox.put(notice(number, now_us + after_us))
        await until(lambda: len(courier.bodies) == 2)
        assert courier.bodies == [[1, 2], [3]]
        assert [each.ids for each in records if isinstance(each, NoticesDone)] == [(1, 2), (3,)]
        assert [each.data["id"] for each in records if isinstance(each, Event) and each.kind == "notified"] == [1, 2, 3]
        outbox.stop()

    run(story())


def test_a_failure_is_tried_again_and_nothing_overtakes() -> None:
    async def story() -> None:
        courier, records = Fake(*[Undelivered("down")] * 8), list[Record]()
        outbox = box(courier, records)
        outbox.put(notice(1, 1_000_000 * int(time.time()) - 5_000_000))
        outbox.put(notice(2))
        await until(lambda: outbox.health()["error"] == "down")
        await until(lambda: len(courier.bodies) == 2)
        assert courier.bodies == [[1], [2]]
        assert outbox.health() == {"receiver": "chat", "waiting": 0, "error": None}
        outbox.stop()

    run(story())


def test_a_message_that_is_refused_again_and_again_is_given_up_for_the_next() -> None:
    async def story() -> None:
        courier, records = Fake(*[Undelivered("it answered 400", refused=True)] * outbox.TRIES), list[Record]()
        box_ = box(courier, records)
        box_.put(notice(1, time.time_ns() // 1000 - 5_000_000))
        box_.put(notice(2))
        await until(lambda: courier.bodies)
        assert courier.bodies == [[2]]
        (failed,) = [each for each in records if isinstance(each, Event) and each.kind == "notify-failed"]
        assert failed.data["id"] == 1 and "it answered 400" in failed.data["why"]
        box_.stop()

    run(story())


def test_what_is_older_than_a_week_or_too_much_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MOST_WAITING", 3)

    async def story() -> None:
        courier, records = Fake(), list[Record]()
        box_ = box(courier, records)
        box_.put(notice(1, 5))
        for number in range(2, 7):
            box_.put(notice(number))
        await until(lambda: not box_.waiting)
        assert sorted(number for body in courier.bodies for number in body) == [4, 5, 6]
        why = [each.data["why"] for each in records if isinstance(each, Event) and each.kind == "notify-failed"]
        assert why == ["older than a week", "more than 3 wait", "more than 3 wait"]
        box_.stop()

    run(story())


def test_a_slow_receiver_holds_up_no_other() -> None:
    async def story() -> None:
        slow, quick = Fake(down=True), Fake()
        boxes = [box(slow, []), box(quick, [])]
        for each in boxes:
            each.put(notice(1))
        await until(lambda: quick.bodies)
        assert (slow.bodies, boxes[0].waiting) == ([], 1)
        boxes[0].change(Fake(), 0)
        await until(lambda: not boxes[0].waiting)
        for each in boxes:
            each.stop()

    run(story())


def test_a_program_that_takes_too_long_is_killed_with_what_it_has_started(tmp_path: Path) -> None:
    script = 'sleep 1000 & echo $! > "$0"; wait'
    settings = Notify(command=["/bin/sh", "-c", script, str(tmp_path / "pid")], timeout=1.0)

    async def story() -> None:
        with pytest.raises(Undelivered, match="longer than 1 s"):
            await Program(settings).send(b"x" * 1_000_000)
        pid = int((tmp_path / "pid").read_text())
        await until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())
        with pytest.raises(Undelivered, match="exit code was 3"):
            await Program(Notify(command=["sh", "-c", "exit 3"])).send(b"")
        gone = Notify.model_construct(command=["/nowhere/at/all"], timeout=1.0)
        with pytest.raises(Undelivered, match="cannot start"):
            await Program(gone).send(b"")

    run(story())


# the table


def test_a_notice_stays_until_it_is_delivered_and_its_trouble_is_over(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "x.db")
    notices = [notice(1), notice(2, lasting=True), notice(3, lasting=True), notice(4)]
    for record in (*notices, Event("state", 5, "feed"), NoticesDone((1, 2)), TroublesOver((3,))):
        store.put(record)
    store.flush().result(10)
    with store.readers.connect() as connection:
        left = outbox.load(connection)
    assert [(each.id, each.waiting, each.lasting) for each in left] == [
        (2, False, True),
        (3, True, False),
        (4, True, False),
    ]
    assert left[2] == notices[3]
    store.put(TroublesOver((2,)))
    store.put(NoticesDone((3, 4)))
    store.flush().result(10)
    with store.readers.connect() as connection:
        assert outbox.load(connection) == []
    store.close()


# the settings


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({}, "needs url or command, one of the two"),
        ({"url": "http://a", "command": ["true"]}, "one of the two"),
        ({"url": "ftp://SECRET"}, 'begins with "http://"'),
        ({"url": "http://SECRET SECRET"}, "without spaces"),
        ({"url": ["SECRET"]}, "url: must be a string"),
        ({"url": "http://a", "headers": {"A b": "SECRET"}}, "cannot be the name of a header"),
        ({"url": "http://a", "headers": {"A": "SECRET\n"}}, "A must be of ASCII"),
        ({"url": "http://a", "headers": {"A": 1}}, "must be a string"),
        ({"command": ["true"], "headers": {"A": "SECRET"}}, "headers go with url"),
        ({"command": []}, "must not be empty"),
        ({"command": ["nowhere-at-all"]}, "there is no program nowhere-at-all"),
        ({"url": "http://a", "on": ["faild"]}, "did you mean 'failed'?"),
        ({"url": "http://a", "on": []}, "must not be empty"),
        ({"url": "http://a", "on": ["recovered", "exited"]}, "none of what there is to recover from"),
        ({"url": "http://a", "remind": "1 hour"}, 'such as "30s"'),
        ({"url": "http://a", "remind": 0}, "must be more than 0"),
        ({"ulr": "http://a"}, "did you mean 'url'?"),
    ],
)
def test_a_table_that_is_wrong_is_refused_without_its_secrets(table: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Settings.parse({"notify": [table]}, "harnessd.toml")
    assert problem in str(refused.value) and "SECRET" not in str(refused.value)


def test_two_receivers_of_one_name_are_refused() -> None:
    both = [{"url": "https://chat.example/a"}, {"url": "https://chat.example/b"}]
    with pytest.raises(ConfigError, match=r"two that are named 'chat\.example'"):
        Settings.parse({"notify": both}, "harnessd.toml")
    both[1]["name"] = "oncall"
    parsed = Settings.parse({"notify": both}, "harnessd.toml").notify
    assert [each.receiver for each in parsed] == ["chat.example", "oncall"]
    assert "example/a" not in repr(parsed)


def test_lengths_of_time_have_units_or_are_seconds() -> None:
    (parsed,) = Settings.parse({"notify": [{"command": ["true"], "remind": "1h", "window": 2}]}, "x").notify
    assert (parsed.remind, parsed.window, parsed.timeout, parsed.receiver) == (3600, 2, 10, "true")
