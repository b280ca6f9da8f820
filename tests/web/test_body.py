from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect

from harnessd.errors import BadRequest, TooLarge
from harnessd.web.body import MAX_DEPTH, MAX_LITERAL_CHARS, command_data, duration, read_body

RESERVED = frozenset({"wait", "grace", "tag"})


def data(body: bytes | str = b"", *query: tuple[str, str]) -> Any:
    return command_data(body.encode() if isinstance(body, str) else body, query, RESERVED)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("", None),
        (" \r\n", None),
        ("null", None),
        ("{'target_vol':4.2}", {"target_vol": 4.2}),
        ('{"target_vol":4.2}', {"target_vol": 4.2}),
        ('\ufeff{"a": 1}', {"a": 1}),
        ("4.2", 4.2),
        ("-1", -1),
        ("'x'", "x"),
        ("None", None),
        ("[True, False, None,]", [True, False, None]),
        ("(1, (2,), ())", [1, [2], []]),
        ("1, 2", [1, 2]),
        ("{'a': +1, 'b': -.5e3, 'c': 0x1F,\n 'd': {}}", {"a": 1, "b": -500.0, "c": 31, "d": {}}),
        ("{1: 'a', None: 'b', False: 'c', 2.5: 'd'}", {"1": "a", "null": "b", "false": "c", "2.5": "d"}),
        (r"{'a\n\'\\\x41\u20ac\0': '[[((\"'}", {"a\n'\\A€\0": '[[(("'}),
        ('{"emoji": "\\ud83d\\ude00"}', {"emoji": "😀"}),
        ('"' + "[" * 500 + '"', "[" * 500),
        ("'" + "[" * 500 + "'", "[" * 500),
    ],
)
def test_json_and_python_literals_are_data(body: str, expected: Any) -> None:
    assert data(body) == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("NaN", "no NaN"),
        ('{"a": -Infinity}', "no -Infinity"),
        ('{"a": [0, 1e999]}', "$.a[1] has a number past"),
        ("{'a': 1e999}", "$.a has a number past"),
        ("{'a': NaN}", "unexpected 'NaN}' at line 1, column 7"),
        ("{'a': 1,\n 'b': x}", "unexpected 'x}' at line 2, column 7"),
        ("{'a': 1", "never closed"),
        ("{1, 2}", "set"),
        ("b'x'", "unexpected"),
        ("1j", "unexpected"),
        ("1+2j", "unexpected"),
        ("...", "unexpected"),
        ("f'{x}'", "unexpected"),
        ("'''x'''", "unexpected"),
        ("r'x'", "unexpected"),
        (r"'\d'", "unexpected"),
        (r"'\777'", "unexpected"),
        ("'a' 'b'", "unexpected \"'b'\""),
        ("[1][0]", "unexpected '[0]'"),
        ("[1:2]", "no Python literal"),
        ("0x1for 2", "unexpected"),
        ("01", "no Python literal"),
        ("{[]: 1}", "unhashable"),
        ("{(): 1}", "a key of type tuple"),
        ("{1: 'a', '1': 'b'}", "two keys that are both '1'"),
        ('"\\ud800"', "surrogate"),
        ("{'\\ud800': 1}", "surrogate"),
        ("target_vol=4.2", "unexpected"),
        ("__import__('os')", "unexpected"),
        ("9" * 5000, "digits"),
        ("9" * 1000, "digits"),
        ("{'a': 0x" + "f" * 5000 + "}", "digits"),
        ("--1", "unexpected"),
        ("-" * 15_000 + "1", "unexpected"),
        ("1" + "+1" * 8_000, "unexpected"),
        ("[]" * 8_000, "unexpected"),
        ("(" * 15_000, "nested deeper than 64 at line 1, column 65"),
        ("[" * 400_000, "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
        ("'" + "x" * MAX_LITERAL_CHARS + "'", "longer than"),
    ],
)
def test_what_is_no_data_is_refused_with_the_reason(body: str, reason: str) -> None:
    with pytest.raises(BadRequest) as refused:
        data(body)
    message = str(refused.value)
    assert message.startswith("cannot ")
    assert reason in message
    assert len(message) < 500


def test_a_body_that_is_not_utf8_is_refused_with_the_place() -> None:
    with pytest.raises(BadRequest, match="byte 2 is not UTF-8"):
        data(b'{"\xff": 1}')


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("(", ",)")])
def test_the_depth_limit_is_the_same_for_both_notations(opening: str, closing: str) -> None:
    assert data(opening * MAX_DEPTH + "1" + closing * MAX_DEPTH)
    with pytest.raises(BadRequest, match="nested deeper than 64"):
        data(opening * (MAX_DEPTH + 1) + "1" + closing * (MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ([("wait", "5"), ("tag", "x")], None),
        ([("target_vol", "4.2"), ("wait", "5")], {"target_vol": 4.2}),
        ([("a", "1"), ("a", "x"), ("b", "")], {"a": [1, "x"], "b": ""}),
        (
            [("a", '{"x": [1]}'), ("b", "NaN"), ("c", "true"), ("d", "True")],
            {"a": {"x": [1]}, "b": "NaN", "c": True, "d": "True"},
        ),
        ([("a", "007")], {"a": "007"}),
    ],
)
def test_parameters_that_are_not_reserved_are_data(query: list[tuple[str, str]], expected: Any) -> None:
    assert data(b"", *query) == expected


@pytest.mark.parametrize("value", ["1e999", '"\\ud800"', "[" * 5000 + "]" * 5000, "[" * 65 + "]" * 65])
def test_a_parameter_that_json_cannot_hold_is_refused(value: str) -> None:
    with pytest.raises(BadRequest):
        data(b"", ("a", value))


def test_data_in_body_and_query_at_once_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"both the body and the query.*\?a="):
        data(b"{}", ("a", "1"))
    assert data(b"[1]", ("wait", "1")) == [1]


def assert_plain_or_refused(body: bytes, query: Iterable[tuple[str, str]] = ()) -> None:
    try:
        value = command_data(body, list(query), RESERVED)
    except BadRequest:
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    json.dumps(value, ensure_ascii=False).encode()


@given(st.binary(max_size=200))
@example(b"{'a':\x00}")
@example(b"'\x00'")
@example(b"\xef\xbb\xbf")
@example("\u2003".encode())
def test_any_bytes_are_plain_data_or_refused(body: bytes) -> None:
    assert_plain_or_refused(body)


LITERAL_PIECES = st.sampled_from(
    [*"[](){},:'\"\\ \n\r\t+-.#0195ejxXbrfuN_", "True", "None", "null", "NaN", "'a'", '"b"', "1e9", "''", "\\u", "é"]
)


@given(st.lists(LITERAL_PIECES, max_size=40).map("".join))
def test_any_heap_of_literal_pieces_is_plain_data_or_refused(text: str) -> None:
    assert_plain_or_refused(text.encode())


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)


@given(TREES)
def test_what_json_wrote_is_read_back(tree: Any) -> None:
    assert data(b" " + json.dumps(tree).encode()) == tree


@given(TREES)
def test_what_repr_wrote_is_read_back(tree: Any) -> None:
    assert data(repr(tree)) == tree


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=60)), max_size=5))
def test_any_query_is_plain_data_or_refused(query: list[tuple[str, str]]) -> None:
    assert_plain_or_refused(b"", query)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5.0), ("0", 0.0), ("0.5", 0.5), (".5", 0.5), ("5s", 5.0), ("500ms", 0.5), ("2m", 120.0), ("1h", 3600.0)],
)
def test_a_duration_is_in_seconds_unless_it_has_a_unit(text: str, seconds: float) -> None:
    assert duration(text, "wait") == seconds


@pytest.mark.parametrize(
    "text", ["", "-1", "3601", "61m", "nan", "inf", "1e3", "5 s", "5d", "\u0665", "9" * 400, "x" * 5000]
)
def test_a_duration_out_of_limits_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(BadRequest, match=r"wait=.* from 0 to 3600") as refused:
        duration(text, "wait")
    assert len(str(refused.value)) < 200


@given(st.text())
def test_any_text_is_a_duration_within_limits_or_refused(text: str) -> None:
    with suppress(BadRequest):  # the other allowed answer
        assert 0 <= duration(text, "grace") <= 3600


class Wire:
    """A client that sends the chunks, and counts how many of them were taken."""

    def __init__(self, *chunks: bytes, gone: bool = False) -> None:
        self.chunks = list(chunks)
        self.gone = gone
        self.taken = 0

    async def receive(self) -> dict[str, Any]:
        self.taken += 1
        if not self.chunks:
            return {"type": "http.disconnect"}
        chunk = self.chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(self.chunks) or self.gone}


def read(wire: Wire, limit_bytes: int, *headers: tuple[bytes, bytes]) -> bytes:
    return asyncio.run(read_body({"type": "http", "headers": headers}, wire.receive, limit_bytes))


def test_a_body_within_its_limit_is_read_whole() -> None:
    assert read(Wire(b"ab", b"", b"cd"), 4, (b"content-length", b"4")) == b"abcd"
    assert read(Wire(b""), 0) == b""


@pytest.mark.parametrize("length", [b"5", b"9" * 6000])
def test_a_declared_length_past_the_limit_is_refused_unread(length: bytes) -> None:
    wire = Wire(b"abcde")
    with pytest.raises(TooLarge, match="4 bytes"):
        read(wire, 4, (b"content-length", length))
    assert wire.taken == 0


def test_an_undeclared_length_is_refused_at_the_chunk_that_passes_the_limit() -> None:
    wire = Wire(b"ab", b"cde", b"never", b"taken")
    with pytest.raises(TooLarge):
        read(wire, 4)
    assert wire.taken == 2


def test_a_client_that_leaves_in_the_middle_is_told_apart_from_a_short_body() -> None:
    with pytest.raises(ClientDisconnect):
        read(Wire(b"ab", gone=True), 4)
