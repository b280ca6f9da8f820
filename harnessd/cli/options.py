"""The arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from harnessd.cli.client import complete_job

MOST_S = 1_000_000  # a socket takes twice as many

Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME",
        help="Jobs, by name or glob ('feed-*'). None: the default job, or the only one.",
        autocompletion=complete_job,
        show_default=False,
    ),
]
NamesOrAll = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME",
        help="Jobs, by name or glob ('feed-*'). None: every job.",
        autocompletion=complete_job,
        show_default=False,
    ),
]
Tag = Annotated[str | None, typer.Option("--tag", metavar="TAG", help="Every job with this tag.")]
All = Annotated[bool, typer.Option("--all", help="Every job.")]
Json = Annotated[bool, typer.Option("--json", help="Print the daemon's JSON as it is.")]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="JSON", help="Goes to the job with the command; JSON or a Python literal."),
]
Wait = Annotated[bool, typer.Option("--wait", help="Return when it is done, not when it is begun.")]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0, max=MOST_S, help="How long --wait waits.")
]
Every = Annotated[
    float, typer.Option("--every", metavar="SECONDS", min=0.1, max=MOST_S, help="Time between two looks.")
]

STEER = "Steer jobs"
LOOK = "Look at jobs"
PAST = "What they said and did"
DAEMON = "The daemon and its files"
