"""One course of chaos from its seed to its verdict."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from chaos.causes import judge_causes
from chaos.clients import CLIENTS, Client
from chaos.daemon_oracle import judge_daemon
from chaos.driver import Driver
from chaos.ground import Ground
from chaos.oracle import Verdict, judge_job
from chaos.plan import plan
from chaos.processes import Table, Watch
from chaos.proxy import Proxy
from chaos.rest import Rest
from chaos.story import Story

_BOOT_S = 30.0


def run(
    seed: str, seconds: float, pace: float = 1.0, log: Callable[[str], None] = print, keep: Path | None = None
) -> Verdict:
    """Let chaos reign for so long, heal everything and return what was wrong. `keep` gets a copy of all files."""
    ground = Ground(seed)
    try:
        verdict, done = _fight(ground, seed, seconds, pace, log)
        verdict.merge(_judge(Story(ground.facts, ground.database, ground.log)))
        _tell(verdict, done, log)
        if keep and verdict.found:
            ground.keep(keep)
        return verdict
    finally:
        ground.close()


def _judge(story: Story) -> Verdict:
    verdict = Verdict()
    if damage := story.damage():
        verdict.wrong(f"the database is damaged: {'; '.join(damage)}")
        return verdict
    for job in story.jobs:
        verdict.merge(judge_job(story, job))
        verdict.merge(judge_causes(story, job))
    verdict.merge(judge_daemon(story))
    return verdict


def _fight(
    ground: Ground, seed: str, seconds: float, pace: float, log: Callable[[str], None]
) -> tuple[Verdict, Counter[str]]:
    verdict, over = Verdict(), threading.Event()
    keeper = ground.init
    table = Table(ground.brand, ground.runtime.folder, lambda: keeper.pid)
    watch = Watch(table, lambda: keeper.pid, ground.driver)
    proxy = Proxy(ground.port, seed)
    clients = [Client(ground, number, seed, proxy.port, over) for number in range(CLIENTS)]
    driver = Driver(ground, table, proxy, log)
    try:
        ground.init.start()
        if not ground.init.has_served.wait(_BOOT_S):
            raise RuntimeError(f"the daemon does not come up:\n{ground.log.read_text()}")
        proxy.start()
        watch.start()
        for client in clients:
            client.thread.start()
        try:
            driver.run(plan(seed, seconds, pace), seconds)
        finally:
            over.set()
            for client in clients:
                client.thread.join()
            driver.heal()
        began = time.monotonic()
        Rest(ground, table, verdict).come()
    finally:
        proxy.close()
        watch.close()
    verdict.looked_at["requests"] = sum(client.requests for client in clients)
    verdict.looked_at["scans of the process table"] = watch.scans
    verdict.notes.append(f"came to rest in {time.monotonic() - began:.1f} s")
    if any(driver.missed.values()):
        verdict.notes.append(f"faults that met nothing: {dict(driver.missed)}")
    return verdict, driver.done + Counter({"connections cut by chance": proxy.cuts})


def _tell(verdict: Verdict, done: Counter[str], log: Callable[[str], None]) -> None:
    for title, counts in (("injected", done), ("looked at", verdict.looked_at), ("excused", verdict.excused)):
        log(f"{title}:")
        for what, times in sorted(counts.items()):
            log(f"  {times:8d}  {what}")
    for note in verdict.notes:
        log(note)
    log(f"wrong: {len(verdict.found)}")
    for what in verdict.found:
        log(f"  {what}")
