"""`harnessd db`: the database itself, with or without a running daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harnessd.cli import render
from harnessd.errors import HarnessError

db = typer.Typer(help="Look after the database.", no_args_is_help=True)

ConfigDir = Annotated[Path, typer.Argument(metavar="CONFIG_DIR", help="The directory with harnessd.toml and jobs/.")]


@db.command()
def current(config_dir: ConfigDir) -> None:
    """Print the revision of the database's schema, and the one that this harnessd has."""
    _do("current", config_dir)


@db.command()
def upgrade(config_dir: ConfigDir) -> None:
    """Make or migrate the tables. The daemon does that by itself when it starts."""
    _do("upgrade", config_dir)


@db.command()
def check(config_dir: ConfigDir) -> None:
    """Look for damage. Exit code 0: there is none."""
    found = _do("damage", config_dir)
    if found:
        raise typer.Exit(1)
    render.say("no damage")


@db.command()
def vacuum(config_dir: ConfigDir) -> None:
    """Give the space of deleted rows back to the filesystem."""
    _do("vacuum", config_dir)


@db.command()
def backup(config_dir: ConfigDir, file: Annotated[Path, typer.Argument(help="The new file.")]) -> None:
    """Copy the database as it is now into FILE, while it is in use."""
    _do("backup", config_dir, file)


def _do(what: str, *args: Path) -> object:
    from harnessd import offline

    try:
        answer = getattr(offline, what)(*args)
    except HarnessError as error:
        typer.echo(f"harnessd: {error}", err=True)
        raise typer.Exit(1) from None
    if isinstance(answer, str):
        render.say(answer)
    else:
        for line in answer:
            typer.echo(line, err=True)
    return answer
