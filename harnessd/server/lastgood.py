"""The configuration as it was last understood, in the keeper's hands: a server that starts while a file is broken goes
on with what the one before it had."""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING

from harnessd.server.configdir import Loaded

if TYPE_CHECKING:
    from harnessd.server.link import Link

_NAME = "configuration"


def keep(link: Link, loaded: Loaded) -> None:
    """Hand it to the keeper. It lies in memory, as it holds secrets, and only servers of this keeper ever read it."""
    fd = os.memfd_create("harnessd-configuration", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb") as file:
        pickle.dump(loaded, file)
        file.flush()
        link.store(_NAME, [fd])


def read(fds: list[int]) -> Loaded | None:
    """Return what was kept; None when nothing was, or by a version whose models were others."""
    if not fds:
        return None
    with os.fdopen(fds[0], "rb") as file:
        try:
            file.seek(0)
            found = pickle.load(file)
        except Exception:  # pickle raises whatever the changed classes raise; without it there is no fallback
            return None
    return found if isinstance(found, Loaded) else None
