"""The verbs that do something to jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from harnessd.cli import render
from harnessd.cli.choose import Chosen, choose
from harnessd.cli.client import ANSWER_S, Answer, Client, reach
from harnessd.cli.options import MOST_S, STEER, All, Data, Json, Names, Tag, Timeout, Wait
from harnessd.cli.outcome import Code, Failure, code_of, worst

steer = typer.Typer()

_WAIT_S = 30.0
_POLL_S = 0.1
_READ_S = 3600.0  # the longest that the daemon waits for a command to be read
_KILL_S = 0.5  # for the answer to a kill, at the least: it may be a refusal
_AT_ONCE = 16  # requests
_UP = {"running", "paused", "exited"}
_DOWN = {"stopped", "exited", "failed"}
_OVER = {"failed", "backoff", "removed"}  # it will not come up, or not soon
# What --wait waits for: these change the state by themselves, the others are done once the job has read its command.
_UNTIL = {"start": _UP, "restart": _UP, "stop": _DOWN}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of the jobs. `query` goes with the request; `timeout_s` None waits for ever."""

    verb: str
    chosen: Chosen
    data: str | None = None
    method: str = "POST"
    wait: bool = False
    timeout_s: float | None = _WAIT_S
    query: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What has become of it for one job."""

    status: int
    body: dict[str, Any]

    @property
    def code(self) -> Code:
        return code_of(self.status, str(self.body.get("kind")))

    def spared(self, asked: Asked) -> Result:
        """Return it as done when it is refused only for being so already, in a job that nobody has named."""
        is_so = asked.verb in ("stop", "kill") and self.body.get("state") in _DOWN
        return replace(self, status=200) if asked.chosen.picked and self.status == 409 and is_so else self


@steer.command(rich_help_panel=STEER)
def start(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    every: All = False,
    data: Data = None,
    wait: Wait = False,
    timeout: Timeout = _WAIT_S,
    as_json: Json = False,
) -> None:
    """Start jobs, or send START to those that run. --wait: until they are up."""
    _verb(context, "start", names, tag, every, data, wait, timeout, as_json)


@steer.command(rich_help_panel=STEER)
def stop(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    every: All = False,
    data: Data = None,
    wait: Wait = False,
    timeout: Timeout = _WAIT_S,
    as_json: Json = False,
) -> None:
    """Send STOP: the job ends by itself when it has read it. --wait: until it has ended."""
    _verb(context, "stop", names, tag, every, data, wait, timeout, as_json)


@steer.command(rich_help_panel=STEER)
def pause(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    every: All = False,
    data: Data = None,
    wait: Wait = False,
    timeout: Timeout = _WAIT_S,
    as_json: Json = False,
) -> None:
    """Send PAUSE. --wait: until the job has read it."""
    _verb(context, "pause", names, tag, every, data, wait, timeout, as_json)


@steer.command(rich_help_panel=STEER)
def resume(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    every: All = False,
    data: Data = None,
    wait: Wait = False,
    timeout: Timeout = _WAIT_S,
    as_json: Json = False,
) -> None:
    """Send RESUME. --wait: until the job has read it."""
    _verb(context, "resume", names, tag, every, data, wait, timeout, as_json)


@steer.command(rich_help_panel=STEER)
def restart(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    every: All = False,
    wait: Wait = False,
    timeout: Timeout = _WAIT_S,
    as_json: Json = False,
) -> None:
    """End the run (SIGTERM, its grace, SIGKILL) and start a new one. --wait: until that is up."""
    _verb(context, "restart", names, tag, every, None, wait, timeout, as_json)


@steer.command(rich_help_panel=STEER)
def kill(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    every: All = False,
    grace: Annotated[
        float | None, typer.Option("--grace", metavar="SECONDS", min=0, help="Time from SIGTERM to SIGKILL.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when nothing of it is left.")] = True,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", min=0, max=MOST_S, help="How long to wait; for ever by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """End the job's whole process tree, whatever the job does: SIGTERM, a grace, SIGKILL."""
    client = reach(context)
    query = (("grace", grace), ("wait", None if wait else 0))
    carry_out(
        client, Asked("kill", choose(client, names, tag, every), wait=wait, timeout_s=timeout, query=query), as_json
    )


@steer.command(rich_help_panel=STEER)
def config(
    context: typer.Context,
    names: Names = None,
    tag: Tag = None,
    every: All = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key to override; the value is JSON, or else a string."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="JSON", help="An object of keys to override; JSON or a Python literal."),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Forget the overrides.")] = False,
    wait: Wait = False,
    timeout: Timeout = _WAIT_S,
    as_json: Json = False,
) -> None:
    """Show a job's config, or override keys of it, for later runs too. --wait: until the job has read it."""
    if sum((bool(settings), data is not None, clear)) > 1:
        raise Failure(Code.USAGE, "cannot use --set, --data and --clear together: take one")
    client = reach(context)
    chosen = choose(client, names, tag, every)
    body = json.dumps(dict(map(_setting, settings))) if settings else data
    if clear:
        carry_out(client, Asked("config", chosen, method="DELETE"), as_json)
    elif body is not None:
        carry_out(client, Asked("config", chosen, body, wait=wait, timeout_s=timeout), as_json)
    else:
        carry_out(client, Asked("config", chosen, method="GET"), as_json)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise Failure(Code.USAGE, f"cannot use --set {text!r}: KEY=VALUE is wanted")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _verb(
    context: typer.Context,
    verb: str,
    names: Sequence[str] | None,
    tag: str | None,
    every: bool,
    data: str | None,
    wait: bool,
    timeout: float,
    as_json: bool,
) -> None:
    client = reach(context)
    carry_out(client, Asked(verb, choose(client, names, tag, every), data, wait=wait, timeout_s=timeout), as_json)


def carry_out(client: Client, asked: Asked, as_json: bool) -> None:
    """Ask, wait if that is wanted, and tell what has become of it. Raises Failure with the code of what failed."""
    jobs = ", ".join(asked.chosen.names) or ("every job" if asked.chosen.every else "the job")
    with render.progress(f"{asked.verb} {jobs} …") as say:
        answers = _answers(client, asked)
        results = [result.spared(asked) for answer in answers for result in _results(answer)]
        ends = _wait(client, asked, results, say) if asked.wait and asked.verb in _UNTIL else {}
    if as_json:
        for answer in answers:
            render.as_it_is(answer.body)
    else:
        _tell(results, ends)
    asked.chosen.check(results)
    late = {name: state for name, state in ends.items() if state not in _UNTIL[asked.verb]}
    for name, state in late.items():
        after = state if state in _OVER else f"still {state} after {asked.timeout_s:g} s"
        typer.echo(f"harnessd: {name}: {after}", err=True)
    code = worst([*(result.code for result in results), *(Code.FAILED for _ in late)])
    if code:
        raise Failure(code)


def _answers(client: Client, asked: Asked) -> list[Answer]:
    """Return an answer for each request, in their order; several are made at once."""
    query = {"tag": asked.chosen.tag} | dict(asked.query)
    timeout_s: float | None = ANSWER_S
    if asked.wait and asked.verb == "kill":
        timeout_s = asked.timeout_s if asked.timeout_s is None else max(asked.timeout_s, _KILL_S)
    elif asked.wait and asked.verb not in _UNTIL:
        wait_s = min(asked.timeout_s or 0, _READ_S)
        query["wait"] = f"{wait_s:.3f}"
        timeout_s = wait_s + ANSWER_S

    def ask(path: str) -> Answer:
        return client.ask(asked.method, path, query, asked.data, timeout_s)

    paths = asked.chosen.paths(asked.verb)
    if len(paths) == 1:
        return [ask(paths[0])]
    client.locate()
    return _at_once(ask, paths)


def _at_once(ask: Callable[[str], Answer], paths: Sequence[str]) -> list[Answer]:
    """Return the answers, several at a time. Threads that still wait for one do not outlive the program."""
    from concurrent.futures import Future
    from threading import Thread

    answers: list[Future[Answer]] = [Future() for _ in paths]
    left = iter(zip(answers, paths, strict=True))

    def work() -> None:
        for answer, path in left:
            try:
                answer.set_result(ask(path))
            except Exception as error:  # the future takes it to whoever waits
                answer.set_exception(error)

    for _ in paths[:_AT_ONCE]:
        Thread(target=work, daemon=True).start()
    return [answer.result() for answer in answers]


def _results(answer: Answer) -> list[Result]:
    if answer.status == 207:
        return [Result(each["status_code"], each["body"]) for each in answer.data["results"]]
    return [Result(answer.status, answer.data)]


def _wait(client: Client, asked: Asked, results: list[Result], say: Callable[[str], object]) -> dict[str, str]:
    """Return the states of the jobs once they have the one that is wanted, or will not, or the time is over."""
    goal = _UNTIL[asked.verb]
    deadline = time.monotonic() + (asked.timeout_s or 0)
    states = {result.body["job"]: str(result.body["state"]) for result in results if not result.code}
    waiting = set(states)
    while waiting:
        listed = {job["name"]: job["state"] for job in client.get("/jobs").data["jobs"]}
        states |= {name: listed.get(name, "removed") for name in waiting}
        settled = goal | _OVER
        waiting = {name for name in waiting if states[name] not in settled}
        if not waiting or time.monotonic() >= deadline:
            break
        say(
            f"{asked.verb}: {len(states) - len(waiting)} of {len(states)}, waiting for {', '.join(sorted(waiting)[:8])}"
        )
        time.sleep(_POLL_S)
    return states


def _tell(results: list[Result], ends: dict[str, str]) -> None:
    configs = [result.body for result in results if "effective" in result.body]
    if configs:
        render.show(render.Grid(("JOB", "KEY", "FROM", "VALUE"), [row for body in configs for row in _config(body)]))
    for result in results:
        if result.code:
            typer.echo(f"harnessd: {result.body.get('detail')}", err=True)
        elif "effective" not in result.body:
            render.say(f"{result.body['job']}: {_outcome(result.body, ends)}")


def _outcome(body: dict[str, Any], ends: dict[str, str]) -> str:
    if body.get("exit"):
        return render.exit_in_words(body["exit"])
    if body["job"] in ends:
        return ends[body["job"]]
    told = ", the job has read it" if body.get("read") else ", sent to the job" if body.get("queued") else ""
    return f"{body['state']}{told}"


def _config(body: dict[str, Any]) -> list[list[render.Cell]]:
    """Return a row for each key in force."""
    return [
        [
            render.Cell(body["job"]),
            render.Cell(render.printable(key)),
            render.Cell("override" if key in body["overrides"] else "file"),
            render.Cell(render.value(value)),
        ]
        for key, value in body["effective"].items()
    ]
