"""The commands that need no daemon."""

from __future__ import annotations

import typer

from harnessd import __version__
from harnessd.cli.db import ConfigDir, db

app = typer.Typer(
    name="harnessd",
    help="Keeps Python jobs running for days, steers them over HTTP and remembers what they did.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

app.add_typer(db, name="db")


@app.command()
def serve(config_dir: ConfigDir) -> None:
    """Run every job of a config directory until told to end (SIGTERM, Ctrl-C)."""
    from harnessd.daemon import serve as keep

    raise typer.Exit(keep([str(config_dir)]))


@app.command()
def check(config_dir: ConfigDir) -> None:
    """Say all that is wrong with a config directory, without starting anything. Exit code 0: nothing is."""
    from harnessd import offline

    problems, jobs = offline.problems(config_dir)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{config_dir}: {jobs} jobs, no problems")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the settings file and of a job file."""
    from harnessd import offline

    typer.echo(offline.schemas())


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"harnessd {__version__}")
