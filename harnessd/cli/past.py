"""The verbs that look back: history, runs, events, metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from harnessd.cli import render
from harnessd.cli.choose import Chosen, choose, default_job
from harnessd.cli.client import Client, quoted, reach
from harnessd.cli.options import PAST, Json, Names, NamesOrAll, Tag
from harnessd.cli.outcome import Code, Failure
from harnessd.cli.render import Cell, Grid

past = typer.Typer()

_TIME = "ISO 8601, or relative, as in -15m, -7d"
Since = Annotated[str | None, typer.Option("--since", metavar="TIME", help=f"Not before: {_TIME}.")]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help=f"Before: {_TIME}.")]
Limit = Annotated[int | None, typer.Option("--limit", "-n", metavar="ROWS", min=1, help="At most so many rows (100).")]
Order = Annotated[
    str | None, typer.Option("--order", metavar="ORDER", help="desc, the newest first (default), or asc.")
]
Cursor = Annotated[str | None, typer.Option("--cursor", metavar="CURSOR", help="Go on behind the page that named it.")]
Run = Annotated[int | None, typer.Option("--run", metavar="RUN", help="Of this run alone.")]
Format = Annotated[
    str | None, typer.Option("--format", metavar="FORMAT", help="json, ndjson or csv; the latter two have all rows.")
]


@past.command(rich_help_panel=PAST)
def history(
    context: typer.Context,
    names: NamesOrAll = None,
    tag: Tag = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = None,
    order: Order = None,
    cursor: Cursor = None,
    run: Run = None,
    fields: Annotated[
        str | None, typer.Option("--fields", metavar="PATHS", help="These fields alone, as in pnl,book.bids[0].")
    ] = None,
    every: Annotated[
        str | None, typer.Option("--every", metavar="SPAN", help="One row a span, as in 60s: last, min, max, mean.")
    ] = None,
    format: Format = None,
    as_json: Json = False,
) -> None:
    """Show the statuses that were stored."""
    query = _query(since, until, limit, order, cursor, run) | {"fields": fields, "every": every}
    _show(reach(context), "history", names, tag, query, format, as_json)


@past.command(rich_help_panel=PAST)
def runs(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = None,
    order: Order = None,
    cursor: Cursor = None,
    run: Run = None,
    format: Format = None,
    as_json: Json = False,
) -> None:
    """Show when a job ran and why it ended."""
    _show(reach(context), "runs", names, tag, _query(since, until, limit, order, cursor, run), format, as_json)


@past.command(rich_help_panel=PAST)
def events(
    context: typer.Context,
    names: NamesOrAll = None,
    tag: Tag = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show what happens as it happens.")] = False,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KINDS", help="These kinds alone, as in state,command.")
    ] = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = None,
    order: Order = None,
    cursor: Annotated[
        str | None, typer.Option("--cursor", metavar="CURSOR", help="Go on behind that page; with -f behind that id.")
    ] = None,
    run: Run = None,
    format: Format = None,
    as_json: Json = False,
) -> None:
    """Show what happened: commands, changes of state, reloads, restarts of the server."""
    client = reach(context)
    query = _query(since, until, limit, order, cursor, run) | {"kind": kind}
    if not follow:
        _show(client, "events", names, tag, query, format, as_json)
        return
    if any(query[name] is not None for name in ("since", "until", "limit", "order", "run")) or format:
        raise Failure(Code.USAGE, "cannot use --follow beside the options of a page: it takes --kind and --cursor")
    from harnessd.cli.follow import follow_events

    chosen = choose(client, names or ["*"], tag) if names or tag is not None else Chosen()
    if not chosen.picked:  # of several, the stream itself names none
        for name in chosen.names:
            client.get(f"/jobs/{quoted(name)}/events", {"limit": 1})
    follow_events(client, chosen.names, kind, cursor, as_json)


@past.command(rich_help_panel=PAST)
def metrics(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = None,
    order: Order = None,
    cursor: Cursor = None,
    run: Run = None,
    format: Format = None,
    as_json: Json = False,
) -> None:
    """Show the samples of a job's cpu, memory, threads and descriptors."""
    _show(reach(context), "metrics", names, tag, _query(since, until, limit, order, cursor, run), format, as_json)


def _query(
    since: str | None, until: str | None, limit: int | None, order: str | None, cursor: str | None, run: int | None
) -> dict[str, Any]:
    return {"since": since, "until": until, "limit": limit, "order": order, "cursor": cursor, "run": run}


def _show(
    client: Client,
    what: str,
    names: Sequence[str] | None,
    tag: str | None,
    query: dict[str, Any],
    format: str | None,
    as_json: bool,
) -> None:
    """Print the pages of the jobs as one table, or as the daemon gives them."""
    paths = _paths(client, what, names, tag)
    if query["cursor"] and len(paths) > 1:
        raise Failure(Code.USAGE, "cannot use --cursor for several jobs: it belongs to the pages of one")
    if as_json or format:
        from harnessd.cli.follow import copy_whole

        for path in paths:
            copy_whole(client, path, query | {"format": format or "json"})
        return
    pages = [client.get(path, query).data for path in paths]
    render.show(_grid([row for page in pages for row in page["rows"]]))
    if len(pages) == 1 and pages[0]["next"]:
        typer.echo(f"more: --cursor {pages[0]['next']}", err=True)


def _paths(client: Client, what: str, names: Sequence[str] | None, tag: str | None) -> list[str]:
    if names:
        return choose(client, names, tag).paths(what)
    if tag is not None:
        return choose(client, ["*"], tag).paths(what)
    return [f"/{what}"] if what in ("history", "events") else [f"/jobs/{quoted(default_job(client))}/{what}"]


# rows


def _moment(at: object) -> str:
    """Return a time to the millisecond."""
    return f"{str(at)[:10]} {str(at)[11:23]}Z" if at else render.NOTHING


def _seconds(found: object) -> str:
    return render.age(found) if isinstance(found, int | float) else render.NOTHING


def _bytes(found: object) -> str:
    return render.size(found) if isinstance(found, int | float) else render.NOTHING


_SHOWN: dict[str, Callable[[object], str]] = {
    **dict.fromkeys(("at", "started", "ended", "bucket"), _moment),
    **dict.fromkeys(("wall_s", "cpu_s"), _seconds),
    **dict.fromkeys(("rss_bytes", "peak_rss_bytes"), _bytes),
}
_NUMBERS = {"run", "seq", "id", "pid", "wall_s", "cpu_s", "exit_code", "peak_rss_bytes"} | {
    *("rss_bytes", "cpu_percent", "threads", "fds", "rows")
}


def _grid(rows: Sequence[dict[str, Any]]) -> Grid:
    """Return the rows under the names that they have in the database and in the API."""
    names = list(rows[0]) if rows else ["at"]
    cells = [[Cell(_SHOWN.get(name, render.value)(row[name])) for name in names] for row in rows]
    return Grid([_title(name) for name in names], cells, {_title(name) for name in names if name in _NUMBERS})


def _title(name: str) -> str:
    return name.removesuffix("_s").removesuffix("_bytes").replace("_percent", "%").replace("_", "-").upper()
