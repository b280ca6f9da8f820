"""The verbs about the daemon and its files: serve, reload, check, schema, version."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from harnessd import __version__
from harnessd.cli import render
from harnessd.cli.client import reach
from harnessd.cli.db import ConfigDir
from harnessd.cli.options import DAEMON, Json
from harnessd.cli.outcome import Code, Failure

files = typer.Typer()


@files.command(rich_help_panel=DAEMON)
def serve(
    config_dir: ConfigDir,
    log_format: Annotated[
        str, typer.Option("--log-format", metavar="text|json", help="Of the daemon's own log: key=value, or JSON.")
    ] = "text",
) -> None:
    """Run every job of a config directory until told to end (SIGTERM, Ctrl-C)."""
    from harnessd.root import serve as keep

    raise typer.Exit(keep([str(config_dir), "--log-format", log_format]))


@files.command(rich_help_panel=DAEMON)
def reload(context: typer.Context, as_json: Json = False) -> None:
    """Have the daemon read its config directory again. Exit code 1: a file of it was refused."""
    answer = reach(context).ask("POST", "/reload").check()
    if as_json:
        render.as_it_is(answer.body)
    else:
        _tell_reload(answer.data)
    if answer.data["refused"]:
        raise Failure(Code.FAILED)


def _tell_reload(found: dict[str, Any]) -> None:
    for what in ("added", "changed", "removed"):
        if found[what]:
            render.say(f"{what}: {', '.join(found[what])}")
    render.say(f"unchanged: {len(found['unchanged'])}")
    if needed := [name for name in found["restart_needed"] if name != "state_dir"]:
        render.say(f"in force after a restart of the server (SIGUSR2): {', '.join(needed)}")
    if "state_dir" in found["restart_needed"]:
        render.say("in force when the daemon itself is ended and started anew: state_dir")
    for problems in found["refused"].values():
        for problem in problems:
            typer.echo(f"harnessd: {problem}", err=True)


@files.command(rich_help_panel=DAEMON)
def check(config_dir: ConfigDir) -> None:
    """Say all that is wrong with a config directory, without starting anything. Exit code 0: nothing is."""
    from harnessd import offline

    problems, jobs = offline.problems(config_dir)
    for problem in problems:
        typer.echo(problem, err=True)
    for warning in offline.warnings(config_dir):
        typer.echo(f"warning: {warning}", err=True)
    if problems:
        raise typer.Exit(1)
    render.say(f"{config_dir}: {jobs} jobs, no problems")


@files.command(rich_help_panel=DAEMON)
def schema() -> None:
    """Print the JSON Schema of the settings file and of a job file."""
    from harnessd import offline

    render.say(offline.schemas())


@files.command(rich_help_panel=DAEMON)
def version() -> None:
    """Print the version."""
    render.say(f"harnessd {__version__}")
