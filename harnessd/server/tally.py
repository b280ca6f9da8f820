"""Counts what happened to the daemon itself, from what is recorded of it."""

from __future__ import annotations

from harnessd.server.records import Event, Record


class Tally:
    """Is told every record."""

    def __init__(self) -> None:
        self.refused = 0  # requests; those beyond some a second are counted with the next that is recorded
        self.dropped_clients = 0

    def __call__(self, record: Record) -> None:
        if not isinstance(record, Event):
            return
        if record.kind == "refused":
            self.refused += 1 + int(record.data["left_out"])
        elif record.kind == "client-dropped":
            self.dropped_clients += 1
