"""`harnessd serve`: the process that is started becomes the keeper, and the server is its child."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from harnessd import logline, tree
from harnessd.keeper import say
from harnessd.keeper.respawn import SIGNALS, ServerProcess


def serve(argv: list[str]) -> int:
    """Be the keeper of a config directory until told to end. Return the exit code."""
    parser = argparse.ArgumentParser(prog="harnessd serve", description="Run every job of a config directory.")
    parser.add_argument("config_dir", type=Path, help="holds harnessd.toml and jobs/")
    parser.add_argument("--log-format", choices=logline.FORMATS, default=logline.TEXT, help="of the daemon's own log")
    given = parser.parse_args(argv)
    config_dir = given.config_dir.absolute()
    say.use(given.log_format)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they wait until the keeper can act on them
    tree.wear_beneath()
    server = ServerProcess(["-P", "-m", "harnessd.daemon", str(config_dir), given.log_format])
    control = server.start()  # it reads its configuration while this process loads what the runs will need

    from harnessd.keeper import warm
    from harnessd.keeper.loop import Keeper
    from harnessd.keeper.spawn import set_title

    warm.load()
    set_title(f"harnessd serve {config_dir}")
    return Keeper(control=control, server=server).run()
