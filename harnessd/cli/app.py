"""All commands together, and what they have in common: where the daemon is, and how a failure ends them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from harnessd.cli.db import db
from harnessd.cli.files import files
from harnessd.cli.follow import following
from harnessd.cli.look import look
from harnessd.cli.options import DAEMON
from harnessd.cli.outcome import Code, Failure
from harnessd.cli.past import past
from harnessd.cli.quick import quicken
from harnessd.cli.run import running
from harnessd.cli.steer import steer
from harnessd.cli.token import token


class Commands(TyperGroup):
    """Turns what stops a command into its exit code and a line on stderr."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            quicken(command, ctx)
        return command

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        quicken(self, ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Failure as failure:
            if str(failure):
                typer.echo(f"harnessd: {failure}", err=True)
            raise typer.Exit(failure.code) from None
        except KeyboardInterrupt:
            raise typer.Exit(Code.INTERRUPTED) from None


app = typer.Typer(
    name="harnessd",
    cls=Commands,
    help="Keeps Python jobs running for days, steers them over HTTP and remembers what they did.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 no such job, 4 the daemon is not to be reached, 5 refused.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def anywhere(
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Where the daemon listens. Or HARNESSD_URL, with HARNESSD_TOKEN."),
    ] = None,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="FILE", help="The daemon's Unix socket. Or HARNESSD_SOCKET.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="DIR", help="The daemon's config directory. Or HARNESSD_CONFIG; or ./config."),
    ] = None,
) -> None:
    """The options are read by harnessd.cli.client.reach, once a command wants the daemon."""


for part in (look, steer, past, following, files, running):
    app.add_typer(part)
app.add_typer(db, name="db", rich_help_panel=DAEMON)
app.add_typer(token, name="token", rich_help_panel=DAEMON)
