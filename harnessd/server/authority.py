"""`host[:port]`, as a Host header, an origin and the settings have it. Standard library only."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

DEFAULT_PORT = {"http": 80, "https": 443}

_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\.?)(?::([0-9]{0,5}))?")


class Authority(NamedTuple):
    """A host and port in the one spelling in which two of them can be compared."""

    host: str
    port: int | None
    literal: bool


@lru_cache(maxsize=1024)
def parse_authority(text: str, scheme: str) -> Authority | None:
    """`host[:port]` of a Host header or an origin, or None. The port is the scheme's own if there is none."""
    found = _AUTHORITY.fullmatch(text)
    if found is None or len(text) > 262:  # a DNS name has at most 255 bytes
        return None
    port = int(found[3]) if found[3] else DEFAULT_PORT.get(scheme)
    try:
        literal = str(IPv6Address(found[1])) if found[1] else str(IPv4Address(found[2]))
    except ValueError:
        return None if found[1] else Authority(found[2].lower(), port, literal=False)
    return Authority(literal, port, literal=True)
