"""What an earlier server has found of a run and may be over by now: a new watchdog begins anew, and says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from harnessd.server.entry import Entry, Live
from harnessd.server.notices import ENDS, NoticeKind


class Unsure:
    """Holds what was found, until the run shows that it is over, or the watchdog finds it again."""

    def __init__(self) -> None:
        self._polls: dict[tuple[str, int, str], int] = {}  # by job, run and the event that ends it: polls at first

    def add(self, entry: Entry, run: int | None, kinds: Iterable[NoticeKind]) -> None:
        if entry.live and entry.live.run == run:
            for event in (event for event, kind in ENDS.items() if kind in kinds):
                self._polls[entry.name, run, event] = entry.live.beat()[0]

    def over(self, find: Callable[[str], Entry | None]) -> Iterator[tuple[str, int, str]]:
        """Yield job, run and event of what is over."""
        for key, polls in list(self._polls.items()):
            job, run, event = key
            entry = find(job)
            live = entry.live if entry else None
            known = None  # another run is another story
            if entry and live and live.run == run and not live.ended:
                known = _polls_again(live, polls) if event == "hung-over" else _is_healthy(entry)
                if known is None:
                    continue
            del self._polls[key]
            if known:
                yield key


def _polls_again(live: Live, polls: int) -> bool | None:
    """Return None for not known yet."""
    if live.watch.hung:
        return False
    return True if live.beat()[0] != polls else None


def _is_healthy(entry: Entry) -> bool | None:
    checked = entry.checked
    if checked and checked.told:
        return False
    return True if checked and checked.ok else None
