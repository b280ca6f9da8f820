"""A journal with anything in it, written in pieces and read meanwhile: lines, whole or torn, in bounded memory."""

from __future__ import annotations

import json
import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fuzz.profile import CUTS, EVIL_NUMBERS, VALUES, examples, pieces
from hypothesis import given
from hypothesis import strategies as st

from harnessd.server.tape import MAX_LINE_BYTES, TORN_BYTES, UNNUMBERED, Line, Tape

RUN = 7
MOST_US = 253_402_300_800 * 10**6
CHUNK_BYTES = 64 << 10


def written(seq: object, at: object, kind: str, value: object) -> bytes:
    return json.dumps({"seq": seq, "t": at, kind: value}, separators=(",", ":")).encode("utf-8", "surrogatepass")


NUMBERS = st.integers(0, 10**6) | EVIL_NUMBERS | st.none() | st.booleans() | st.text(max_size=3)
RECORDS = st.builds(
    written, NUMBERS, NUMBERS | st.floats(0, 2e9), st.sampled_from(["status", "ack", "error", "x", "seq"]), VALUES
)
SPOILT = st.sampled_from(
    [
        b'{"seq":1,"t":1.5,"status":' + b"9" * 6000 + b"}",
        b'{"seq":' + b"9" * 6000 + b',"t":1.5,"status":1}',
        b'{"seq":1,"t":1e999,"status":1}',
        b'{"seq":1,"t":-1e999,"status":1}',
        b'{"seq":1,"t":1.5,"status":1e999}',
        b'{"seq":1,"t":99999999999.9,"status":1}',
        b'{"seq":1,"t":1.5,"status":"\\ud800"}',
        b'{"seq":1,"t":1.5,"error":"\\udfff\\u0000"}',
        b'{"seq":1,"t":1.5,"ack":' + b"9" * 18 + b"}",
        b'{"seq":1,"t":1.5,"ack":00}',
        b'{"seq":1,"t":1.5,"ack":true}',
        b'{"seq":1,"t":1.5,"status":' + b"[" * 3000 + b"]" * 3000 + b"}",
        b'{"seq":1,"t":1.5,"status":' + b'{"a":' * 3000,
        b'{"seq":1,"t":1.5,"status":NaN}',
        b'{"seq":1,"t":1.5,"status":1}{"seq":2,"t":1.5,"status":2}',
        b'{"seq":1,"t":1.5,"status":1},"x":{"seq":2,"t":1.5,"status":2}',
        b'{"status":1}\r',
        b'\xef\xbb\xbf{"status":1}',
        b"\xed\xa0\x80",
        b"\xff\xfe",
        b"\0" * 300,
        b"{" * 2000,
    ]
)
CONTENT = st.lists(
    st.tuples(
        RECORDS | SPOILT | st.binary(max_size=40), st.sampled_from([b"\n", b"\n", b"\n", b"", b"\n\n", b"\r\n", b"\0"])
    ),
    max_size=12,
).map(lambda parts: b"".join(record + end for record, end in parts))


@contextmanager
def journal() -> Iterator[Path]:
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        yield Path(file.name)


def check(lines: list[Line]) -> None:
    for line in lines:
        assert 0 <= line.at_us <= MOST_US
        assert 0 <= line.seq < 2 * UNNUMBERED
        line.text.encode()
        if line.kind == "torn":
            assert len(line.text) <= 4 * TORN_BYTES
        else:
            json.loads(line.text)
        if line.kind == "ack":
            assert 0 <= int(line.text) < 10**18


def meaning(lines: list[Line]) -> list[tuple[object, ...]]:
    """Return all but the times, for some are that of the reading, and how JSON is spaced and escaped."""
    return [(line.seq, line.kind, line.text if line.kind == "torn" else json.loads(line.text)) for line in lines]


def drained(tape: Tape, limit_bytes: int, *, final: bool) -> list[Line]:
    found: list[Line] = []
    while lines := tape.read(limit_bytes, final):
        found += lines
    check(found)
    return found


@examples(60)
@given(CONTENT, CUTS, st.sampled_from([1, 40, 300, CHUNK_BYTES]), st.booleans())
def test_what_is_written_in_pieces_is_read_as_what_is_there_at_once(
    content: bytes, cuts: list[int], limit_bytes: int, counts_lines: bool
) -> None:
    with journal() as path:
        tape, found = Tape(path, RUN, counts_lines=counts_lines), []
        with open(path, "ab", buffering=0) as file:
            for piece in pieces(content, cuts):
                file.write(piece)
                found += drained(tape, limit_bytes, final=False)
        found += drained(tape, limit_bytes, final=True)
        assert tape.backlog_bytes() == 0
        tape.close()
        whole = Tape(path, RUN, counts_lines=counts_lines)
        at_once = drained(whole, CHUNK_BYTES, final=True)
        assert (whole.offset, whole.lines) == (tape.offset, tape.lines)
        whole.close()
    assert meaning(found) == meaning(at_once)


@examples(40)
@given(CONTENT, CUTS)
def test_a_reader_that_begins_anew_at_any_stored_offset_doubles_and_loses_nothing(
    content: bytes, cuts: list[int]
) -> None:
    with journal() as path:
        path.write_bytes(content)
        offset = lines = 0
        found: list[Line] = []
        while True:
            tape = Tape(path, RUN, offset=offset, lines=lines)
            read = tape.read(cuts[len(found) % len(cuts)] % 200 + 1 if cuts else 50, final=True)
            offset, lines = tape.offset, tape.lines
            tape.give_back(offset)
            tape.close()
            if not read:
                break
            found += read
        whole = Tape(path, RUN)
        at_once = drained(whole, CHUNK_BYTES, final=True)
        whole.close()
    assert meaning(found) == meaning(at_once)


@examples(15)
@given(
    before=CONTENT,
    size_bytes=st.sampled_from([MAX_LINE_BYTES - 1, MAX_LINE_BYTES, MAX_LINE_BYTES + 1, 3 * MAX_LINE_BYTES + 5]),
    filling=st.sampled_from([b"\0", b"[", b'{"seq":', b'{"seq":1,"t":1.5,"status":1}', b"9", b"\xff"]),
    cuts=CUTS,
)
def test_a_line_without_end_is_one_torn_line_and_the_next_is_read(
    before: bytes, size_bytes: int, filling: bytes, cuts: list[int]
) -> None:
    last = b'\n{"seq":9,"t":1.5,"status":"last"}\n'
    content = before + b"\n" + (filling * (size_bytes // len(filling) + 1))[:size_bytes] + last
    with journal() as path:
        tape, found = Tape(path, RUN), []
        with open(path, "ab", buffering=0) as file:
            for piece in pieces(content, cuts):
                file.write(piece)
                found += drained(tape, CHUNK_BYTES, final=False)
        tape.close()
    assert (found[-1].seq, found[-1].kind, found[-1].text) == (9, "status", '"last"')
    assert tape.offset == len(content)


@pytest.mark.parametrize("filling", [b"\0", b"[", b"9", b'{"seq":', b'{"seq":1,"t":1.5,"status":1}', b"\xff"])
def test_reading_a_large_journal_takes_no_more_memory_than_a_line_may_have(filling: bytes) -> None:
    with journal() as path:
        path.write_bytes(filling * (8 * MAX_LINE_BYTES // len(filling)) + b'\n{"status":1}\n')
        tape, kind = Tape(path, RUN), ""
        tracemalloc.start()
        try:
            while lines := tape.read(CHUNK_BYTES, final=True):
                kind = lines[-1].kind
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            tape.close()
    assert kind == "status"
    assert peak_bytes < 4 * MAX_LINE_BYTES


@pytest.mark.parametrize("number", ["1e999", "-1E+400", "9" * 400 + ".5"])
@pytest.mark.parametrize("beside", ["", "\n", "x\n"])
def test_a_number_past_the_range_of_a_double_is_torn_whatever_stands_beside_it(number: str, beside: str) -> None:
    with journal() as path:
        path.write_text(f'{beside}{{"seq":1,"t":1.5,"status":{{"a":{number}}}}}\n')
        tape = Tape(path, RUN)
        assert drained(tape, CHUNK_BYTES, final=True)[-1].kind == "torn"
        tape.close()


@examples(30)
@given(CONTENT, CONTENT, st.integers(0, 400))
def test_a_journal_that_is_cut_or_written_anew_is_read_on(first: bytes, second: bytes, left_bytes: int) -> None:
    with journal() as path:
        path.write_bytes(first)
        tape = Tape(path, RUN)
        drained(tape, 100, final=False)
        os.truncate(path, min(left_bytes, len(first)))
        with open(path, "ab") as file:
            file.write(second)
        drained(tape, 100, final=True)
        assert tape.backlog_bytes() == 0
        tape.close()
