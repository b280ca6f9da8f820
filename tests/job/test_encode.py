from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import json
import math
import string
import types
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harnessd.job.journal import encode
from harnessd.wire import MAX_STATUS_BYTES, is_deep


def decoded(value: object) -> Any:
    text = encode(value)
    assert text.isascii() and "\n" not in text
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Point:
    x: float
    when: datetime.date | None = None


class Scalar:
    """As numpy's are: a type of its own that knows its plain value."""

    def __init__(self, value: object) -> None:
        self._value = value

    def tolist(self) -> object:
        return self._value


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("cannot be looked at")


class BrokenAttributes:
    def __getattribute__(self, name: str) -> object:
        raise RuntimeError(name)


class Key:
    def __repr__(self) -> str:
        return "<a key>"


NOON = datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ({"a": [1, 2.5, True, None, "x"]}, {"a": [1, 2.5, True, None, "x"]}),
        (math.nan, None),
        ([math.inf, -math.inf, 1.0], [None, None, 1.0]),
        ({"pnl": math.nan, "at": NOON}, {"pnl": None, "at": "2024-02-29T12:00:00+00:00"}),
        (NOON.date(), "2024-02-29"),
        (datetime.time(1, 2, 3), "01:02:03"),
        (decimal.Decimal("1.25"), 1.25),
        (decimal.Decimal("NaN"), None),
        (decimal.Decimal("1e999"), None),
        (Point(1.5), {"x": 1.5, "when": None}),
        ([Point(math.nan, NOON.date())], [{"x": None, "when": "2024-02-29"}]),
        (Colour.RED, "red"),
        ({"level": Level.HIGH}, {"level": 3}),
        (Scalar(4), 4),
        ({"v": Scalar(math.nan)}, {"v": None}),
        (Scalar([1.0, math.inf]), [1.0, None]),
        ((1, (2, 3)), [1, [2, 3]]),
        (collections.namedtuple("P", "x y")(1, 2), [1, 2]),
        (collections.OrderedDict(a=1), {"a": 1}),
        (types.MappingProxyType({"a": math.nan}), {"a": None}),
        (collections.ChainMap({"a": 1}), {"a": 1}),
        (b"\x00\xff", "b'\\x00\\xff'"),
        ({1}, "{1}"),
        (1j, "1j"),
        (Path("/x"), repr(Path("/x"))),
        ("\ud800", "\ud800"),
        ("\0\n\u2028é", "\0\n\u2028é"),
        (Point, repr(Point)),
        (uuid.UUID(int=0), repr(uuid.UUID(int=0))),
    ],
)
def test_value_becomes(value: object, expected: object) -> None:
    assert decoded(value) == expected


def test_keys_that_json_cannot_hold_become_text() -> None:
    keys = {1: "int", 2.5: "float", None: "none", False: "bool", (1, 2): "tuple", b"b": "bytes", Colour.RED: "enum"}
    keys |= {math.nan: "nan", NOON: "time", Key(): "object"}
    names = {"1", "2.5", "null", "false", "(1, 2)", "b'b'", "red", "NaN", "2024-02-29T12:00:00+00:00", "<a key>"}
    assert set(decoded(keys)) == names


def test_one_object_that_fails_costs_nothing_but_itself() -> None:
    found = decoded({"good": 1, "bad": Broken(), "worse": BrokenAttributes(), Broken(): 2})
    assert found["good"] == 1
    assert found["bad"] == "<Broken>" and found["worse"] == "<BrokenAttributes>"


def test_integers_without_end_leave_the_rest_readable() -> None:
    huge = 10**5000
    assert decoded({"huge": huge, "n": 1})["n"] == 1
    assert decoded({huge: huge, "n": 1})["n"] == 1
    assert decoded(2**63) == 2**63


def test_cycle_ends_in_a_repr() -> None:
    ring: dict[str, Any] = {"n": 1}
    ring["self"] = [ring]
    found = decoded(ring)
    assert found["n"] == 1 and isinstance(found["self"][0], str)


@pytest.mark.parametrize("depth", [50, 500, 100_000])
def test_deep_nesting_is_cut(depth: int) -> None:
    value: Any = "core"
    for _ in range(depth):
        value = {"in": [value]}
    found = decoded({"n": 1, "deep": value})
    assert found["n"] == 1 and isinstance(found["deep"]["in"], list)
    while value != "core":  # an object so deep takes the stack with it if it is freed in one piece
        value = value.pop("in").pop()


def test_object_that_makes_itself_anew_for_ever_is_cut() -> None:
    class Endless:
        def tolist(self) -> list[object]:
            return [Endless()]

    assert isinstance(decoded(Endless()), list)


def test_changing_while_it_is_written_does_not_matter() -> None:
    class Growing(dict[str, Any]):
        def items(self) -> Any:
            self[f"k{len(self)}"] = math.nan
            return super().items()

    assert decoded({"g": Growing(a=math.nan)})["g"]["a"] is None


def test_limit_is_above_what_a_status_usually_has() -> None:
    assert len(encode({"k": "x" * 1000})) < MAX_STATUS_BYTES


_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.decimals(),
    st.fractions(),
    st.complex_numbers(),
    st.binary(),
    st.text(st.characters(exclude_categories=())),
    st.datetimes(timezones=st.none() | st.timezones()),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.uuids(),
    st.sampled_from(Colour),
    st.sampled_from(Level),
    st.builds(Scalar, st.floats() | st.integers() | st.lists(st.floats())),
    st.builds(Point, st.floats(), st.none() | st.dates()),
    st.builds(Broken),
    st.builds(BrokenAttributes),
    st.just(object),
    st.builds(lambda digits: int("9" * digits), st.integers(4000, 4300)).map(lambda n: n * n),
)
_keys = st.one_of(
    st.text(string.printable), st.integers(), st.floats(), st.none(), st.booleans(), st.binary(), st.dates()
)
_anything = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.tuples(inner, inner),
        st.dictionaries(_keys, inner),
        st.dictionaries(_keys | st.tuples(_keys) | st.builds(Broken), inner).map(types.MappingProxyType),
        st.builds(Point, inner, inner),
        st.builds(Scalar, inner),
    ),
    max_leaves=30,
)


@given(_anything)
def test_anything_becomes_one_line_of_ascii_json(value: object) -> None:
    decoded(value)


_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_plain)
def test_what_json_can_hold_is_held_as_it_is(value: object) -> None:
    assert decoded(value) == value


@given(_plain)
def test_a_nan_beside_it_changes_nothing_else(value: object) -> None:
    assert decoded([value, math.nan]) == [value, None]


def test_what_is_nested_too_deep_is_kept_down_to_some_depth() -> None:
    value: Any = "core"
    for _ in range(900):
        value = [value]
    assert not is_deep(encode(value))
    found, depth = decoded({"head": 1, "value": value}), 0
    inner = found["value"]
    while isinstance(inner, list):
        inner, depth = inner[0], depth + 1
    assert found["head"] == 1 and depth > 50
