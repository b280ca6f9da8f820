"""The server's own log: what `logging` is told, as lines of logline.py."""

from __future__ import annotations

import logging
import sys

from harnessd import logline

_USUAL = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})


class Formatter(logging.Formatter):
    """One line a record: what was given as `extra` becomes fields, a traceback the field `traceback`."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self._format = format

    def format(self, record: logging.LogRecord) -> str:
        fields = {key: value for key, value in vars(record).items() if key not in _USUAL and value is not None}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return logline.line(self._format, record.levelname.lower(), record.getMessage(), fields, record.created)


def set_up(format: str) -> None:
    """Have all that is logged from `info` up written to stderr; of uvicorn's what is wrong alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(format))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("uvicorn", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
