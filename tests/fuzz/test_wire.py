"""Both ends of the control socket, and the mailbox: what comes is a frame or a WireError, and nothing is kept."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from contextlib import suppress
from typing import Any

from fuzz.profile import CUTS, EVIL_TEXT, VALUES, examples, pieces
from helpers.rig import Rig
from hypothesis import example, given
from hypothesis import strategies as st

from harnessd.channel import Channel
from harnessd.errors import WireError
from harnessd.job import pulse
from harnessd.server.link import Link
from harnessd.wire import MAX_FDS, MAX_FRAME_BYTES, ExitRecord, Frame, RunSpec, merged, pack_frame, unpack_command

FDS = st.integers(0, 3) | VALUES
OBJECTS = st.dictionaries(st.text(max_size=6) | st.sampled_from(["op", "re", "event", "id"]), VALUES, max_size=4)
BODIES = (
    st.builds(lambda frame, fds: json.dumps(frame | {"fds": fds}).encode(), OBJECTS, FDS)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=40)
    | st.sampled_from(
        [b"[" * 9000, b'{"a":' * 9000, b"9" * 9000, b'{"fds":' + b"9" * 9000 + b"}", b"{}\0", b"\xff\xfe{\0}\0"]
    )
)
LENGTHS = st.none() | st.sampled_from([0, 1, 7, MAX_FRAME_BYTES, MAX_FRAME_BYTES + 1, 2**32 - 1])


def packed(body: bytes, length: int | None) -> bytes:
    return struct.pack("!I", len(body) if length is None else length) + body


STREAMS = st.lists(st.builds(packed, BODIES, st.none() | st.none() | LENGTHS), max_size=5).map(b"".join) | st.binary(
    max_size=80
)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@examples(80)
@given(STREAMS, CUTS, st.lists(st.integers(0, MAX_FDS + 4), min_size=1, max_size=4))
def test_any_stream_with_any_descriptors_is_frames_or_a_wire_error_and_leaves_nothing_open(
    stream: bytes, cuts: list[int], counts: list[int]
) -> None:
    before = open_fds()
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    with suppress(WireError):
        for number, piece in enumerate(pieces(stream, cuts)):
            socket.send_fds(ours, [piece], [ours.fileno()] * counts[number % len(counts)])
            frames, alive = channel.receive()
            for _, fds in frames:
                for fd in fds:
                    os.close(fd)
            assert all(isinstance(frame, dict) for frame, _ in frames)
            assert alive
    channel.close()
    ours.close()
    assert open_fds() == before


@examples(80)
@given(OBJECTS | st.fixed_dictionaries({"cmd": VALUES | st.just("STOP"), "id": VALUES, "time": VALUES}), CUTS)
def test_a_packet_that_is_cut_anywhere_is_a_command_or_a_wire_error(message: dict[str, Any], cuts: list[int]) -> None:
    for piece in (*pieces(json.dumps(message).encode(), cuts), json.dumps(message).encode("utf-16")):
        with suppress(WireError):
            assert set(unpack_command(piece)) == {"cmd", "data", "id", "time"}


@examples(60)
@given(VALUES)
@example([])
@example({"run": 1} | {"mark": []})
def test_any_value_is_a_spec_and_a_record_or_a_wire_error(value: Any) -> None:
    for kind in (RunSpec, ExitRecord):
        with suppress(WireError):
            kind.from_frame(value)


@examples(40)
@given(st.dictionaries(EVIL_TEXT, VALUES, max_size=4), st.dictionaries(EVIL_TEXT, VALUES, max_size=4))
def test_any_two_configs_are_merged_into_one_that_travels(config: dict[str, Any], changes: dict[str, Any]) -> None:
    pack_frame(merged(config, changes))


# the keeper, which must outlive whatever a server says

OPERATIONS = st.sampled_from(["list", "end", "signal", "ack", "store", "ready", "reloaded", "spawn"]) | VALUES
FIELDS = {
    "run": VALUES,
    "grace": VALUES,
    "signals": VALUES | st.just([0]),
    "tree": VALUES,
    "name": VALUES,
    "spec": VALUES,
}


@examples(60)
@given(op=OPERATIONS, fields=st.fixed_dictionaries({}, optional=FIELDS), fds=st.integers(0, 2))
def test_the_keeper_answers_any_frame_and_goes_on(keeper: Rig, op: Any, fields: dict[str, Any], fds: int) -> None:
    keeper.tell({"op": op, "id": "any"} | fields, [0] * fds)
    assert "error" not in keeper.ask("list")[0]
    for frame, held in keeper.events():
        if frame["event"] == "stored":
            for fd in held:
                os.close(fd)
                keeper._fds.remove(fd)


PATHS = ("journal", "output", "errors", "cwd", "entrypoint", "python")  # text under these would be a file
ODD = VALUES.filter(lambda value: not isinstance(value, str))


@examples(25)
@given(field=st.sampled_from([*RunSpec.__slots__]), value=ODD | st.sampled_from(["\0", ""]))
def test_the_keeper_starts_any_spec_or_says_why_not(keeper: Rig, field: str, value: Any) -> None:
    spec = keeper.spec(command=["/bin/true"]).to_frame()
    if field == "command" and isinstance(value, list):
        value = [part for part in value if not isinstance(part, str)]
    answer, _ = keeper.ask("spawn", spec=spec | {field: value})
    assert "error" in answer or answer["pid"] > 0
    if "pid" in answer:
        keeper.tell({"op": "end", "run": answer["run"], "grace": 0.0})
        keeper.event("exit", pid=answer["pid"])
    assert "error" not in keeper.ask("list")[0]


def test_a_spec_whose_limits_are_no_table_is_refused_and_the_keeper_goes_on(keeper: Rig) -> None:
    spec = keeper.spec(command=["/bin/true"]).to_frame()
    assert "error" in keeper.ask("spawn", spec=spec | {"caps": 1.5})[0]
    assert "error" not in keeper.ask("list")[0]


# the server's end, which must outlive whatever a keeper says

EVENTS = st.sampled_from(["hello", "child", "stored", "exit", "reload", "ending", "preload-failed"]) | VALUES
SAID = st.fixed_dictionaries(
    {},
    optional={
        "event": EVENTS,
        "re": VALUES | st.just(1),
        "name": VALUES,
        "run": VALUES,
        "modules": VALUES,
        "why": VALUES,
        "pid": VALUES,
        "error": VALUES,
    },
)


def talked(frames: list[tuple[Frame, int]]) -> list[BaseException | str]:
    """Return what reached the loop's exception handler; the link has met the frames while it asked for a list."""
    wrong: list[BaseException | str] = []

    async def talk() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: wrong.append(context.get("exception") or context["message"])
        )
        ours, theirs = socket.socketpair()
        link = Link(theirs)
        asked = asyncio.ensure_future(link.inventory())
        await asyncio.sleep(0)
        for frame, count in frames:
            pages = [pulse.create() for _ in range(count)]
            socket.send_fds(ours, [pack_frame(frame | {"fds": count})], pages)
            for page in pages:
                os.close(page)
        last = pack_frame({"event": "reload", "fds": 0})
        told = asyncio.Event()
        link.on_reload = told.set
        ours.sendall(last)
        async with asyncio.timeout(5):
            await told.wait()
        ours.close()
        async with asyncio.timeout(5):
            await link.lost.wait()
            await asyncio.gather(asked, return_exceptions=True)
        link.close()

    asyncio.run(talk())
    return wrong


@examples(60)
@given(st.lists(st.tuples(SAID, st.integers(0, 3)), max_size=4))
@example([({"re": []}, 0)])
@example([({"event": "exit"}, 0)])
@example([({"event": "child"}, 0)])
@example([({"event": "child"}, 2)])
@example([({"event": "stored"}, 1)])
@example([({"event": "preload-failed"}, 0)])
def test_the_link_survives_any_frame_and_hears_the_next(frames: list[tuple[Frame, int]]) -> None:
    assert talked(frames) == []
