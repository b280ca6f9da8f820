"""The server of many jobs. It reads the configuration and asks for the runs first, and loads web and SQL while the
keeper forks them.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

_ASKED_AT_ONCE = 16  # runs
_FORKED_S = 2.0  # how long web and SQL wait for the forks: what is preloaded may take longer
_BEFORE_RUN_S = 60.0  # how long before a run's start commands for it may have come
_STRAY_GRACE_S = 3.0  # for runs of jobs of which nothing is known any more
_APPLIED = frozenset({"default_job", "history", "notify", "preload"})  # settings that a reload puts in force
SOCKET_NAME = "harnessd.sock"  # in the state directory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from harnessd.server.adoption import Plan
    from harnessd.server.configdir import Loaded
    from harnessd.server.definition import Definition
    from harnessd.server.host import Inventory
    from harnessd.server.jobspec import JobSpec
    from harnessd.server.link import Link
    from harnessd.server.notifier import Notifier
    from harnessd.server.reading import Reader
    from harnessd.server.records import EventKind, Keep, Notice, Record
    from harnessd.server.records import Loaded as Known
    from harnessd.server.settings import Http, Settings
    from harnessd.server.shapes import ReceiverHealth
    from harnessd.server.store import Store
    from harnessd.server.supervisor import Supervisor
    from harnessd.web.call import Context


def main(config_dir: str, log_format: str, control: int) -> int:
    """Be the server. Return the exit code; 2 says that the configuration cannot be used."""
    import gc
    import logging

    gc.disable()  # until it serves: what is loaded and made by then stays

    import uvloop

    from harnessd.errors import ConfigError, HarnessError
    from harnessd.server import logfmt

    logfmt.set_up(log_format)
    log = logging.getLogger(__name__)
    try:
        uvloop.run(Daemon(Path(config_dir)).run(socket.socket(fileno=control)))
    except ConfigError as error:
        for problem in error.problems:
            log.error("%s", problem)
        return 2
    except HarnessError as error:
        log.error("%s", error)
        return 1
    return 0


class Daemon:
    """The server from its first to its last breath."""

    def __init__(self, config_dir: Path) -> None:
        self._config_dir = config_dir
        self._early: list[Record] = []  # what is to be recorded before there is a store
        self._store: Store | None = None
        self._observers: list[Callable[[Record], None]] = []  # are told each record, in the event loop
        self._notifier: Notifier | None = None  # None: nobody is to be told
        self._gone: dict[str, JobSpec] = {}  # jobs whose files went while no server was there
        self._leave = asyncio.Event()
        self._reloading = asyncio.Lock()

    async def run(self, control: socket.socket) -> None:
        """Adopt what is there, start what is wanted, serve until told to leave or until the keeper is gone."""
        from harnessd.server.link import Link

        link = Link(control)
        await self._reloading.acquire()  # a reload that is asked for meanwhile waits until there is what it changes
        link.on_reload = lambda: _spawn_reload(self._reload, link.reloaded)
        try:
            await self._run(link)
        finally:
            link.close()

    async def _run(self, link: Link) -> None:
        from harnessd.server import places
        from harnessd.server.host import EndNote
        from harnessd.server.leftover import end_unheld, with_unstored
        from harnessd.server.logs import Logs
        from harnessd.server.supervisor import Folders, Supervisor
        from harnessd.states import ExitReason, Want

        hello = await link.hello()
        inventory = await link.inventory()
        self._loaded, self._settings = self._configuration(link, inventory)
        settings = self._settings
        state = self._state = _state_dir(inventory, settings)
        places.make_private(state)
        _hold_lock(link, inventory, state, hello["pid"])
        journals = places.journals(settings.journal, places.runtime_dir(settings.runtime_dir), state)
        self._journals = journals
        with suppress(OSError):  # on a read-only filesystem the runs have no output, and run
            (state / "log").mkdir(mode=0o700, exist_ok=True)
        self._logs = Logs(state / "log")
        supervisor = Supervisor(link, Folders(journals, settings.journal_max_bytes, self._logs), self._record)
        self._link, self._hello, self._supervisor = link, hello, supervisor
        supervisor.default_job = settings.default_job
        supervisor.when_stored = self._when_stored
        supervisor.can_store = lambda: self._store is None or self._store.error is None
        supervisor.together = self._together
        link.on_ending = supervisor.shut_down
        link.on_lost = supervisor.lose_host
        link.on_preload_failed = self._on_preload_failed
        listening = [await _listen(link, inventory, settings.http), *_listen_locally(link, inventory, state)]
        link.preload(settings.preload)
        held = [*(run.run for run in inventory.live), *(record.run for record in inventory.exits)]
        known = with_unstored(self._known(), journals, held)
        end_unheld(known, journals, held)
        plan = self._take_over(inventory, known, cold=not hello.get("served", True))
        for run in plan.strays:
            os.close(run.mailbox)
            if not run.end_note:
                link.end(run.run, _STRAY_GRACE_S, EndNote(ExitReason.STOPPED, Want.DOWN))
        if link.ending:
            supervisor.shut_down()
        self._note("server-start", {"pid": os.getpid(), "starts": hello["server_starts"], "error": known.error})
        await self._launch({name: why for name, why in plan.launch.items() if name not in self._gone})
        await self._serve(listening, plan, known)

    def _record(self, record: Record) -> None:
        if self._store:
            self._store.put(record)
        else:
            self._early.append(record)
        for observe in self._observers:
            try:
                observe(record)
            except Exception:  # who watches a job must not change what becomes of it
                import logging

                logging.getLogger(__name__).exception("cannot observe %r", record)

    def _when_stored(self, then: Callable[[], None]) -> None:
        """Call it once all that was recorded so far is committed."""
        from harnessd.server.archive import when_stored

        assert self._store
        when_stored(self._store, then)

    def _together(self) -> AbstractContextManager[object]:
        return self._store.together() if self._store else nullcontext()

    def _note(self, kind: EventKind, data: dict[str, Any], *, actor: str | None = None) -> None:
        import time

        from harnessd.server.records import Event

        self._record(Event(kind, time.time_ns() // 1000, actor=actor, data=data))

    def _on_preload_failed(self, modules: list[str], why: str) -> None:
        import logging

        logging.getLogger(__name__).error("%s; the jobs are forked without %s", why, ", ".join(modules))
        self._note("preload-failed", {"modules": modules, "why": why})

    # the configuration

    def _configuration(self, link: Link, inventory: Inventory) -> tuple[Loaded, Settings]:
        """Return what the files say; a later server falls back on what the one before it could read."""
        import logging
        from dataclasses import replace

        from harnessd.errors import ConfigError
        from harnessd.server import configdir, lastgood

        before = lastgood.read(inventory.stored.get("configuration", []))
        try:
            loaded = configdir.load(self._config_dir, before)
            problems = loaded.settings_problems
        except ConfigError as error:
            if not before:
                raise
            loaded, problems = before, error.problems
        settings = loaded.settings or (before.settings if before else None)
        if settings is None:
            raise ConfigError(problems)
        if before:
            broken = {name: spec for name, spec in before.jobs.items() if name in loaded.problems}
            loaded = replace(loaded, jobs={**broken, **loaded.jobs})
            self._gone = {name: spec for name, spec in before.jobs.items() if name not in loaded.jobs}
        for problem in dict.fromkeys([*problems, *loaded.all_problems()]):
            logging.getLogger(__name__).error("%s", problem)
        for warning in settings.warnings():
            logging.getLogger(__name__).warning("%s", warning)
        lastgood.keep(link, replace(loaded, settings=settings))
        return loaded, settings

    def _definitions(self) -> dict[str, Definition]:
        from harnessd.server.definition import from_file

        jobs = {**self._gone, **self._loaded.jobs}
        return {name: from_file(spec, self._settings.history) for name, spec in jobs.items()}

    # the jobs

    def _known(self) -> Known:
        from harnessd.server import places
        from harnessd.server.desired import load_fast

        if self._settings.database is None:
            return load_fast(self._state / places.DATABASE_NAME)
        return self._open_store().load()

    def _open_store(self, known: Known | None = None) -> Store:
        """Open the store, of which this is known if it was read before."""
        from harnessd.server import places
        from harnessd.server.archive import when_seen
        from harnessd.server.store import Store

        if self._store is None:
            self._store = Store.open(self._settings.database or self._state / places.DATABASE_NAME)
            if (known or self._store.load()).error:
                when_seen(self._store, self._supervisor.learn)
            with self._store.together():
                for record in self._early:
                    self._store.put(record)
            self._early.clear()
        return self._store

    def _take_over(self, inventory: Inventory, known: Known, *, cold: bool) -> Plan:
        """Register the jobs, those that an earlier server has left with their runs. Return what is to be done."""
        import json
        import time

        from harnessd.server.adoption import plan

        definitions, supervisor = self._definitions(), self._supervisor
        found = plan(definitions, known, inventory.live, inventory.exits, cold=cold, now=time.monotonic())
        overrides = {row.name: json.loads(row.overrides) for row in known.jobs if row.removed_us is None}
        supervisor.seen_id(known.last_run)
        for definition in definitions.values():
            entry = supervisor.add(definition, overrides.get(definition.name))
            entry.problems = self._loaded.problems.get(definition.name, [])
        offsets = {run.id: (run.journal_offset, run.journal_lines) for run in (*known.runs, *known.unread)}
        for adopted in found.adopted:
            supervisor.adopt(adopted, *offsets.get(adopted.run.run, (0, 0)))
        for name, job in found.idle.items():
            supervisor.resume_idle(name, job)
        for name in self._gone:
            supervisor.withdraw(supervisor.find(name))
        return found

    async def _launch(self, wanted: dict[str, str]) -> None:
        """Start the jobs, a few at a time: the keeper forks those while the next are got ready."""
        from harnessd.server import policy

        supervisor = self._supervisor
        for number, (name, why) in enumerate(wanted.items(), 1):
            if supervisor.ending:
                break
            supervisor.apply(supervisor.find(name), policy.Autostart(), why)
            if number % _ASKED_AT_ONCE == 0:
                await asyncio.sleep(0)
        await supervisor.forked(_FORKED_S)

    # serving

    async def _serve(self, listening: list[socket.socket], plan: Plan, known: Known) -> None:
        import gc
        import signal

        from harnessd.server.archive import trim_now_and_then
        from harnessd.web.app import guard_policy, make_app
        from harnessd.web.serving import HttpServer

        store = self._open_store(known)
        reader = await self._begin_reading(store, plan, known)
        context = self._context(store)
        server = HttpServer(make_app(context, guard_policy(self._settings.http)), listening, self._settings.http)
        self._renew_tls = server.renew_tls
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._leave.set)
        self._reloading.release()
        await server.start()
        gc.freeze()  # to look through what stays takes 50 ms
        gc.enable()
        self._link.ready()
        _say_serving(self._settings.http, listening[0], len(self._loaded.jobs))
        chores = [
            loop.create_task(_tick(self._supervisor, self._settings.sample_seconds)),
            loop.create_task(trim_now_and_then(store, self._kept)),
        ]
        await self._until_told()
        for chore in chores:
            chore.cancel()
        if self._link.lost.is_set() and await _is_gone(self._hello["pid"]):
            _end_all(self._supervisor)
        context.stopping.set()
        self._supervisor.leave()
        await server.stop()
        if context.history:
            context.history.close()
        reader.close()
        if self._notifier:
            await self._notifier.close()
        if self._supervisor.ending:  # the keeper still holds the lock
            with suppress(OSError):
                (self._state / SOCKET_NAME).unlink()
        await self._logs.close()
        await asyncio.to_thread(store.close)

    async def _begin_reading(self, store: Store, plan: Plan, known: Known) -> Reader:
        """Follow the journals, those that were left behind first."""
        from collections import defaultdict
        from functools import partial

        from harnessd.server.leftover import store_left_over
        from harnessd.server.reading import Reader

        reader = Reader(store, self._on_stored)
        counting = {entry.name for entry in self._supervisor.entries() if entry.definition.counts_lines}
        store_left_over(reader, known, plan.lost, plan.passed.values(), self._record, self._journals, counting)
        for passed in plan.passed:
            self._when_stored(partial(self._link.acknowledge, passed))
        unstored = defaultdict[str, list[int]](list)
        for run in known.runs:
            unstored[run.job].append(run.id)
        for record, _ in plan.passed.values():
            unstored[record.job].append(record.run)
        await self._recall(unstored)
        self._notify()
        self._supervisor.read_with(reader)
        return reader

    def _context(self, store: Store) -> Context:
        """Return what the requests share."""
        from harnessd.server.bodies import health
        from harnessd.server.history import History
        from harnessd.server.tally import Tally
        from harnessd.server.tokens import TokenReader
        from harnessd.web.call import Context
        from harnessd.web.follow import Followers

        history = History(store)
        followers = Followers(history, self._record)
        store.on_committed = followers.committed
        supervisor, hello = self._supervisor, self._hello
        told = health(
            supervisor.entries,
            keeper_pid=hello["pid"],
            server_starts=hello["server_starts"],
            storage=store.health,
            receivers=self._receivers,
        )
        limit = self._settings.http.max_body_bytes
        tally = Tally()
        self._observers.append(tally)
        tokens = TokenReader(self._state)
        error, commits = lambda: store.error, store.commit_times
        return Context(supervisor, told, limit, error, self._reload, history, followers, commits, tally, tokens)

    def _on_stored(self, run: int) -> None:
        from harnessd.server.records import JournalDone

        self._record(JournalDone(run))

    async def _recall(self, unstored: Mapping[str, list[int]]) -> None:
        """Give each job its last status, its last exit and its unread commands back."""
        import logging
        import time

        from harnessd.server.recall import recall

        supervisor = self._supervisor
        started = [entry.live.info.started_at for entry in supervisor.entries() if entry.live]
        since_us = int((min(started, default=time.time()) - _BEFORE_RUN_S) * 1e6)
        assert self._store
        try:
            with self._store.readers.connect() as connection:
                supervisor.recall(recall(connection, since_us), unstored)
        except Exception as error:  # a database that cannot be read is no reason not to serve
            logging.getLogger(__name__).error("cannot recall the jobs' last statuses: %s", error)
            self._store.suspect(error)
        finally:
            supervisor.store_owed()

    def _notify(self) -> None:
        """Tell those that the settings name what happens; what this takes is loaded when they name somebody."""
        receivers = self._settings.notify
        if self._notifier:
            self._notifier.use(receivers)
        elif receivers:
            from harnessd.server.notifier import Notifier

            self._notifier = Notifier(self._supervisor, self._logs, self._record)
            self._notifier.restore(self._undelivered(), receivers)
            self._observers.append(self._notifier.observe)

    def _undelivered(self) -> list[Notice]:
        import logging

        from harnessd.server import outbox

        assert self._store
        try:
            with self._store.readers.connect() as connection:
                return outbox.load(connection)
        except Exception as error:  # what happens from now on can be told all the same
            logging.getLogger(__name__).error("cannot read what was still to be told: %s", error)
            self._store.suspect(error)
            return []

    def _receivers(self) -> list[ReceiverHealth]:
        return self._notifier.health() if self._notifier else []

    async def _until_told(self) -> None:
        waiting = [asyncio.ensure_future(self._leave.wait()), asyncio.ensure_future(self._link.lost.wait())]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()

    def _kept(self) -> tuple[Keep, dict[str, Keep]]:
        """Return how much history is kept, and of the jobs that say so themselves."""
        from harnessd.server.records import Keep

        history = self._settings.history
        kept = {name: history.overridden(spec.history) for name, spec in self._loaded.jobs.items() if spec.history}
        by_job = {name: Keep(each.keep_days, each.keep_rows_per_job) for name, each in kept.items()}
        return Keep(history.keep_days, history.keep_rows_per_job), by_job

    async def _reload(self, actor: str = "SIGHUP") -> dict[str, Any]:
        """Read the config directory again and bring the jobs in line with it. Return what was done."""
        import logging
        from dataclasses import replace
        from itertools import chain

        from harnessd.server import configdir, lastgood
        from harnessd.server.reload import reload

        async with self._reloading:
            loaded = await asyncio.to_thread(configdir.load, self._config_dir, self._loaded)
            settings = loaded.settings or self._settings
            answer = reload(self._supervisor, loaded, settings)
        self._settings = self._settings.with_tls_of(settings)
        self._renew_tls(settings.http.tls)
        answer["restart_needed"] = _needs_new_server(self._settings, settings)
        self._settings = self._settings.model_copy(update={key: getattr(settings, key) for key in _APPLIED})
        self._supervisor.default_job = settings.default_job
        self._notify()
        self._link.preload(settings.preload)
        kept = {entry.name: entry.definition.spec for entry in self._supervisor.entries() if entry.definition.spec}
        self._loaded = replace(loaded, settings=settings, jobs=kept)
        lastgood.keep(self._link, self._loaded)
        self._note("reload", answer, actor=actor)
        log = logging.getLogger(__name__)
        for problem in chain.from_iterable(answer["refused"].values()):
            log.error("%s", problem)
        for warning in settings.warnings():
            log.warning("%s", warning)
        log.info("reloaded", extra={key: len(jobs) for key, jobs in answer.items()})
        return answer


def _state_dir(inventory: Inventory, settings: Settings) -> Path:
    """Return the state directory: the one that the keeper has locked, whatever the settings say by now.

    What is wanted of the jobs is in it, and their output: without it they would not be the same jobs.
    """
    from harnessd.server import places

    wanted = places.state_dir(settings.state_dir)
    for lock in inventory.stored.get("lock", []):
        held = Path(os.readlink(f"/proc/self/fd/{lock}")).parent
        if held.exists() and not (os.path.exists(wanted) and held.samefile(wanted)):
            import logging

            message = "state_dir is %s by now; it stays %s until the daemon itself is ended and started anew"
            logging.getLogger(__name__).error(message, wanted, held)
            return held
    return wanted


def _hold_lock(link: Link, inventory: Inventory, state: Path, keeper_pid: int) -> None:
    """Lock the state directory in the keeper's name; the keeper holds the lock from server to server.

    So does each server to its end: one whose keeper was killed still writes, and the next daemon must wait for it.
    """
    from harnessd.server import places

    held = inventory.stored.get("lock")
    if not held:
        held = [places.lock(state)]
        link.store("lock", held)
    places.sign_lock(held[0], keeper_pid, os.getpid())


async def _listen(link: Link, inventory: Inventory, http: Http) -> socket.socket:
    """Return the listening socket: the one that the keeper holds, unless the settings name another address.

    If that one cannot be had, it stays: jobs without a server are worse off than jobs with one at the old address.
    """
    import logging

    from harnessd.errors import CannotListen
    from harnessd.web.listening import bind, url_of

    name = f"http {http.host} {http.port}"
    if held := inventory.stored.get(name):
        return socket.socket(fileno=held[0])
    other = next((each for each in inventory.stored if each.startswith("http ")), None)
    if other is None:
        listening = bind(http.host, http.port)
        link.store(name, [listening.fileno()])
        return listening
    before = socket.socket(fileno=inventory.stored[other][0])
    host, port = before.getsockname()[:2]
    if port == http.port:  # it would be in the way itself
        before.close()
        await link.release(other)
    try:
        listening = bind(http.host, http.port)
    except CannotListen as error:
        logging.getLogger(__name__).error("%s; it stays at %s", error, url_of(host, port))
        if port != http.port:
            return before
        name, listening = other, bind(host, port)
    before.close()
    link.store(other, [])
    link.store(name, [listening.fileno()])
    return listening


def _listen_locally(link: Link, inventory: Inventory, state: Path) -> list[socket.socket]:
    """Return the socket of the state directory, whose owner gets in without a token: the one that the keeper holds.

    None, if the directory cannot be written: then there is the other one.
    """
    import logging

    from harnessd.errors import CannotListen
    from harnessd.web.listening import bind_unix

    path = state / SOCKET_NAME
    name = f"socket {path}"
    held = inventory.stored.get(name)
    if held and path.is_socket():
        return [socket.socket(fileno=held[0])]
    for fd in held or ():
        os.close(fd)
    try:
        listening = bind_unix(path)
    except CannotListen as error:
        logging.getLogger(__name__).error("%s", error)
        return []
    link.store(name, [listening.fileno()])
    return [listening]


async def _is_gone(keeper_pid: int) -> bool:
    """Return whether the keeper is dead. One that has only closed the connection starts another server."""
    deadline = asyncio.get_running_loop().time() + 1.0
    while os.getppid() == keeper_pid and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.002)  # a process closes its files before its children get another parent
    return os.getppid() != keeper_pid


def _end_all(supervisor: Supervisor) -> None:
    """The keeper was killed: its runs died with it, and what they had started must not stay."""
    import logging

    from harnessd import tree

    tree.end_all({entry.live.info.mark for entry in supervisor.entries() if entry.live})
    logging.getLogger(__name__).error("the keeper was killed; every run has ended with it")


def _needs_new_server(old: Settings, new: Settings) -> list[str]:
    """Return the settings that have changed and are in force only after a restart: of the server (SIGUSR2), or for
    `state_dir` of the daemon."""
    return [key for key in type(new).model_fields if key not in _APPLIED and getattr(old, key) != getattr(new, key)]


def _spawn_reload(reload: Callable[[], Any], then: Callable[[], None]) -> None:
    import logging

    from harnessd.errors import ConfigError, HarnessError

    async def tried() -> None:
        try:
            await reload()
        except ConfigError as error:
            logging.getLogger(__name__).error("cannot reload: %s", error)
        except HarnessError as error:
            logging.getLogger(__name__).error("%s", error)
        finally:
            then()

    task = asyncio.get_running_loop().create_task(tried())
    _reloads.add(task)
    task.add_done_callback(_reloads.discard)


_reloads: set[asyncio.Task[None]] = set()


async def _tick(supervisor: Supervisor, sample_seconds: float) -> None:
    import logging
    from functools import partial

    parts = max(1, round(sample_seconds))
    part = 0
    while True:
        await asyncio.sleep(sample_seconds / parts)
        for look in (supervisor.tick, partial(supervisor.sample, part, parts)):
            try:
                look()
            except Exception:  # or nothing would be watched, rotated and sampled any more
                logging.getLogger(__name__).exception("cannot look after the jobs")
        part = (part + 1) % parts


def _say_serving(http: Http, listening: socket.socket, jobs: int) -> None:
    import logging

    from harnessd.web.listening import url_of

    host, port = listening.getsockname()[:2]
    url = url_of(host, port, tls=bool(http.tls))
    logging.getLogger(__name__).info("serving %d jobs on %s", jobs, url)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
