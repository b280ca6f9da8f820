"""A command's body, built to be expensive or to look like data: it is data or refused, in bounded time and memory."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from fuzz.profile import SCALARS, examples
from hypothesis import example, given
from hypothesis import strategies as st

from harnessd.errors import Refused
from harnessd.web.body import MAX_DEPTH, MAX_LITERAL_CHARS, command_data, duration

MOST_BYTES = 200_000  # a fifth of what the server takes: memory is measured slowly
MOST_MEMORY_A_BYTE = 120  # an empty list in a list, of two bytes: an object of 56 bytes and its place

PIECES = [*"[](){},:'\"\\+-._ \n\t#\0", "0x", "9", "9" * 50, "1e999", "1_0", "True", "null", "NaN", "-Infinity", "b'"]
PIECES += [
    "\\ud800",
    "\\N{DIGIT ONE}",
    "\\x",
    "''",
    "[[",
    "]]",
    "{'a':",
    "[1,",
    "((",
    ",)",
    "lambda:",
    "a.b",
    "é",
    "\ufeff",
]


def data(body: bytes) -> None:
    """Check that the body is data that JSON can carry, or refused in a few words."""
    try:
        value = command_data(body, (), frozenset())
    except Refused as refused:
        check_words(str(refused))
        return
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    assert depth(value) <= MAX_DEPTH


def check_words(words: str) -> None:
    assert words.isprintable(), "more than one line"
    assert len(words) < 1000


def depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@examples(40)
@given(
    head=st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    piece=st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join),
    times=st.sampled_from([1, 63, 65, 1000, 5000, 16_000]),
    tail=st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
)
def test_a_piece_repeated_is_data_or_refused(head: str, piece: str, times: int, tail: str) -> None:
    data((head + piece * times + tail).encode())


@examples(80)
@given(st.binary(max_size=120), st.sampled_from(["utf-8", "utf-16", "utf-32", "latin-1", "utf-7"]))
def test_any_bytes_in_any_encoding_are_data_or_refused(body: bytes, encoding: str) -> None:
    data(body)
    data(body.decode("latin-1").encode(encoding))


LITERALS = st.recursive(
    SCALARS | st.binary(max_size=4) | st.complex_numbers() | st.just(...),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.integers() | st.text(max_size=4) | st.none() | st.booleans() | st.floats(), inner, max_size=4
        )
    ),
    max_leaves=10,
)


@examples(80)
@given(LITERALS, st.lists(st.tuples(st.integers(0, 400), st.sampled_from(PIECES)), max_size=3))
def test_a_literal_with_changes_in_it_is_data_or_refused(value: Any, changes: list[tuple[int, str]]) -> None:
    text = repr(value)
    for at, piece in changes:
        text = text[: at % (len(text) + 1)] + piece + text[at % (len(text) + 1) :]
    data(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "body",
    [
        "9" * MOST_BYTES,
        "-" + "9" * (MOST_BYTES - 1),
        "0." + "9" * (MOST_BYTES - 2),
        "1e" + "9" * (MOST_BYTES - 2),
        "[" * MOST_BYTES,
        "{" * MOST_BYTES,
        '{"":' * (MOST_BYTES // 4),
        "[" + "[]," * (MOST_BYTES // 3 - 2) + "[]]",
        "[" + "{}," * (MOST_BYTES // 3 - 2) + "{}]",
        "'" * MOST_BYTES,
        "\\" * MOST_BYTES,
        '"' + "\\ud800" * (MOST_BYTES // 6 - 2) + '"',
        '"' + "\\u0000" * (MOST_BYTES // 6 - 2) + '"',
        "{" + ",".join(f'"{number}":0' for number in range(MOST_BYTES // 10)) + "}",
        " " * (MOST_BYTES - 1) + "x",
        "\n" * (MOST_BYTES - 1) + "x",
        "(" * 64 + " " * 10_000 + ")" * 64,
        "'a'" + " " * (MAX_LITERAL_CHARS - 3),
        "{" + "'a':1," * (MAX_LITERAL_CHARS // 6 - 1) + "}",
        "[" + "1e9," * (MAX_LITERAL_CHARS // 4 - 1) + "]",
        "+" * MAX_LITERAL_CHARS,
        "0x" + "f" * (MAX_LITERAL_CHARS - 2),
        "'" + "\\x41" * (MAX_LITERAL_CHARS // 4 - 1) + "'",
        "'" + "\\x4" * (MAX_LITERAL_CHARS // 3 - 1),
    ],
    ids=lambda body: f"{body[:4]!a} {len(body)}",
)
@pytest.mark.timeout(30)
def test_the_largest_body_costs_no_more_than_its_size_allows(body: str) -> None:
    raw = body.encode()
    tracemalloc.start()
    try:
        data(raw)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < MOST_MEMORY_A_BYTE * len(raw) + 4_000_000


@examples(60)
@given(st.lists(st.tuples(st.text(max_size=10), SCALARS.map(str) | st.sampled_from(PIECES)), max_size=6))
def test_any_query_is_data_that_json_carries_or_refused(query: list[tuple[str, str]]) -> None:
    try:
        value = command_data(b"", query, frozenset({"wait"}))
    except Refused:
        return
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


@examples(60)
@given(st.from_regex(r"[0-9.]{0,9}(ms|s|m|h|e|_|-| )?", fullmatch=True) | st.text(max_size=6))
@example("3600.0000000001")
@example("." * 10)
def test_any_length_of_time_is_within_an_hour_or_refused(text: str) -> None:
    try:
        assert 0 <= duration(text, "wait") <= 3600
    except Refused:
        pass
