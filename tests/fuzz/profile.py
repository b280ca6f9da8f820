"""How many examples a test tries: few and always the same ones, or as many new ones as HARNESSD_FUZZ says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_MANY = int(os.environ.get("HARNESSD_FUZZ", "0"))


def examples(few: int, **more: Any) -> settings:
    """Return settings for a test that tries `few` examples unless more are asked for."""
    return settings(
        max_examples=_MANY or few,
        derandomize=not _MANY,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        **more,
    )


EVIL_TEXT = st.sampled_from(
    ["", "\0", "a\nb", "\x1b[2J", "x" * 5000, "../../x", "{}", "%s{0}", "９", "é\u2028\U0001f600"]
)
EVIL_NUMBERS = st.sampled_from(
    [-1, 0, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, 1e-320, float("inf"), float("nan")]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | EVIL_TEXT | EVIL_NUMBERS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | EVIL_TEXT, inner, max_size=3),
    max_leaves=8,
)
CUTS = st.lists(st.integers(0, 1 << 20), max_size=8)


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """Return the data, cut there."""
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in pairwise(bounds):
        yield data[start:end]
