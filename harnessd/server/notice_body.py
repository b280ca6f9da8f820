"""What somebody is told: of each notice its fields, and of all that go together one text for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from harnessd.server.cursor import Cursor
from harnessd.server.entry import Entry
from harnessd.server.logs import Logs, Runs, Stream
from harnessd.server.notices import NoticeKind
from harnessd.server.rotation import Log, RotatedAway
from harnessd.server.timespan import iso

LINES = 10  # of the output
_LINE_CHARS = 500
_OUTPUT_BYTES = 8 << 10
_STATUS_CHARS = 2000
_IN_FULL = 3  # of more notices than these in one text, each is one line
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")  # ECMA-48
_WORDS: dict[NoticeKind, str] = {
    "failed": "failed",
    "oom": "out of memory",
    "hung": "hung",
    "unhealthy": "unhealthy",
    "backoff": "in backoff",
    "crashed": "crashed",
    "recovered": "recovered",
    "exited": "exited",
    "stopped": "stopped",
    "started": "started",
}


def describe(entry: Entry, logs: Logs | None) -> dict[str, Any]:
    """Return what is known of the job now. `log_ends` says how long its output was; the lines are read when needed."""
    ended, live, status = entry.last_exit, entry.live, entry.last_status
    ending = ended.shown() if ended else None
    if ending and ending["error"]:
        ending["error"] = ending["error"][:_STATUS_CHARS]
    return {
        "state": entry.job.state,
        "want": entry.job.want,
        "run": live.run if live else ended.run if ended else None,
        "restarts": entry.job.restarts,
        "tags": list(entry.definition.tags),
        "exit": ending,
        "status": _status(status.text) if status else None,
        "status_at": iso(status.at_us) if status else None,
        "log_ends": _log_ends(entry, logs),
    }


def _status(text: str) -> Any:
    return json.loads(text) if len(text) <= _STATUS_CHARS else text[:_STATUS_CHARS]


def _log_ends(entry: Entry, logs: Logs | None) -> dict[Stream, int]:
    spec = entry.definition.spec
    if logs is None or spec is None:
        return {}
    streams: tuple[Stream, ...] = ("stdout",) if spec.log.merge else ("stderr", "stdout")
    ends: dict[Stream, int] = {}
    for stream in streams:
        try:
            ends[stream] = logs.log(logs.path(entry.name, stream, merge=False)).bounds()[1]
        except OSError:  # there is no log to speak of; what happened matters more
            continue
    return ends


def last_lines(logs: Logs, job: str, run: int | None, ends: Mapping[Stream, int]) -> list[str]:
    """Return the last lines that the run had written then, of stderr if it has a file of its own and says anything."""
    for stream, end in ends.items():
        try:
            lines = as_lines(_read(logs.log(logs.path(job, stream, merge=False)), run, end))
        except (OSError, RotatedAway):
            continue  # it is gone by now
        if lines:
            return lines
    return []


def _read(log: Log, run: int | None, end: int) -> bytes:
    low, there = log.bounds()
    of_run = Runs(log).range_of(run) if run is not None else None
    low, end = max(low, of_run[0] if of_run else 0, end - _OUTPUT_BYTES), min(end, there)
    cursor = Cursor(log, low)
    try:
        data = b""
        while cursor.offset < end and (more := cursor.read(end - cursor.offset)):
            data += more
        return data
    finally:
        cursor.close()


def as_lines(data: bytes) -> list[str]:
    """Return the last lines as a person would have seen them: no colours, no control characters, none too long."""
    text = _ESCAPE.sub("", data.decode(errors="replace")).rstrip()
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")[-LINES:]] if text else []
    return ["".join(c for c in line if c.isprintable() or c == "\t")[:_LINE_CHARS] for line in lines]


def message(host: str, notices: Sequence[Mapping[str, Any]], sent_at: float) -> dict[str, Any]:
    """Return what is sent: one text for all of them, and each with its fields."""
    return {"text": _text(host, notices), "host": host, "sent": iso(int(sent_at * 1e6)), "notices": list(notices)}


def _text(host: str, notices: Sequence[Mapping[str, Any]]) -> str:
    in_full = len(notices) <= _IN_FULL
    return "\n".join(headline(host, each) + (_details(each) if in_full else "") for each in notices)


def headline(host: str, notice: Mapping[str, Any]) -> str:
    """Return what happened, in one line."""
    words = " and ".join(_WORDS[kind] for kind in notice["kinds"][:2])
    still = f"still {words} since {notice['since'][:19]}Z" if notice["reminder"] else words
    return escape(f"{notice['job']} on {host}: {still}{_why(notice)}")


def _why(notice: Mapping[str, Any]) -> str:
    ending, restarts, why = notice["exit"], notice["restarts"], notice.get("why")
    found = [why] if why else []
    if ending and notice["kind"] in ("failed", "oom", "backoff", "crashed"):
        signal, code = ending["signal"], ending["code"]
        found.append(signal or (f"exit code {code}" if code is not None else str(ending["reason"])))
    if restarts and notice["kind"] not in ("stopped", "started"):
        found.append(f"{restarts} restart{'s' if restarts > 1 else ''}")
    return f" ({', '.join(found)})" if found else ""


def _details(notice: Mapping[str, Any]) -> str:
    found = ""
    if notice["status"] is not None:
        status = notice["status"] if isinstance(notice["status"], str) else json.dumps(notice["status"])
        found += f"\nstatus: {escape(status[:_LINE_CHARS])}"
    if notice["log"] and notice["kind"] not in ("recovered", "started"):
        lines = "\n".join(notice["log"]).replace("```", "'''")
        found += f"\n```\n{escape(lines)}\n```"
    return found


def escape(text: str) -> str:
    """Return the text so that a chat shows it as it is and nothing in it calls anybody (Slack's rules for `text`)."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
