"""What schemathesis has to know of a daemon that it tries: which jobs there are, and what would take for ever."""

from __future__ import annotations

import os
import random
from typing import Any

import schemathesis
from schemathesis.core.parameters import ParameterLocation

JOBS = ("idle", "stopped", "shell")
_random = random.Random(os.environ.get("CONTRACT_SEED", "1"))


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Name a job that there is, most of the time; wait for little, and follow nothing."""
    path, query = case.path_parameters or {}, case.query or {}
    if "name" in path and _is_right(case, ParameterLocation.PATH) and _random.random() < 0.9:
        path["name"] = _random.choice(JOBS)
    if query.get("follow") == "1":
        query["follow"] = "0"
    if not _is_right(case, ParameterLocation.QUERY):
        return
    query.pop("cursor", None)  # it is good with the page that it came from
    if "job" not in query and case.operation.path == "/history":
        query.pop("every", None)  # it takes one job
    for name in ("wait", "grace"):
        if name in query:
            query[name] = "0.05"


def _is_right(case: Any, place: ParameterLocation) -> bool:
    """Whether that part of the request is as the contract has it."""
    part = case.meta.components.get(place) if case.meta else None
    return part is None or bool(part.mode.is_positive)
