"""Forks the worker for each name, and again when it ends: nothing else, as a limit.

python fork.py NAME...
"""

import os
import sys
import time

from worker import work


def fork(name):
    """Return the pid; the child never returns."""
    if pid := os.fork():
        return pid
    os._exit(work(name, time.sleep))


if __name__ == "__main__":
    names = {fork(name): name for name in sys.argv[1:]}
    while True:
        pid, _ = os.wait()
        name = names.pop(pid)
        names[fork(name)] = name
