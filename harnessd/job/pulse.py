"""The page that a run shares with the server, so that a hang is seen without asking the job.

The page is a memfd of 64-bit counters. The run counts its polls there; one memory write, no call, no lock. The file's
own offset, which nobody reads or writes through, serves as the journal's sequence: `lseek(fd, 1, SEEK_CUR)` is an
atomic fetch-and-add between all threads and forked children that share the descriptor, and the kernel does it without
anyone who could be stopped while holding a lock. Newer kernels (6.18 for one) make it atomic only for what was
opened by a path (FMODE_ATOMIC_POS in file_seek_cur_needs_f_lock), so the memfd is.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys

POLLS = 0  # how often the run called get_msg
WAITING = 1  # the pid of a process in which a call waits for a command, which is no hang; 0 when none does
CLAIM = 2  # the pid of the process that is this run, where more than one may take itself for it
VOID = 0xFFFFFFFF  # in its place: none of them is

_BYTES = mmap.PAGESIZE
_COUNTER_BYTES = 8


def create() -> int:
    """Return the descriptor of a fresh page."""
    nameless = os.memfd_create("harnessd-pulse", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(nameless, _BYTES)
        fcntl.fcntl(nameless, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)  # a server looks into it
        return os.open(f"/proc/self/fd/{nameless}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(nameless)


def attach(fd: int) -> memoryview:
    """Return the page as 64-bit counters; the descriptor may be closed afterwards."""
    return memoryview(mmap.mmap(fd, _BYTES)).cast("Q")


def claim(fd: int, pid: int) -> None:
    """Say which process is the run, or that it is VOID: through the descriptor, as a mapping would need another."""
    os.pwrite(fd, pid.to_bytes(_COUNTER_BYTES, sys.byteorder), CLAIM * _COUNTER_BYTES)


def next_number(fd: int) -> int:
    """Return 1, 2, 3, ...; each number once, whichever thread or forked child asks."""
    return os.lseek(fd, 1, os.SEEK_CUR)
