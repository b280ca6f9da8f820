"""harnessd keeps Python jobs running for days, steers them over HTTP and remembers what they did.

The public names load on first use, so that a job that imports `Cradle` pays for nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harnessd.harness import ProcessHarness, launch
    from harnessd.job.cradle import Cradle
    from harnessd.states import Command

__version__ = "0.1.0"
__all__ = ["Command", "Cradle", "ProcessHarness", "__version__", "launch"]

_HOMES = {
    "Command": "harnessd.states",
    "Cradle": "harnessd.job.cradle",
    "ProcessHarness": "harnessd.harness",
    "launch": "harnessd.harness",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'harnessd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
