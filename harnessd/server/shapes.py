"""What the routes answer, as types: who makes an answer is held to its shape, and the HTTP contract is made of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from harnessd.states import ExitReason, State, Want

# An ISO 8601 time, UTC, with microseconds.
Moment = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class Process(TypedDict):
    """What a run's first process uses."""

    cpu_percent: Annotated[float, Field(description="of one core")]
    rss_bytes: int
    threads: int
    fds: int
    children: Annotated[int, Field(description="its descendants, as far as 256 threads tell of them")]
    status: Annotated[str, Field(description="running, sleeping, stopped, zombie, ...")]


class Pulse(TypedDict):
    """How often a run asks for messages."""

    polls: Annotated[int, Field(description="how often it called `get_msg`")]
    age_s: Annotated[float | None, Field(description="seconds since, null if it never did")]
    waiting: Annotated[bool, Field(description="it is in one")]


class Check(TypedDict):
    """What the checks of a job have said."""

    ok: Annotated[bool | None, Field(description="the last one; null before the first of the run")]
    failures: Annotated[int, Field(description="in a row")]
    last_error: Annotated[str | None, Field(description="why the last one failed")]
    at: Annotated[Moment | None, Field(description="of the last one")]


class Mailbox(TypedDict):
    """What waits for a run."""

    waiting: Annotated[int, Field(description="commands that it has not read")]


class Ending(TypedDict):
    """How a run ended."""

    run: int
    code: Annotated[int | None, Field(description="its exit code, null when a signal ended it")]
    signal: Annotated[str | None, Field(description="the signal's name, as in SIGKILL")]
    reason: ExitReason
    at: Moment
    error: Annotated[str | None, Field(description="what the job said of it")]


class Vitals(TypedDict):
    """What is known of a job from outside, without asking it."""

    job: str
    state: State
    want: Want
    alive: Annotated[bool, Field(description="it has a run")]
    pid: Annotated[int | None, Field(description="of the run's first process")]
    run: Annotated[int | None, Field(description="the run's number")]
    uptime_s: Annotated[float | None, Field(description="age of the run by the kernel's clock")]
    restarts: Annotated[int, Field(description="how often a run was started that nobody asked for")]
    process: Annotated[Process | None, Field(description="what the run's first process uses; at most a second old")]
    limits: Annotated[
        dict[str, str] | None, Field(description="how each limit of the run is enforced: cgroup, rlimit or none")
    ]
    pulse: Annotated[Pulse | None, Field(description="how often it asks for messages")]
    hung_s: Annotated[float | None, Field(description="seconds without a poll, once its watchdog takes it for hung")]
    check: Annotated[Check | None, Field(description="what its checks have said; null without a check or a run")]
    status_age_s: Annotated[float | None, Field(description="seconds since its last status")]
    mailbox: Annotated[Mailbox, Field(description="what waits for it")]
    last_exit: Annotated[Ending | None, Field(description="how the run before ended")]
    time: Annotated[Moment, Field(description="of this answer")]


class Heartbeat(Vitals):
    """What is known of a job from outside, and whether its history can be stored."""

    storage: Annotated[str, Field(description="`ok`, or why nothing can be stored now; the journals hold it meanwhile")]


class Summary(TypedDict):
    """A job's line in the list of all."""

    name: str
    state: State
    want: Want
    pid: int | None
    uptime_s: float | None
    restarts: int
    last_exit: Ending | None
    tags: list[str]


class FullSummary(Summary):
    """A job's line with what a table of all jobs shows."""

    cpu_percent: Annotated[float | None, Field(description="of one core")]
    rss_bytes: int | None
    status_age_s: Annotated[float | None, Field(description="seconds since its last status")]
    status_text: Annotated[str | None, Field(description="the last status as JSON, its first 500 characters")]


class Jobs(TypedDict):
    """All jobs, by their names."""

    jobs: Annotated[list[FullSummary | Summary], Field(description="with `full=1` the longer of the two")]


class Config(TypedDict):
    """The config of a job, and what it is made of."""

    job: str
    file: Annotated[dict[str, Any], Field(description="what its file says")]
    overrides: Annotated[dict[str, Any], Field(description="what `config` was told since")]
    effective: Annotated[dict[str, Any], Field(description="both merged")]


class Status(TypedDict):
    """A status of a job; all but `job` is null when there is none."""

    job: str
    run: int | None
    seq: Annotated[int | None, Field(description="its number within the run")]
    at: Moment | None
    status: Annotated[Any, Field(description="whatever the job reported")]


class Whole(Vitals):
    """A job in full."""

    name: str
    tags: list[str]
    spec: Annotated[dict[str, Any], Field(description="its file as it is in force, secrets masked")]
    problems: Annotated[list[str], Field(description="why its file on disk is not in force")]
    config: Config
    status: Status


class Frame(TypedDict):
    """A call under way."""

    function: str
    file: str
    line: int


class Thread(TypedDict):
    """Where a thread is."""

    id: Annotated[int | None, Field(description="the kernel's number of it")]
    name: str | None
    active: Annotated[bool, Field(description="it is on a CPU, or wants to be")]
    gil: Annotated[bool, Field(description="it holds the interpreter's lock")]
    frames: Annotated[list[Frame], Field(description="the innermost first")]


class Spied(TypedDict):
    """A Python process of a run."""

    pid: int
    threads: Annotated[list[Thread], Field(description="the main one first")]


class Stack(TypedDict):
    """Where every thread of a run is."""

    job: str
    run: int
    processes: Annotated[list[Spied], Field(description="the run's first process; with `all=1` each that is Python")]


class Receipt(TypedDict):
    """What has become of a command."""

    id: Annotated[int, Field(description="the command's number")]
    job: str
    verb: str
    state: Annotated[State, Field(description="of the job now")]
    queued: Annotated[bool, Field(description="it went into the mailbox, or will once the run is there")]
    read: Annotated[bool | None, Field(description="null when nobody waited for it")]


class Killed(TypedDict):
    """What has become of a kill."""

    job: str
    verb: str
    state: State
    exit: Annotated[Ending | None, Field(description="how the last run ended; null with `wait=0`")]


class Result(TypedDict):
    """What one of several jobs answered."""

    job: str
    status_code: int
    body: dict[str, Any]


class Results(TypedDict):
    """What each of several jobs answered."""

    results: list[Result]


class StatusRow(TypedDict):
    """A stored status; the keys from `bucket` on with `every=`."""

    at: Moment
    job: str
    run: int
    seq: int
    status: Annotated[Any, Field(description="whatever the job reported, or the `fields` of it")]
    bucket: NotRequired[Annotated[Moment, Field(description="the start of the length of time")]]
    rows: NotRequired[Annotated[int, Field(description="how many statuses it has")]]
    min: NotRequired[Annotated[dict[str, float | None], Field(description="of each number in the statuses")]]
    max: NotRequired[dict[str, float | None]]
    mean: NotRequired[dict[str, float | None]]


class RunRow(TypedDict):
    """A run: when it ran and why it ended."""

    run: int
    job: str
    pid: int
    started: Moment
    ended: Moment | None
    wall_s: float | None
    exit_code: int | None
    signal: Annotated[int | None, Field(description="the signal's number")]
    reason: ExitReason | None
    cpu_s: float | None
    peak_rss_bytes: int | None


class EventRow(TypedDict):
    """An event: a command, a change of state, an error."""

    at: Moment
    id: int
    job: Annotated[str | None, Field(description="null for one of the daemon itself")]
    run: int | None
    kind: str
    actor: Annotated[str | None, Field(description="who asked for it")]
    data: Any


class SampleRow(TypedDict):
    """What a run used at a moment."""

    at: Moment
    job: str
    run: int
    cpu_percent: float
    rss_bytes: int
    threads: int
    fds: int


class StatusPage(TypedDict):
    """Stored statuses."""

    rows: list[StatusRow]
    next: Annotated[str | None, Field(description="the `cursor` to the rows behind these")]


class RunPage(TypedDict):
    """Runs."""

    rows: list[RunRow]
    next: str | None


class EventPage(TypedDict):
    """Events."""

    rows: list[EventRow]
    next: str | None


class SamplePage(TypedDict):
    """Samples."""

    rows: list[SampleRow]
    next: str | None


class Storage(TypedDict, total=False):
    """Whether the database works; a script without one has `ok` and `kind` alone."""

    ok: bool
    kind: str
    error: str | None
    since_us: Annotated[int | None, Field(description="of the first failure, while it lasts")]
    last_commit_s: Annotated[float | None, Field(description="seconds since the last commit")]
    commits: int
    commit_s_sum: float
    commit_s_last: float
    queue: Annotated[int, Field(description="records that wait to be stored")]
    lines_waiting: Annotated[int, Field(description="lines of journals that wait to be stored")]
    dropped: Annotated[int, Field(description="records that were given up")]
    wal_bytes: int


class ReceiverHealth(TypedDict):
    """How somebody is told what happens to jobs."""

    receiver: Annotated[str, Field(description="its name")]
    waiting: Annotated[int, Field(description="notices that it has not taken yet")]
    error: Annotated[str | None, Field(description="why the last message did not reach it, null when it did")]


class Health(TypedDict):
    """The daemon's own health."""

    status: Annotated[str, Field(description="`ok`, or what is wrong")]
    server_pid: int
    keeper_pid: int
    server_starts: Annotated[int, Field(description="how often the keeper has started a server")]
    uptime_s: Annotated[float, Field(description="of the server")]
    version: str
    jobs: Annotated[dict[str, int], Field(description="how many there are in each state")]
    storage: Storage
    tokens: NotRequired[Annotated[str, Field(description="`ok`, or why none of tokens.json gets in")]]
    notify: NotRequired[Annotated[list[ReceiverHealth], Field(description="those that are told what happens to jobs")]]


class Problem(TypedDict):
    """A refusal or an error, as RFC 9457 has it."""

    type: Literal["about:blank"]
    title: Annotated[str, Field(description="the status in words")]
    status: int
    detail: Annotated[str, Field(description="what could not be done, and why")]
    kind: Annotated[str, Field(description="what a program tests for")]
    job: NotRequired[str]
    state: NotRequired[Annotated[State, Field(description="of the job")]]


class Reloaded(TypedDict):
    """What a reload has done: names of jobs."""

    added: list[str]
    changed: list[str]
    removed: list[str]
    unchanged: list[str]
    restart_needed: Annotated[
        list[str], Field(description="settings that only a new server takes up; `state_dir`: a new daemon")
    ]
    refused: Annotated[
        dict[str, list[str]], Field(description="those left as they were, as their files are broken; with the reasons")
    ]


class Index(TypedDict):
    """What is served."""

    harnessd: Annotated[str, Field(description="the version")]
    jobs: Annotated[list[str], Field(description="the paths of the jobs")]
    health: str
    contract: str
