"""Who is connected, and who has to go when the house is full.

A newcomer is let in, and the connection that has waited longest for a request is closed in its place. That serves
honest clients best: an idle connection may be closed at any time (RFC 9112, 9.5), and whoever kept it connects again
without noticing, while a 503 is an error that somebody sees. Ten thousand idle connections so push out one another, and
not the client that comes after them. How long one has waited counts from its last answer, not from its last byte: a
request that drips in does not keep its place. Only where every connection has a request under way is a newcomer told
503.

The same goes among the connections of one peer, so that one peer cannot have all the room.
"""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Protocol

_IPV6_SITE_BITS = 64  # what one customer has at least (RFC 6177): its addresses are one peer


class Guest(Protocol):
    """A connection, be it still in its TLS handshake."""

    peer: str

    @property
    def is_reading(self) -> bool:
        """Whether it is still taking its last answer."""

    def cut(self) -> None:
        """Close it at once."""


class Room:
    """Counts connections: so many at most, and so many of one peer."""

    def __init__(self, most: int, most_of_peer: int) -> None:
        self._most = most
        self._most_of_peer = most_of_peer
        self._guests: set[Guest] = set()
        self._waiting: dict[Guest, None] = {}  # for a request; the longest first
        self._of_peer: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._guests)

    def enter(self, guest: Guest) -> bool:
        """Count the connection in, which waits for its first request. Return False when there is no room for it."""
        if self._of_peer[guest.peer] >= self._most_of_peer and not self.make_room(guest.peer):
            return False
        if len(self._guests) >= self._most and not self.make_room():
            return False
        self._guests.add(guest)
        self._of_peer[guest.peer] += 1
        self._waiting[guest] = None
        return True

    def leave(self, guest: Guest) -> None:
        """Count it out. It may have been before."""
        if guest not in self._guests:
            return
        self._guests.discard(guest)
        self._waiting.pop(guest, None)
        self._of_peer[guest.peer] -= 1
        if not self._of_peer[guest.peer]:
            del self._of_peer[guest.peer]

    def is_served(self, guest: Guest) -> None:
        """Note that a request is under way on it."""
        self._waiting.pop(guest, None)

    def waits(self, guest: Guest) -> None:
        """Note that it has its answer and waits for another request."""
        if guest in self._guests:
            self._waiting[guest] = None

    def make_room(self, peer: str | None = None) -> bool:
        """Cut the one that waits longest, of the peer if one is named. Return False when none does."""
        for guest in self._waiting:
            if (peer is None or guest.peer == peer) and not guest.is_reading:
                self.leave(guest)
                guest.cut()
                return True
        return False


def peer_of(address: str) -> str:
    """Return by what name connections from the address are counted."""
    try:
        ip = ip_address(address)
    except ValueError:  # of a Unix socket
        return address
    if isinstance(ip, IPv6Address):
        return str(ip.ipv4_mapped or ip_network((int(ip), _IPV6_SITE_BITS), strict=False).network_address)
    return str(ip)
