from __future__ import annotations

import json
import os
import socket
import string
import struct
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harnessd.errors import WireError
from harnessd.states import Command
from harnessd.wire import (
    MAX_FDS,
    MAX_FRAME_BYTES,
    ExitRecord,
    Frame,
    FrameReader,
    RunSpec,
    merged,
    pack_command,
    pack_frame,
    unpack_command,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | FINITE | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=5)
FRAMES = OBJECTS.filter(lambda frame: "fds" not in frame)
WORDS = st.text(string.printable, max_size=20)
INTS = st.integers(0, 2**62)
RUN_SPECS = st.builds(
    RunSpec,
    run=INTS,
    job=WORDS,
    mark=INTS,
    journal=WORDS,
    entrypoint=WORDS,
    command=st.lists(WORDS, max_size=3),
    args=st.lists(WORDS, max_size=3),
    env=st.none() | st.dictionaries(WORDS, WORDS, max_size=3),
    uid=st.none() | INTS,
    groups=st.lists(INTS, max_size=3),
    umask=st.none() | st.integers(0, 0o777),
    limits=st.dictionaries(WORDS, INTS, max_size=3),
    config=OBJECTS,
    kill_grace=FINITE,
)
EXIT_RECORDS = st.builds(
    ExitRecord,
    run=INTS,
    job=WORDS,
    pid=INTS,
    code=st.none() | st.integers(0, 255),
    signal=st.none() | st.integers(1, 64),
    core=st.booleans(),
    at=FINITE,
    wall_s=FINITE,
    mono_s=FINITE,
    cpu_s=FINITE,
    peak_rss_bytes=INTS,
    leftover=INTS,
)


def frames_of(reader: FrameReader) -> Iterator[tuple[Frame, list[int]]]:
    while found := reader.next():
        yield found


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(bounds)]


# frames


@given(st.lists(FRAMES, max_size=5), st.lists(st.integers(0), max_size=8))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(frames: list[Frame], cuts: list[int]) -> None:
    reader, found = FrameReader(), []
    for piece in pieces(b"".join(map(pack_frame, frames)), cuts):
        reader.feed(piece)
        found += list(frames_of(reader))
    assert found == [(frame, []) for frame in frames]


@given(st.binary(max_size=200), st.lists(st.integers(0), max_size=8))
@example(struct.pack("!I", MAX_FRAME_BYTES + 1), [])
@example(struct.pack("!I", 200_000) + b"[" * 200_000, [])
@example(struct.pack("!I", 5000) + b"1" * 5000, [])
@example(struct.pack("!I", 2) + b"[]", [])
@example(struct.pack("!I", 12) + b'{"fds":true}', [])
@example(struct.pack("!I", 10) + b'{"fds":-1}', [])
def test_any_bytes_give_frames_or_a_wire_error_and_nothing_else(data: bytes, cuts: list[int]) -> None:
    reader = FrameReader()
    with suppress(WireError):
        for piece in pieces(data, cuts):
            reader.feed(piece)
            assert all(isinstance(frame, dict) and fds == [] for frame, fds in frames_of(reader))


@given(st.binary(max_size=60).filter(lambda body: not body.strip().startswith(b"{")))
def test_a_body_that_is_no_object_is_a_wire_error(body: bytes) -> None:
    reader = FrameReader()
    reader.feed(struct.pack("!I", len(body)) + body)
    with pytest.raises(WireError, match="cannot read the frame"):
        reader.next()


def test_a_frame_beyond_the_limit_is_refused_before_its_body_has_come() -> None:
    reader = FrameReader()
    reader.feed(struct.pack("!I", MAX_FRAME_BYTES + 1))
    with pytest.raises(WireError, match="at most"):
        reader.next()


def test_an_unfinished_frame_is_no_frame_yet() -> None:
    reader, packed = FrameReader(), pack_frame({"verb": "hello"})
    for end in range(len(packed)):
        reader.feed(packed[end - 1 : end] if end else b"")
        assert reader.next() is None
    reader.feed(packed[-1:])
    assert reader.next() == ({"verb": "hello"}, [])


@pytest.mark.parametrize("fds", [1, -1, "1", None, 1.5, [1], 10**30])
def test_a_frame_that_names_descriptors_that_did_not_come_is_a_wire_error(fds: Any) -> None:
    reader = FrameReader()
    reader.feed(pack_frame({"fds": fds}))
    with pytest.raises(WireError, match="descriptors"):
        reader.next()


# over a socket


@given(st.lists(st.tuples(FRAMES, st.integers(0, 4)), min_size=1, max_size=4))
def test_descriptors_arrive_with_their_own_frame(sent: list[tuple[Frame, int]]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    reader, found, received = FrameReader(), [], []
    with closing(ours), closing(theirs):
        theirs.setblocking(False)
        for number, (frame, count) in enumerate(sent):
            files = [marked_file(number, index) for index in range(count)]
            socket.send_fds(ours, [pack_frame({**frame, "fds": count})], files)
            for fd in files:
                os.close(fd)
        with suppress(BlockingIOError):
            while reader.receive(theirs):
                received += list(frames_of(reader))
    for number, (frame, fds) in enumerate(received):
        found.append((frame, [os.pread(fd, 100, 0).decode() for fd in fds]))
        assert found[-1][1] == [f"{number}.{index}" for index in range(len(fds))]
        for fd in fds:
            os.close(fd)
    assert [frame for frame, _ in found] == [{**frame, "fds": count} for frame, count in sent]
    assert [len(marks) for _, marks in found] == [count for _, count in sent]


def marked_file(number: int, index: int) -> int:
    with tempfile.TemporaryFile() as file:
        file.write(f"{number}.{index}".encode())
        file.flush()
        return os.dup(file.fileno())


def test_as_many_descriptors_as_the_limit_fit_one_frame() -> None:
    with sent_over(MAX_FDS) as fds:
        assert len(fds) == MAX_FDS


def test_descriptors_that_arrive_are_not_handed_on_to_what_is_executed() -> None:
    with sent_over(2) as fds:
        assert [os.get_inheritable(fd) for fd in fds] == [False, False]


@contextmanager
def sent_over(count: int) -> Iterator[list[int]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    reader = FrameReader()
    with closing(ours), closing(theirs):
        socket.send_fds(ours, [pack_frame({"fds": count})], [ours.fileno()] * count)
        assert reader.receive(theirs)
        found = reader.next()
    assert found is not None
    try:
        yield found[1]
    finally:
        for fd in found[1]:
            os.close(fd)


def test_a_peer_that_is_gone_is_told_from_one_that_is_silent() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    reader = FrameReader()
    with closing(theirs):
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            reader.receive(theirs)
        ours.sendall(pack_frame({"last": "word"}))
        ours.close()
        assert reader.receive(theirs)
        assert reader.next() == ({"last": "word"}, [])
        assert not reader.receive(theirs)


# commands


@given(st.sampled_from(Command), VALUES, st.integers(0, 2**63), FINITE)
def test_a_command_comes_out_as_it_went_in(cmd: Command, data: Any, id: int, time: float) -> None:
    packet = pack_command(cmd, data, id, time)
    message = unpack_command(packet)
    assert message == {"cmd": cmd, "data": data, "id": id, "time": time}
    assert isinstance(message["cmd"], Command)
    assert packet.count(b"\n") == 1 and packet.endswith(b"\n")  # a shell reads it with `read`


@pytest.mark.parametrize("data", [float("nan"), float("inf"), {1, 2}, b"x", {(1, 2): 3}, object()])
def test_data_that_json_cannot_hold_is_refused_by_the_sender(data: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        pack_command(Command.CONFIG, data, 1, 0.0)


@given(st.binary(max_size=100))
@example(b'{"cmd":"START","id":"x","time":0}')
@example(b'{"cmd":"START","id":1e999,"time":0}')
@example(b'{"cmd":"START","id":[],"time":0}')
@example(b'{"cmd":"START","id":1}')
@example(b'{"cmd":"REBOOT","id":1,"time":0}')
@example(b'{"cmd":{},"id":1,"time":0}')
@example(b"[" * 100_000)
@example(b"\xff\xfe")
def test_any_packet_gives_a_command_or_a_wire_error(packet: bytes) -> None:
    with suppress(WireError):
        assert set(unpack_command(packet)) == {"cmd", "data", "id", "time"}


@given(st.fixed_dictionaries({}, optional={"cmd": VALUES | st.just("START"), "id": VALUES, "time": VALUES}))
def test_any_object_gives_a_command_or_a_wire_error(message: dict[str, Any]) -> None:
    with suppress(WireError):
        found = unpack_command(json.dumps(message).encode())
        assert (type(found["id"]), type(found["time"])) == (int, float)


# specs and records


@given(RUN_SPECS)
def test_a_run_spec_comes_out_as_it_went_in(spec: RunSpec) -> None:
    assert RunSpec.from_frame(json.loads(json.dumps(spec.to_frame()))) == spec


@given(EXIT_RECORDS)
def test_an_exit_record_comes_out_as_it_went_in(record: ExitRecord) -> None:
    assert ExitRecord.from_frame(json.loads(json.dumps(record.to_frame()))) == record


@pytest.mark.parametrize("kind", [RunSpec, ExitRecord])
@pytest.mark.parametrize("frame", [{}, {"run": 1}, {"unknown": 1}])
def test_an_incomplete_or_unknown_frame_is_a_wire_error(kind: type[RunSpec | ExitRecord], frame: Frame) -> None:
    with pytest.raises(WireError, match="cannot read the"):
        kind.from_frame(frame)


# merging


def test_a_change_is_laid_over_object_by_object_and_replaces_anything_else() -> None:
    config = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merged(config, {"a": {"y": [3]}, "b": {"z": 0}}) == {"a": {"x": 1, "y": [3]}, "b": {"z": 0}}
    assert merged(config, {"a": None}) == {"a": None, "b": 1}


@given(OBJECTS, OBJECTS, OBJECTS)
def test_merging_is_the_same_in_one_step_or_two(config: Frame, first: Frame, second: Frame) -> None:
    if not replaces_and_restores(config, first, second):
        assert merged(merged(config, first), second) == merged(config, merged(first, second))


def replaces_and_restores(config: Any, first: Any, second: Any) -> bool:
    """An object that the first change replaces with a value, and the second with an object, is another object."""
    for key in config.keys() & second.keys():
        parts = [part.get(key) for part in (config, first, second)]
        objects = [isinstance(part, dict) for part in parts]
        if objects == [True, False, True] and key in first:
            return True
        if all(objects) and replaces_and_restores(*parts):
            return True
    return False


@given(OBJECTS, OBJECTS)
def test_merging_changes_neither_and_is_done_with_once(config: Frame, changes: Frame) -> None:
    before = json.dumps([config, changes])
    result = merged(config, changes)
    assert json.dumps([config, changes]) == before
    assert merged(result, changes) == result
    assert merged(config, {}) == config
    assert result.keys() == config.keys() | changes.keys()
