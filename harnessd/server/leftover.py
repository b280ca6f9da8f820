"""Stores what runs said, and that they ended, when no server was there to see it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from pathlib import Path

from harnessd import tree
from harnessd.server.adoption import Passed
from harnessd.server.places import journals_in, journals_of
from harnessd.server.reading import Reader
from harnessd.server.records import JournalDone, Loaded, Record, RunEnded, RunStarted
from harnessd.server.supervisor import run_ended, run_started
from harnessd.server.tape import Tape
from harnessd.states import ExitReason

_log = logging.getLogger(__name__)


def with_unstored(known: Loaded, folder: Path, held: Iterable[int]) -> Loaded:
    """Return what is known, and besides the runs of which there is a journal and nothing else: whoever started them
    died before it was stored. `held` are those that the keeper has."""
    if known.error:  # what it holds is not known now, and will be when it can be read
        return known
    seen = {run.id for run in (*known.runs, *known.unread)} | known.ended | set(held)
    found = [
        RunStarted(run, job, 0, 0, mark, "", run * 1000, str(path))  # a run's id is its time in milliseconds
        for run, mark, job, path in journals_in(folder)
        if run not in seen
    ]
    return replace(known, runs=(*known.runs, *found), last_run=max([known.last_run, *(run.id for run in found)]))


def end_unheld(known: Loaded, folder: Path, held: Container[int]) -> None:
    """End what is left of runs that the keeper does not have: another held them, and was killed. `known` is with the
    unstored; where it could not be read, the journals tell of all runs."""
    marks = {run.id: run.mark for run in known.runs}
    if known.error:
        marks = {run: mark for run, mark, _, _ in journals_in(folder)}
    if left := {mark for run, mark in marks.items() if run not in held}:
        tree.end_all(left)


def store_left_over(
    reader: Reader,
    known: Loaded,
    lost: Iterable[RunStarted],
    passed: Iterable[Passed],
    record: Callable[[Record], None],
    journals: Path,
    counting: Container[str] = (),
) -> None:
    """Read what is left in the journals of runs that ended before: those that the keeper's death has ended (`lost`),
    those whose exits need nothing but to be stored (`passed`), and those whose ends were stored before their words.

    The lines of commands have no numbers of their own: they are counted, as they are while such a run lives. What a job
    was is stored; `counting` tells the commands of now, for jobs of which nothing is."""
    now_us = time.time_ns() // 1000
    lost = list(lost)
    for run in lost:
        record(run)
        record(RunEnded(run.id, now_us, reason=ExitReason.LOST))
    specs = {row.name: row.spec for row in known.jobs}
    unfinished = {run.id: run for run in known.runs}
    ended = [each for each in passed if each.record.run not in known.ended]
    paths = journals_of(journals, {each.record.run for each in ended}.difference(unfinished))
    started = [unfinished.get(each.record.run) or run_started(each.record, paths[each.record.run]) for each in ended]
    for run, each in zip(started, ended, strict=True):
        record(run)
        record(run_ended(*each))
    for run in (*lost, *known.unread, *started):
        path = Path(run.journal)
        try:
            spec = json.loads(specs.get(run.job, "{}"))
            counts = spec["command"] is not None if "command" in spec else run.job in counting
            tape = Tape(path, run.id, offset=run.journal_offset, lines=run.journal_lines, counts_lines=counts)
        except FileNotFoundError:  # it lay in memory, and the host was restarted
            record(JournalDone(run.id))
            continue
        except OSError as error:
            _log.error("cannot read the journal of run %s, the next server will try again: %s", run.id, error)
            continue
        reader.follow(run.id, tape, path, lambda _: None, math.inf)
        reader.finish(run.id, lambda: None)
