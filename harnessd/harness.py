"""One job in the user's own script.

The roles are turned: the user's process is the server. It forks the keeper first, before it loads anything else, so
the keeper and the run inherit the script as it is, the job object included, whatever is in it; and the keeper forks the
run. The harness ends when the job ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from harnessd import tree
from harnessd.errors import ConfigError, HarnessError, KeeperLost, NotAJob
from harnessd.job.conduct import as_cradle, flush_files
from harnessd.job.cradle import Cradle
from harnessd.keeper.loop import Keeper
from harnessd.wire import merged

if TYPE_CHECKING:
    from harnessd.server.archive import ScriptArchive
    from harnessd.server.entry import Entry
    from harnessd.server.link import Link
    from harnessd.server.reading import Reader
    from harnessd.server.records import Record
    from harnessd.server.settings import ScriptSettings
    from harnessd.server.shapes import Health, Storage
    from harnessd.server.supervisor import Supervisor

_OPTIONS = ("-x", "--harness-config")
_harnessing: set[int] = set()  # this process, while it does; a fork has a copy


class ProcessHarness:
    """Runs one Cradle in a process of its own, steered and watched over HTTP.

    `config` has the keys of the settings: name, http, config, kill_grace and the others in docs/config.md. What
    `-x FILE-or-JSON` on the script's command line says is laid over it.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self._config = dict(config or {})

    async def main(self, job: Cradle, *args: str) -> int:
        """Run the job; `args` go to its `run`. Return its exit code, 128 + N when signal N ended it.

        Raises NotAJob, ConfigError, CannotListen and other HarnessErrors before the job is started.
        """
        if not isinstance(job, Cradle):
            raise NotAJob(f"cannot run {_shown(job)}: an object of a class that extends Cradle is wanted")
        given = _take_option(sys.argv)
        _refuse_threads()
        with _only_one():
            control, keeper_pid = _fork_keeper(job)
            try:
                with _quiet_parent():
                    return await _serve(job, self._config, given, list(args), control)
            finally:
                control.close()
                _reap(keeper_pid)


def launch(
    job: Cradle | Callable[..., Any],
    config: Mapping[str, Any] | None = None,
    exit: bool = False,
    args: tuple[str, ...] = (),
) -> int:
    """Harness a Cradle, or any callable, until it ends. Return its exit code, or with `exit` end the script with it.

    A callable that takes an argument is handed a Cradle to call get_msg and set_status of. What stops the start is said
    in one line on stderr, and the code is 2.
    """
    try:
        code = asyncio.run(ProcessHarness(config).main(as_cradle(job), *args))
    except HarnessError as error:
        _say(str(error))
        code = 2
    if exit:
        sys.exit(code)
    return code


# before anything is started


def _take_option(argv: list[str]) -> dict[str, Any]:
    """Take -x and --harness-config out of the arguments. Return what they say; a bad one ends the script."""
    given: dict[str, Any] = {}
    index = 1
    while index < len(argv) and argv[index] != "--":
        name, equals, value = argv[index].partition("=")
        if name not in _OPTIONS:
            index += 1
            continue
        text = value if equals else "".join(argv[index + 1 : index + 2])
        if not text:
            _stop(f"{name} needs a file or inline JSON")
        del argv[index : index + (1 if equals else 2)]
        given = merged(given, _read_option(name, text))
    return given


def _read_option(name: str, text: str) -> dict[str, Any]:
    try:
        if text.lstrip().startswith("{"):
            found = json.loads(text)
        else:
            content = Path(text).read_text(encoding="utf-8")
            found = tomllib.loads(content) if text.endswith(".toml") else json.loads(content)
    except OSError as error:
        _stop(f"cannot read {name} {text!r}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        _stop(f"cannot read {name} {text!r}: {error}")
    if not isinstance(found, dict):
        _stop(f"cannot use {name} {text!r}: an object is wanted")
    return found


def _settings(config: Mapping[str, Any], given: Mapping[str, Any]) -> ScriptSettings:
    from harnessd.server.settings import ScriptSettings

    settings = ScriptSettings.parse(config, "config")
    if not given:
        return settings
    try:
        return ScriptSettings.parse(merged(config, given), _OPTIONS[0])
    except ConfigError as error:
        _stop("; ".join(error.problems))


def _refuse_threads() -> None:
    """A fork copies one thread. What others held, the copy would wait for for ever."""
    others = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    if others or threading.current_thread() is not threading.main_thread():
        raise NotAJob(
            f"cannot start the job: the script runs other threads ({', '.join(others)}), which a fork would not copy; "
            "start them in run()"
        )


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Refuse a second job beside the first, whose signals and descriptors it would share."""
    if os.getpid() in _harnessing:
        raise NotAJob("cannot start the job: this script harnesses another; `harnessd serve` is for several")
    _harnessing.add(os.getpid())
    try:
        yield
    finally:
        _harnessing.discard(os.getpid())


def _stop(why: str) -> NoReturn:
    _say(why)
    raise SystemExit(2)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads stderr; the job goes on all the same
        print(f"harnessd: {text}", file=sys.stderr, flush=True)


def _shown(job: object) -> str:
    return f"the class {job.__name__}" if isinstance(job, type) else type(job).__name__


def _name_of(job: Cradle) -> str:
    return kebab(getattr(job, "__name__", type(job).__name__))


def kebab(name: str) -> str:
    """Return a class's name as a job's: VolTarget is vol-target."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower().replace("_", "-")
    return re.sub(r"[^a-z0-9-]", "", words).strip("-")[:64] or "job"


# the keeper


def _fork_keeper(job: Cradle) -> tuple[socket.socket, int]:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # or what it holds would be written once more by the copy
    flush_files()
    tree.wear_beneath()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of native threads, as a library's pool may have started
        pid = os.fork()
    if pid == 0:
        _be_keeper(job, ours, theirs)
    theirs.close()
    return ours, pid


def _be_keeper(job: Cradle, ours: socket.socket, theirs: socket.socket) -> NoReturn:
    code = 1
    try:
        ours.close()
        os.setsid()  # a Ctrl-C in the terminal is for the script
        _forget_loop()
        code = Keeper(control=theirs, job=job).run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _forget_loop() -> None:
    """Leave the script's event loop, which never runs here; a job that asks for one is to get its own."""
    asyncio._set_running_loop(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # policies go away with Python 3.16
        asyncio.set_event_loop_policy(type(asyncio.get_event_loop_policy())())


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # somebody else has waited for it
        os.waitpid(pid, 0)


@contextlib.contextmanager
def _quiet_parent() -> Iterator[None]:
    """Take SIGINT and SIGTERM for the time of the run, and give them back as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            asyncio.get_running_loop().remove_signal_handler(number)
            if handler is not None:
                signal.signal(number, handler)


# the server


async def _serve(
    job: Cradle, config: Mapping[str, Any], given: Mapping[str, Any], args: list[str], control: socket.socket
) -> int:
    from harnessd.server.definition import from_script
    from harnessd.server.link import Link
    from harnessd.server.reading import Reader
    from harnessd.server.supervisor import Folders, Supervisor
    from harnessd.server.tally import Tally
    from harnessd.web.app import guard_policy, make_app
    from harnessd.web.call import Context
    from harnessd.web.listening import bind, url_of
    from harnessd.web.serving import HttpServer

    settings = _settings(config, given)
    http = settings.http
    listening = bind(http.host, http.port)
    link: Link | None = None
    archive = _archive(settings)
    folder, lock = _journals(settings)
    try:
        link = Link(control)
        hello = await link.hello()
        tally = Tally()
        record = _observed(archive.store.put if archive else _forget, [tally])
        supervisor = Supervisor(link, Folders(folder, settings.journal_max_bytes), record)
        reader = Reader(archive.store if archive else None, on_stored=archive.on_stored if archive else _forget)
        if archive:
            _store_left_over(archive, folder, reader, supervisor)
        supervisor.read_with(reader)
        definition = from_script(settings.name or _name_of(job), settings, args)
        entry = supervisor.add(definition, archive.overrides(definition.name) if archive else None)
        health = _health(entry, hello["pid"], archive)
        past = _past(archive, supervisor, settings.state_dir)
        context = Context(supervisor, health, http.max_body_bytes, tally=tally, **past)
        server = HttpServer(make_app(context, guard_policy(http)), [listening], http)
        await server.start()
        _say(f"{entry.name} listens on {url_of(http.host, listening.getsockname()[1], tls=bool(http.tls))}")
        trimming = asyncio.ensure_future(archive.trim()) if archive else None
        try:
            return await _watch(supervisor, entry, link)
        finally:
            if trimming:
                trimming.cancel()
            context.stopping.set()
            await server.stop()
            if archive:
                await archive.settle()
            reader.close()
    finally:
        if archive:
            await asyncio.to_thread(archive.close)  # what is told of what is stored still has its loop and its link
        if link:
            link.close()
        listening.close()
        if lock >= 0:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


async def _watch(supervisor: Supervisor, entry: Entry, link: Link) -> int:
    """Start the run and wait until nothing is left of it. Return its exit code."""
    from harnessd.server import policy

    loop = asyncio.get_running_loop()

    def end() -> None:
        again = entry.job.is_forced
        supervisor.apply(entry, policy.KillAsked(0.0 if again else None), "the script was told to end")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    gone = entry.gone()
    supervisor.apply(entry, policy.Autostart(), "the script has started")
    lost = asyncio.ensure_future(link.lost.wait())
    await asyncio.wait((gone, lost), return_when=asyncio.FIRST_COMPLETED)
    lost.cancel()
    if not gone.done():
        if entry.live:
            tree.end_all({entry.live.info.mark})
        raise KeeperLost("cannot go on: the keeper was killed, and the job with it")
    ended = entry.last_exit
    assert ended
    said = f"; last status {entry.last_status.text[:500]}" if entry.last_status else ""
    _say(f"{entry.name} {ended.in_words}{said}")
    if ended.signal is not None:
        return 128 + ended.signal
    return ended.code if ended.code is not None else 126


def _forget(_: object) -> None:
    """A script alone keeps no history."""


def _observed(record: Callable[[Record], None], observers: list[Callable[[Record], None]]) -> Callable[[Record], None]:
    def told(each: Record) -> None:
        record(each)
        for observe in observers:
            observe(each)

    return told


def _archive(settings: ScriptSettings) -> ScriptArchive | None:
    """Return where the history goes, if the settings say where."""
    if settings.state_dir is None:
        if settings.journal == "disk":
            raise ConfigError(["config: journal: 'disk' needs a state_dir to lie in"])
        return None
    from harnessd.server.archive import ScriptArchive
    from harnessd.server.records import Keep

    return ScriptArchive(settings.state_dir, Keep(settings.history.keep_days, settings.history.keep_rows_per_job))


def _journals(settings: ScriptSettings) -> tuple[Path, int]:
    """Return the folder of the journals and the lock on it: -1 in place of one where the state directory is locked."""
    from harnessd.server import places

    runtime = places.runtime_dir(settings.runtime_dir)
    if settings.state_dir:
        return places.journals(settings.journal, runtime, settings.state_dir), -1
    return places.of_script(runtime)


def _store_left_over(archive: ScriptArchive, folder: Path, reader: Reader, supervisor: Supervisor) -> None:
    """End and store what a script that was killed has left."""
    from harnessd.server.leftover import end_unheld, store_left_over, with_unstored

    known = with_unstored(archive.known, folder, ())
    end_unheld(known, folder, ())
    store_left_over(reader, known, known.runs, (), supervisor.record, folder)
    supervisor.seen_id(known.last_run)


def _past(archive: ScriptArchive | None, supervisor: Supervisor, state_dir: Path | None) -> dict[str, Any]:
    """Return what the routes need of what lasts: the history, and the tokens."""
    if archive is None or state_dir is None:
        return {}
    from functools import partial

    from harnessd.server.archive import when_seen, when_stored
    from harnessd.server.history import History
    from harnessd.server.tokens import TokenReader
    from harnessd.web.follow import Followers

    history = History(archive.store)
    followers = Followers(history, supervisor.record)
    archive.store.on_committed = followers.committed
    supervisor.when_stored = partial(when_stored, archive.store)
    supervisor.can_store = lambda: archive.store.error is None
    supervisor.together = archive.store.together
    if archive.known.error:
        when_seen(archive.store, supervisor.learn)
    found = {"history": history, "followers": followers, "storage_error": lambda: archive.store.error}
    return found | {"commit_times": archive.store.commit_times, "tokens": TokenReader(state_dir)}


def _health(entry: Entry, keeper_pid: int, archive: ScriptArchive | None) -> Callable[[], Health]:
    from harnessd.server.bodies import health

    storage: Callable[[], Storage] = archive.store.health if archive else lambda: {"ok": True, "kind": "none"}
    return health(lambda: [entry], keeper_pid=keeper_pid, server_starts=1, storage=storage)
