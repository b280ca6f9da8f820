"""`make chaos`: CHAOS_SECONDS long (180), from CHAOS_SEED (the time). CHAOS_KEEP names a folder for the files of a
course that found something."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from chaos.course import run


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # with all that is to be ended and removed
    seed = os.environ.get("CHAOS_SEED") or str(int(time.time()))
    seconds = float(os.environ.get("CHAOS_SECONDS") or 180)
    keep = os.environ.get("CHAOS_KEEP")
    print(f"CHAOS_SEED={seed} CHAOS_SECONDS={seconds:g}", flush=True)
    verdict = run(seed, seconds, log=_say, keep=Path(keep).absolute() if keep else None)
    return 1 if verdict.found else 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
