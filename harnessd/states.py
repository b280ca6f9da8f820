"""The words for what a job is, what is wanted of it, how a run ended, and what may be said to it."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """What a job is."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    EXITED = "exited"
    FAILED = "failed"


class Want(StrEnum):
    """What the operator wants of a job."""

    UP = "up"
    DOWN = "down"


class Command(StrEnum):
    """What goes to a job through its mailbox."""

    START = "START"
    STOP = "STOP"
    PAUSE = "PAUSE"
    RESUME = "RESUME"
    CONFIG = "CONFIG"


class ExitReason(StrEnum):
    """Why a run ended."""

    COMPLETED = "completed"  # by itself, with exit code 0
    CRASHED = "crashed"  # by itself, with another exit code
    SIGNALED = "signaled"  # by a signal that the harness did not send
    STOPPED = "stopped"  # after a stop, a restart or a reload
    KILLED = "killed"  # after a kill
    SHUTDOWN = "shutdown"  # ended together with the daemon
    OOM = "oom"  # by the kernel, for want of memory: the run's limit, or the host's
    HUNG = "hung"  # its watchdog found that it had stopped polling
    UNHEALTHY = "unhealthy"  # its check failed too often
    LOST = "lost"  # its keeper died with it: nobody was there to see the exit
    UNSTARTED = "unstarted"  # it never became a process
