"""What does not end: output and events as they come, also across a restart of the server, nothing missed or doubled."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from harnessd.cli import render
from harnessd.cli.choose import choose, default_job
from harnessd.cli.client import ANSWER_S, BROKEN, Client, quoted, reach
from harnessd.cli.options import PAST, Names, Tag
from harnessd.cli.outcome import Code, Failure

following = typer.Typer()

_AGAIN_S = 0.2  # until the next try, when a server has ended
_SILENT_S = 60.0  # a stream of events has a heartbeat every 15 s
_PIECE_BYTES = 1 << 16


@following.command(rich_help_panel=PAST)
def logs(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", "-n", metavar="LINES", min=0, help="The last so many lines (200).")
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option("--stream", metavar="STREAM", help="stdout (default) or stderr, if that is kept apart."),
    ] = None,
    since_offset: Annotated[
        int | None, typer.Option("--since-offset", metavar="BYTES", min=0, help="From this offset of the log.")
    ] = None,
    run: Annotated[int | None, typer.Option("--run", metavar="RUN", help="Of this run alone.")] = None,
) -> None:
    """Print what jobs wrote to stdout and stderr, byte for byte."""
    client = reach(context)
    wanted = choose(client, names or (["*"] if tag is not None else None), tag).names or (default_job(client),)
    query = {"stream": stream, "tail": tail, "since_offset": since_offset, "run": run}
    if follow and len(wanted) > 1:
        raise Failure(Code.USAGE, f"cannot follow {len(wanted)} jobs at once: name one")
    for name in wanted:
        if len(wanted) > 1:
            render.say(f"==> {name} <==")
        if follow:
            _follow_log(client, name, query)
        else:
            copy_whole(client, _log_path(name), query)


def _log_path(name: str) -> str:
    return f"/jobs/{quoted(name)}/logs"


def _copy(response: http.client.HTTPResponse) -> int:
    """Print the answer as it comes. Return how many bytes there were; an answer that breaks off just ends."""
    count = 0
    while piece := _next_piece(response):
        render.as_it_is(piece)
        count += len(piece)
    return count


def copy_whole(client: Client, path: str, query: dict[str, Any]) -> None:
    """Print what is answered. Raises Failure when that breaks off."""
    with client.stream(path, query, timeout_s=ANSWER_S) as response:
        while piece := _piece(response):
            render.as_it_is(piece)
        if response.length:  # of what was announced, so much did not come
            raise Failure(Code.UNREACHABLE, "the answer broke off")


def _piece(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_PIECE_BYTES)
    except BROKEN as error:
        raise Failure(Code.UNREACHABLE, f"the answer broke off: {error}") from None


def _next_piece(response: http.client.HTTPResponse) -> bytes:
    try:
        return _piece(response)
    except Failure:
        return b""  # whoever follows asks again from there


def _follow_log(client: Client, name: str, query: dict[str, Any]) -> None:
    """Print the log as it grows. It ends with the run when one was asked for."""
    while True:
        with client.stream(_log_path(name), query | {"follow": 1}) as response:
            start = int(response.headers["x-log-start"])
            offset = start + _copy(response)
        query = query | {"tail": None, "since_offset": offset}
        if query["run"] is not None and client.ask("GET", f"/jobs/{quoted(name)}/hb").data.get("run") != query["run"]:
            copy_whole(client, _log_path(name), query)  # it may have ended after the stream had broken off
            return
        time.sleep(_AGAIN_S)


def follow_events(client: Client, names: Sequence[str], kind: str | None, cursor: str | None, as_json: bool) -> None:
    """Print the events of these jobs, or of all, as they happen."""
    path = f"/jobs/{quoted(names[0])}/events" if len(names) == 1 else "/events"
    last_id = cursor
    while True:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        with client.stream(path, {"follow": 1, "kind": kind}, headers, _SILENT_S) as response:
            for event_id, text in _events(response):
                last_id = event_id or last_id
                if text and (not names or json.loads(text).get("job") in names):
                    render.say(text if as_json else _line(json.loads(text)))
        time.sleep(_AGAIN_S)


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[str, str]]:
    """Yield the id and the data of each event, either of which may be empty, until the stream ends or breaks off."""
    event: dict[str, str] = {}
    while line := _next_line(response):
        name, _, value = line.decode("utf-8", "replace").rstrip("\r\n").partition(":")
        if name:
            event[name] = value.removeprefix(" ")
            continue
        dropped = event.get("event") == "dropped"
        yield event.get("id", ""), "" if dropped else event.get("data", "")
        if dropped:
            return
        event = {}


def _next_line(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.readline()
    except BROKEN:
        return b""  # whoever follows asks again from the last event


def _line(row: dict[str, Any]) -> str:
    at = f"{row['at'][:10]} {row['at'][11:23]}Z"
    said = "" if row["data"] in (None, {}) else "  " + render.value(row["data"])
    by = f"  by {row['actor']}" if row["actor"] else ""
    return f"{at}  {row['job'] or render.NOTHING}  {row['kind']}{said}{by}"
