"""`harnessd token`: who gets in over TCP. It writes the file that the daemon reads, whether or not one runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from harnessd.cli import render
from harnessd.cli.outcome import Code, Failure
from harnessd.cli.render import NOTHING, Cell, Grid
from harnessd.cli.where import Given, state_dir
from harnessd.errors import BadRequest, HarnessError, Refused

token = typer.Typer(help="Make, list and revoke tokens.", no_args_is_help=True)

TITLES = ("NAME", "ROLE", "JOBS", "CREATED", "EXPIRES")


class RoleName(StrEnum):
    """The roles, each of which may what those before it may."""

    READ = "read"
    OPERATE = "operate"
    ADMIN = "admin"


Named = Annotated[str, typer.Argument(metavar="NAME", help="What the history calls whoever shows the token.")]


@token.command()
def new(
    context: typer.Context,
    name: Named,
    role: Annotated[RoleName, typer.Option("--role", help="What it may.")],
    jobs: Annotated[
        list[str] | None,
        typer.Option("--jobs", metavar="GLOB", help="Only these jobs ('feed-*'); may be given more than once."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="TIME", help="How long it is valid: 90d, 12h. Default: for ever.")
    ] = None,
) -> None:
    """Make a token and print its secret, this once."""
    with _offline(context) as (offline, state):
        secret = offline.new_token(state, name, role.value, jobs or (), expires)
    render.say(secret)
    limit = f", for jobs {' '.join(jobs)}" if jobs else ""
    until = f", for {expires}" if expires else ""
    typer.echo(
        f"harnessd: token {name!r} may {role}{limit}{until}. Its secret is shown this once; "
        'send it as "Authorization: Bearer SECRET", or put it into HARNESSD_TOKEN',
        err=True,
    )


@token.command("list")
def list_(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the tokens; their secrets are kept nowhere."""
    with _offline(context) as (offline, state):
        found = offline.tokens(state)
    if as_json:
        render.say(json.dumps({"tokens": found}))
    else:
        render.show(Grid(TITLES, [_row(each) for each in found]))


@token.command()
def revoke(context: typer.Context, name: Named) -> None:
    """Forget a token: it is in force no more, nor is a stream that it has opened."""
    with _offline(context) as (offline, state):
        offline.revoke_token(state, name)


@contextmanager
def _offline(context: typer.Context) -> Iterator[tuple[Any, Path]]:
    """Give what looks after tokens, and the state directory that is meant; what goes wrong gets its exit code."""
    from harnessd import offline

    said = context.find_root().params
    try:
        yield offline, state_dir(Given(said.get("url"), said.get("socket"), said.get("config")), os.environ)
    except BadRequest as error:
        raise Failure(Code.USAGE, str(error)) from None
    except Refused as error:
        raise Failure(Code.REFUSED, str(error)) from None
    except HarnessError as error:
        raise Failure(Code.FAILED, str(error)) from None


def _row(each: dict[str, Any]) -> list[Cell]:
    until = Cell(_minute(each["expires"]) + (" (expired)" if each["expired"] else ""), "red" if each["expired"] else "")
    jobs = " ".join(each["jobs"] or ["*"])
    return [Cell(each["name"]), Cell(each["role"]), Cell(jobs), Cell(_minute(each["created"])), until]


def _minute(moment: str | None) -> str:
    return moment[:16].replace("T", " ") if moment else NOTHING
