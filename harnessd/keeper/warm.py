"""What jobs commonly import, loaded once before they are forked. The keeper itself uses none of it."""

from __future__ import annotations

import contextlib
import importlib

# fmt: off
_COMMON = (
    "argparse", "asyncio", "collections", "concurrent.futures", "contextlib", "csv", "dataclasses", "datetime",
    "decimal", "enum", "functools", "glob", "hashlib", "heapq", "inspect", "itertools", "json", "logging", "math",
    "multiprocessing", "os", "pathlib", "queue", "random", "re", "shutil", "socket", "sqlite3", "statistics",
    "string", "struct", "subprocess", "sys", "tempfile", "textwrap", "threading", "time", "traceback", "typing",
    "urllib.request", "uuid", "weakref", "zoneinfo",
)
# fmt: on


def load() -> None:
    """Import it all; setproctitle too where it is installed, so that a run can be named in `ps`."""
    for name in _COMMON:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle")
