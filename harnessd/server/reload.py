"""Brings the supervisor in line with a config directory that has changed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from harnessd.errors import Unavailable
from harnessd.server import policy
from harnessd.server.configdir import Loaded, diff
from harnessd.server.definition import from_file
from harnessd.server.settings import Settings
from harnessd.server.supervisor import Supervisor


def reload(supervisor: Supervisor, loaded: Loaded, settings: Settings) -> dict[str, Any]:
    """Register what was added, redefine what was changed, withdraw what was removed.

    Return which jobs these were, and those that stay as they were because their file is broken. Raises Unavailable.
    """
    if supervisor.ending:
        raise Unavailable("cannot reload: the daemon is ending")
    entries = {entry.name: entry for entry in supervisor.entries()}
    known = {name: entry.definition.spec for name, entry in entries.items() if entry.definition.spec}
    found = diff(known, loaded)
    for name, entry in entries.items():
        entry.problems = found.refused.get(name, [])
    for name in found.removed:
        supervisor.withdraw(entries[name])
    for name in (*found.changed, *found.unchanged):
        entry, returned = entries[name], entries[name].withdrawn
        supervisor.change_rate(entry, settings.history.overridden(loaded.jobs[name].history).max_rate)
        if name in found.changed or returned:
            supervisor.redefine(entry, from_file(loaded.jobs[name], settings.history))
        if returned and entry.definition.autostart:
            supervisor.apply(entry, policy.RestartAsked(), "its file is back")
    for name in found.added:
        entry = supervisor.add(from_file(loaded.jobs[name], settings.history))
        if entry.definition.autostart:
            supervisor.apply(entry, policy.Autostart(), "its file was added")
    answer = asdict(found)
    if loaded.settings_problems:
        answer["refused"] = {**answer["refused"], "harnessd": loaded.settings_problems}
    return answer
