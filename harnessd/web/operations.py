"""What each route is for, what it takes and what it answers: the part of the contract that is not in a type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harnessd.server import shapes
from harnessd.web import parameters as may
from harnessd.web.formats import MEDIA_TYPES
from harnessd.web.parameters import Parameter

DATA = "Data is the body, JSON or a Python literal whatever its content type, or the query: every other parameter."


@dataclass(frozen=True)
class Answer:
    """A good answer: in JSON with a shape, or in text of some media types."""

    description: str
    shape: Any = None
    texts: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """What a route does. `problems` are the statuses of refusals beside those that every route can give."""

    summary: str
    answers: Mapping[int, Answer]
    parameters: tuple[Parameter, ...] = ()
    problems: tuple[int, ...] = ()
    description: str = ""
    data: Any = None  # the schema of a POST's body; None when it takes none
    each: bool = True  # with `all` for a name: one result a job


def _verb(summary: str, data: Any, *problems: int, description: str = "") -> Operation:
    """Return a verb that the job may have to read."""
    answers = {
        200: Answer("the job has read it", shapes.Receipt),
        202: Answer("it is carried out, or on its way to the job", shapes.Receipt),
    }
    told = f"{description} {DATA}".strip()
    return Operation(summary, answers, (may.WAIT,), (409, 413, *problems, 429, 503, 504), told, data)


def _rows(summary: str, page: Any, *more: Parameter, each: bool, description: str = "") -> Operation:
    texts = tuple(media for name, media in MEDIA_TYPES.items() if name != "json")
    answers = {200: Answer("the rows, newest first unless `order` says otherwise", page, texts)}
    return Operation(summary, answers, (*may.PAGE, *more), (409, 422, 503), description, each=each)


ANYTHING: dict[str, Any] = {}
OBJECT = {"type": "object"}

HB = Operation(
    "Tell whether the job is alive, with all that is known from outside",
    {200: Answer("it has a run", shapes.Heartbeat), 503: Answer("it has none", shapes.Heartbeat)},
    description="Never touches the job; figures are at most a second old.",
)
STATUS = Operation(
    "Show the last status",
    {200: Answer("the status; all null when there is none", shapes.Status)},
    (may.AT,),
    (409, 422, 503),
    "Also after the run has ended. With `at`, the one that was the last then.",
)
KILL = Operation(
    "End the run and all its processes",
    {
        200: Answer("nothing of the run is left", shapes.Killed),
        202: Answer("with `wait=0`: it is under way", shapes.Killed),
    },
    (may.WAIT_END, may.GRACE),
    (409,),
    "SIGTERM to all of it, SIGKILL after the grace. The job is not asked.",
)
START = _verb("Start the job", ANYTHING, description="Launches it first when it has no process.")
STOP = _verb("Ask the job to stop", ANYTHING)
PAUSE = _verb("Ask the job to pause", ANYTHING)
RESUME = _verb("Ask the job to go on", ANYTHING)
RESTART = _verb("End the run and start a new one", ANYTHING, description="SIGTERM, the grace, SIGKILL.")
CONFIGURE = _verb(
    "Merge data into the job's config",
    OBJECT,
    422,
    description="For this run and all later ones.",
)
CONFIG = Operation("Show the config", {200: Answer("the config", shapes.Config)})
CLEAR_CONFIG = Operation(
    "Forget what was merged into the config",
    {200: Answer("the config of the next run", shapes.Config)},
    description="A live run goes on with what it has.",
)
STACK = Operation(
    "Show where every thread of a Python job is right now",
    {200: Answer("the threads and their calls", shapes.Stack)},
    (may.ALL_PROCESSES,),
    (409, 503),
    "Read from outside by py-spy (`pip install 'harnessd[stack]'`); the job is not paused.",
)
RUNS = _rows("List the runs: when they ran and why they ended", shapes.RunPage, each=True)
HISTORY = _rows("List the stored statuses", shapes.StatusPage, may.FIELDS, may.EVERY, each=False)
METRICS = _rows("List the samples of cpu, memory, threads and descriptors", shapes.SamplePage, each=True)
EVENTS = Operation(
    "List commands, changes of state and errors, or follow them",
    {
        200: Answer(
            "the rows, newest first unless `order` says otherwise; the events as they happen with `follow=1` or when "
            "text/event-stream is accepted",
            shapes.EventPage,
            (*(media for name, media in MEDIA_TYPES.items() if name != "json"), "text/event-stream"),
        )
    },
    (*may.PAGE, may.KIND_OF, may.FOLLOW_EVENTS, may.LAST_EVENT_ID),
    (409, 422, 503),
    each=False,
)
ALL_HISTORY = Operation(
    "List the stored statuses of all jobs", HISTORY.answers, (*HISTORY.parameters, may.JOB), (404, *HISTORY.problems)
)
ALL_EVENTS = Operation(
    "List the events of all jobs and of the daemon, or follow them",
    EVENTS.answers,
    (*EVENTS.parameters, may.JOB),
    (404, *EVENTS.problems),
)
LOGS = Operation(
    "Show stdout and stderr as they were written",
    {
        200: Answer(
            "the text; with `follow=1` without an end",
            texts=("text/plain; charset=utf-8",),
            headers={
                "X-Log-Start": "the offset of the first byte",
                "X-Log-Offset": "the offset behind the last byte, unless it is followed",
            },
        )
    },
    (may.TAIL, may.SINCE_OFFSET, may.RUN, may.STREAM, may.FOLLOW),
    (409, 503),
    each=False,
)
JOBS = Operation("List the jobs", {200: Answer("the jobs, by their names", shapes.Jobs)}, (*may.CHOICE, may.FULL))
JOB = Operation("Show a job in full, secrets masked", {200: Answer("the job", shapes.Whole)})
RELOAD = Operation(
    "Read the config directory again",
    {200: Answer("what has changed", shapes.Reloaded)},
    problems=(409, 503),
)
HEALTHZ = Operation(
    "Tell the daemon's own health",
    {200: Answer("it is well", shapes.Health), 503: Answer("something is wrong", shapes.Health)},
)
EXPOSITION = Operation(
    "Show the metrics of the jobs and of the daemon, for Prometheus",
    {
        200: Answer(
            "Prometheus's text format, or OpenMetrics when that is accepted",
            texts=(
                "text/plain; version=0.0.4; charset=utf-8",
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            ),
        )
    },
)
INDEX = Operation("Name the jobs", {200: Answer("what is served", shapes.Index)})
OPENAPI = Operation("Describe all this", {200: Answer("this document, OpenAPI 3.1", texts=("application/json",))})
