"""The commands that need no daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from harnessd import __version__

app = typer.Typer(
    name="harnessd",
    help="Keeps Python jobs running for days, steers them over HTTP and remembers what they did.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

ConfigDir = Annotated[Path, typer.Argument(metavar="CONFIG_DIR", help="The directory with harnessd.toml and jobs/.")]


@app.command()
def serve(config_dir: ConfigDir) -> None:
    """Run every job of a config directory until told to end (SIGTERM, Ctrl-C)."""
    from harnessd.daemon import serve as keep

    raise typer.Exit(keep([str(config_dir)]))


@app.command()
def check(config_dir: ConfigDir) -> None:
    """Say all that is wrong with a config directory, without starting anything. Exit code 0: nothing is."""
    from harnessd.errors import ConfigError
    from harnessd.server import configdir

    try:
        loaded = configdir.load(config_dir)
        problems = loaded.all_problems()
    except ConfigError as error:
        problems = error.problems
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{config_dir}: {len(loaded.jobs)} jobs, no problems")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the settings file and of a job file."""
    from harnessd.server import configdir

    typer.echo(json.dumps(configdir.json_schemas(), indent=2))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"harnessd {__version__}")
