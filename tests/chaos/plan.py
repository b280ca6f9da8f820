"""What is to go wrong and when: a function of the seed and the length alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

# kind: how often a minute, and the least and the longest that it lasts, seconds
RATES: dict[str, tuple[float, float, float]] = {
    "server-kill": (6, 0, 0),
    "server-replace": (1.5, 0, 0),
    "server-stop": (1.5, 0.1, 3),
    "keeper-kill": (1, 0, 0),
    "keeper-stop": (1.5, 0.1, 2),
    "zygote-kill": (1.5, 0, 0),
    "spare-kill": (1.5, 0, 0),
    "spare-stop": (1.5, 0.1, 2),
    "hangup": (2, 0, 0),
    "job-kill": (12, 0, 0),
    "child-kill": (10, 0, 0),
    "job-stop": (6, 0.1, 4),
    "fork-cut": (2, 0.1, 1),
    "disk-full": (1, 0.5, 6),
    "journals-full": (1, 0.3, 3),
    "descriptors-out": (1, 0.3, 4),
    "database-lock": (1.5, 0.3, 5),
    "job-edit": (6, 0, 0),
    "job-break": (3, 0.5, 6),
    "job-remove": (2, 0.3, 5),
    "settings-break": (1, 0.5, 5),
    "preload": (1, 0, 0),
    "flood": (1.5, 0, 0),
    "connections-cut": (6, 0, 0),
}
_CALM_S = 75.0  # a server is left alone for every second stretch of this length, so that its growth can be seen
_LAST_CALM = 0.2  # and so it is in the last part
_KEEPER_CALM = 0.5  # and the keeper in the last half
_LONG_S = 150.0  # a run shorter than this has no calm


@dataclass(frozen=True, slots=True)
class Fault:
    at_s: float  # since the beginning
    kind: str
    number: int  # says which job, which process, which way
    lasts_s: float = 0.0

    def __str__(self) -> str:
        lasts = f" for {self.lasts_s:.2f} s" if self.lasts_s else ""
        return f"{self.at_s:9.3f} {self.kind} {self.number}{lasts}"


def plan(seed: str, seconds: float, pace: float = 1.0) -> list[Fault]:
    """Return the faults in the order of their times; `pace` multiplies how many there are."""
    faults = []
    for kind, (rate, shortest_s, longest_s) in RATES.items():
        chance = random.Random(f"{seed}/{kind}")
        at_s = chance.expovariate(rate * pace / 60)
        while at_s < seconds:
            fault = Fault(round(at_s, 3), kind, chance.randrange(1 << 30), chance.uniform(shortest_s, longest_s))
            if not _is_calm(kind, at_s, seconds):
                faults.append(fault)
            at_s += chance.expovariate(rate * pace / 60)
    return sorted(faults, key=lambda fault: fault.at_s)


def _is_calm(kind: str, at_s: float, seconds: float) -> bool:
    if seconds < _LONG_S:
        return False
    if kind in ("server-kill", "server-replace", "fork-cut", "descriptors-out"):
        return at_s // _CALM_S % 2 == 1 or at_s > seconds * (1 - _LAST_CALM)
    return kind == "keeper-kill" and at_s > seconds * (1 - _KEEPER_CALM)
