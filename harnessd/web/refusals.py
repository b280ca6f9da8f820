"""What comes of being refused: it is recorded, and who shows one wrong token after the other has to wait.

Neither may be turned against the daemon: a few refusals a second are recorded at the most, and what is known of
addresses and who waits have limits. Waiting costs a timer and holds nobody else up.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from starlette.exceptions import HTTPException

from harnessd.errors import Refused
from harnessd.server.records import Event, Record

A_SECOND = 5

FREE_FAILURES = 5  # of an address for which nobody waits
FIRST_S = 0.1  # the first wait; each failure doubles it
LONGEST_S = 2.0
FORGOTTEN_S = 60.0  # after the last failure of an address
MOST_ADDRESSES = 1024  # that are remembered
MOST_WAITING = 100
MOST_WAITING_OF_ONE = 4


class Refusals:
    """The guard tells it of each refusal."""

    def __init__(self, record: Callable[[Record], None]) -> None:
        self._record = record
        self._second = 0
        self._in_it = 0
        self._left_out = 0

    def __call__(self, peer: str, path: str, error: Refused) -> None:
        now_ns = time.time_ns()
        if now_ns // 10**9 != self._second:
            self._second, self._in_it = now_ns // 10**9, 0
        self._in_it += 1
        if self._in_it > A_SECOND:
            self._left_out += 1
            return
        data = {"path": path[:200], "kind": error.kind, "why": str(error)[:300], "left_out": self._left_out}
        self._left_out = 0
        self._record(Event("refused", now_ns // 1000, actor=peer[:100] or None, data=data))


@dataclass(slots=True)
class _Address:
    failures: int = 0
    last_at: float = 0.0
    waiting: int = 0


class Slowdown:
    """Has an address wait that has shown wrong tokens."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._addresses: OrderedDict[str, _Address] = OrderedDict()  # the one that failed last is at the end
        self._waiting = 0

    def delay_s(self, address: str) -> float:
        """Return how long a request from that address has to wait before its token is looked at."""
        known = self._addresses.get(_network(address))
        if known is None or known.failures < FREE_FAILURES or self._clock() - known.last_at > FORGOTTEN_S:
            return 0.0
        return float(min(FIRST_S * 2 ** min(known.failures - FREE_FAILURES, 30), LONGEST_S))

    async def wait(self, address: str) -> None:
        """Wait as long as the address has to. Raises HTTPException 429 when too many do so already."""
        delay_s = self.delay_s(address)
        if not delay_s:
            return
        known = self._addresses[_network(address)]
        if known.waiting >= MOST_WAITING_OF_ONE or self._waiting >= MOST_WAITING:
            raise HTTPException(429, "cannot look at this request yet: too many from this address were refused")
        known.waiting += 1
        self._waiting += 1
        try:
            await asyncio.sleep(delay_s)
        finally:
            known.waiting -= 1
            self._waiting -= 1

    def failed(self, address: str) -> None:
        """Note that the address has shown a wrong token, or none."""
        network, now = _network(address), self._clock()
        known = self._addresses.setdefault(network, _Address())
        if now - known.last_at > FORGOTTEN_S:
            known.failures = 0
        known.failures += 1
        known.last_at = now
        self._addresses.move_to_end(network)
        if len(self._addresses) > MOST_ADDRESSES:
            self._addresses.popitem(last=False)


def _network(address: str) -> str:
    """Return what stands for one peer: an IPv4 address, or the /64 of an IPv6 one, all of which a host may have."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if not isinstance(ip, IPv6Address):
        return address
    return str(ip.ipv4_mapped or IPv6Address(int(ip) >> 64 << 64))
