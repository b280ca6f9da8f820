"""`harnessd run`: one job harnessed without a script of its own."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from harnessd.cli.options import DAEMON
from harnessd.cli.outcome import Code, Failure

running = typer.Typer()

_OWN = ("-x", "--harness-config")


@running.command(
    rich_help_panel=DAEMON,
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)
def run(
    entrypoint: Annotated[str, typer.Argument(metavar="FILE.py:CLASS", help="Or package.module:CLASS, or a function.")],
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARGS]...", help="The job's own; -x FILE-or-JSON among them is the harness's config."),
    ] = None,
) -> None:
    """Run one job here, steered over HTTP; the exit code is the job's. No daemon is needed."""
    given = list(args or ())
    place, _, attribute = entrypoint.rpartition(":")
    if not place or not attribute:
        raise Failure(Code.USAGE, f"cannot run {entrypoint!r}: FILE.py:CLASS or MODULE:CLASS is wanted")
    sys.argv = [place, *given]
    job: object = _import(place)
    for name in attribute.split("."):
        if not hasattr(job, name):
            raise Failure(Code.USAGE, f"cannot run {entrypoint}: {place} has no {attribute}")
        job = getattr(job, name)
    from harnessd.harness import launch

    raise typer.Exit(launch(job, args=tuple(_of_the_job(given))))  # type: ignore[arg-type]  # it says what is no job


def _import(place: str) -> ModuleType:
    """Import the module here, so that the run that is forked has it. Raises Failure when there is none."""
    if not place.endswith(".py"):
        sys.path.insert(0, os.getcwd())
        if importlib.util.find_spec(place.partition(".")[0]) is None:
            raise Failure(Code.USAGE, f"cannot run {place}: there is no such module")
        return importlib.import_module(place)
    path = Path(place).absolute()
    if not path.is_file():
        raise Failure(Code.USAGE, f"cannot run {place}: there is no such file")
    sys.path.insert(0, str(path.parent))
    name = path.stem if path.stem not in sys.stdlib_module_names else f"job_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _of_the_job(args: list[str]) -> list[str]:
    """Return the arguments without the harness's own, as `launch` leaves them in sys.argv."""
    kept: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            return [*kept, arg, *rest]
        name, equals, _ = arg.partition("=")
        if name not in _OWN:
            kept.append(arg)
        elif not equals:
            next(rest, None)
    return kept
