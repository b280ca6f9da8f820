"""The verbs that look at jobs as they are now: ps, hb, status, stack, top."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from harnessd.cli import render
from harnessd.cli.choose import choose
from harnessd.cli.client import Answer, Client, reach
from harnessd.cli.listing import ask, grid, listed
from harnessd.cli.options import LOOK, All, Every, Json, Names, NamesOrAll, Tag
from harnessd.cli.outcome import Code, Failure, code_of, worst
from harnessd.cli.render import NOTHING

look = typer.Typer()


@look.command(rich_help_panel=LOOK)
def ps(
    context: typer.Context,
    names: NamesOrAll = None,
    tag: Tag = None,
    state: Annotated[str | None, typer.Option("--state", metavar="STATE", help="Every job in this state.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again, until Ctrl-C.")] = False,
    every: Every = 2.0,
    as_json: Json = False,
) -> None:
    """List the jobs."""
    client = reach(context)
    if not watch:
        _list(client, names, tag, state, as_json)
    elif as_json or not render.on_terminal():
        while True:
            _list(client, names, tag, state, as_json)
            time.sleep(every)
    else:
        from rich.live import Live

        with Live(auto_refresh=False, vertical_overflow="ellipsis") as live:
            while True:
                live.update(grid(listed(client, names, tag, state)).rich(), refresh=True)
                time.sleep(every)


def _list(client: Client, names: list[str] | None, tag: str | None, state: str | None, as_json: bool) -> None:
    if as_json and not names:
        render.as_it_is(ask(client, tag, state).body)
    elif as_json:
        jobs = listed(client, names, tag, state)
        render.say(json.dumps({"jobs": jobs}, separators=(",", ":")))
    else:
        render.show(grid(listed(client, names, tag, state)))


@look.command(rich_help_panel=LOOK)
def hb(context: typer.Context, names: Names = None, tag: Tag = None, every: All = False, as_json: Json = False) -> None:
    """Show all that is known of jobs from outside. Exit code 0: they have a process; 1: one has none."""
    answers = _each(reach(context), "hb", names, tag, every)
    if as_json:
        _print(answers)
    else:
        render.say("\n".join(_heartbeat(body) for _, body in _bodies(answers)))
    _leave(Code.FAILED if status == 503 else code_of(status) for status, _ in _bodies(answers))


def _heartbeat(body: dict[str, Any]) -> str:
    process, pulse = body["process"] or {}, body["pulse"] or {}
    polls = f"{pulse['polls']}, the last {render.age(pulse['age_s'])} ago" if pulse.get("polls") else "none"
    lines = {
        "job": body["job"],
        "state": f"{body['state']} (wanted: {body['want']})",
        "pid": body["pid"] or NOTHING,
        "run": body["run"] or NOTHING,
        "uptime": render.age(body["uptime_s"]),
        "restarts": body["restarts"],
        "cpu": f"{process['cpu_percent']:.1f} %" if process else NOTHING,
        "rss": render.size(process.get("rss_bytes")),
        "threads": process.get("threads", NOTHING),
        "fds": process.get("fds", NOTHING),
        "children": process.get("children", NOTHING),
        "process": process.get("status", NOTHING),
        "polls": "waiting for a command" if pulse.get("waiting") else polls,
        "hung": NOTHING if body["hung_s"] is None else f"for {render.age(body['hung_s'])}",
        "check": _checked(body["check"]),
        "unread": f"{body['mailbox']['waiting']} commands",
        "status age": render.age(body["status_age_s"]),
        "last exit": render.exit_in_words(body["last_exit"]),
    }
    return "".join(f"{name:<11} {value}\n" for name, value in lines.items())


def _checked(check: dict[str, Any] | None) -> str:
    if check is None or check["ok"] is None:
        return NOTHING
    return "ok" if check["ok"] else f"failed {check['failures']} times: {render.printable(check['last_error'])}"


@look.command(rich_help_panel=LOOK)
def status(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    every: All = False,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="As of then: ISO 8601, or relative, as in -15m.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the last status of jobs, also of ended ones."""
    answers = _each(reach(context), "status", names, tag, every, {"at": at})
    if as_json:
        _print(answers)
    else:
        render.say(
            "\n".join(_status(body) if code == 200 else f"{body['detail']}\n" for code, body in _bodies(answers))
        )
    _leave(code_of(status) for status, _ in _bodies(answers))


def _status(body: dict[str, Any]) -> str:
    if body["run"] is None:
        return f"{body['job']}: it has said nothing\n"
    head = f"{body['job']}: {body['at']}, run {body['run']}, status {body['seq']} of it\n"
    found = body["status"]
    if not isinstance(found, dict):
        return f"{head}  {render.value(found)}\n"
    width = max((len(key) for key in found), default=0)
    return head + "".join(
        f"  {render.printable(key):<{width}}  {render.value(value)}\n" for key, value in found.items()
    )


@look.command(rich_help_panel=LOOK)
def stack(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    every: All = False,
    subprocesses: Annotated[
        bool, typer.Option("--subprocesses", help="Of every Python process of the run, not of the first alone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show where every thread of Python jobs is right now."""
    answers = _each(reach(context), "stack", names, tag, every, {"all": "1" if subprocesses else None})
    if as_json:
        _print(answers)
    else:
        render.say("\n".join(_stack(status, body) for status, body in _bodies(answers)))
    _leave(code_of(status) for status, _ in _bodies(answers))


def _stack(status: int, body: dict[str, Any]) -> str:
    if status != 200:  # one of several
        return f"{body['detail']}\n"
    lines = []
    for process in body["processes"]:
        lines.append(f"{body['job']}: run {body['run']}, process {process['pid']}")
        for thread in process["threads"]:
            lines.append(f"  {render.printable(thread['name'] or NOTHING)} ({thread['id']}){_doing(thread)}")
            lines += (f"    {_where(frame)}" for frame in thread["frames"])
    return "\n".join(lines) + "\n"


def _doing(thread: dict[str, Any]) -> str:
    return ", has the GIL" if thread["gil"] else ", runs" if thread["active"] else ""


def _where(frame: dict[str, Any]) -> str:
    return render.printable(f"{frame['function']}  {frame['file']}:{frame['line']}")


@look.command(rich_help_panel=LOOK)
def top(
    context: typer.Context,
    tag: Tag = None,
    every: Every = 2.0,
) -> None:
    """Watch all jobs on the full screen. Keys: c cpu, m memory, n name, r restarts, u uptime; q quits."""
    if not (render.on_terminal() and sys.stdin.isatty()):
        raise Failure(Code.USAGE, "cannot show top: it needs a terminal; ps --watch does without")
    from harnessd.cli.top import Top

    Top(reach(context), tag, every).run()


# several jobs


def _each(
    client: Client,
    verb: str,
    names: Sequence[str] | None,
    tag: str | None,
    every: bool,
    query: dict[str, Any] | None = None,
) -> list[Answer]:
    """Return the answers for the jobs. Raises Failure for the first that is a refusal."""
    chosen = choose(client, names, tag, every)
    asked = {"tag": chosen.tag, **(query or {})}
    answers = [client.ask("GET", path, asked) for path in chosen.paths(verb)]
    checked = [answer if _is_heartbeat(answer) else answer.check() for answer in answers]
    chosen.check(_bodies(checked))
    return checked


def _is_heartbeat(answer: Answer) -> bool:
    """Whether it is a job's heartbeat, which says 503 when the job has no process."""
    return answer.status == 503 and "alive" in answer.data


def _bodies(answers: list[Answer]) -> list[tuple[int, dict[str, Any]]]:
    return [each for answer in answers for each in _of(answer)]


def _of(answer: Answer) -> list[tuple[int, dict[str, Any]]]:
    if answer.status != 207:
        return [(answer.status, answer.data)]
    return [(each["status_code"], each["body"]) for each in answer.data["results"]]


def _print(answers: list[Answer]) -> None:
    for answer in answers:
        render.as_it_is(answer.body)


def _leave(codes: Iterable[Code]) -> None:
    if code := worst(codes):
        raise Failure(code)
