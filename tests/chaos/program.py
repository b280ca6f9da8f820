"""A program without harnessd, as a `command` job: it appends to its journal, and with `hears` reads its mailbox."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Any

from witness import Voice, Witness

STEP_S = 0.3


class Journal:
    """Appends lines; after one that was cut short, the next begins with a newline."""

    def __init__(self) -> None:
        self._fd = os.open(os.environ["HARNESS_JOURNAL"], os.O_WRONLY | os.O_APPEND)
        self._lead = b""

    def append(self, **said: Any) -> bool:
        line = self._lead + json.dumps(said).encode() + b"\n"
        try:
            whole = os.write(self._fd, line) == len(line)
        except OSError:
            whole = False
        self._lead = b"" if whole else b"\n"
        return whole


def main(name: str, crash: str = "0", hears: str = "") -> int:
    witness = Witness(name)
    journal = Journal()
    voice = Voice(witness, lambda status: journal.append(status=status))
    mailbox = int(os.environ["HARNESS_MAILBOX"])
    while True:
        if witness.chance.random() < float(crash):
            witness.crash()
        voice.say()
        if not hears:
            time.sleep(STEP_S)
        elif select.select([mailbox], [], [], STEP_S)[0] and (packet := os.read(mailbox, 128 << 10)):
            message = json.loads(packet)
            journal.append(ack=message["id"])
            witness.read(message)
            if message["cmd"] == "STOP":
                return witness.leave(0)


sys.exit(main(*sys.argv[1:]))
