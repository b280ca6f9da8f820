"""Spares a command what its options do not need: typer loads pydantic to make text of text, 80 ms for `harnessd ps`.

Text, paths without conditions and an option's own default are taken as they are; all else goes typer's way. Where a
version of typer converts by other means, nothing is changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEXT = (str, list[str])


class _AsItIs:
    """Stands where typer looks for a parameter's conversion."""

    def __init__(self, annotation: object) -> None:
        self._is_text = annotation in _TEXT
        self._is_path = annotation is Path

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        if self._is_text or value == param.default:
            return value
        if self._is_path:
            return Path(value)
        param._runtime_param = None
        return param.get_runtime_param().coerce(value, param=param, ctx=ctx)


def quicken(command: Any, context: Any) -> None:
    """Have the command's parameters converted so."""
    for param in command.get_params(context):
        descriptor = getattr(param, "type_descriptor", None)
        if descriptor is not None and getattr(param, "_runtime_param", ...) is None:
            param._runtime_param = _AsItIs(descriptor.annotation)
