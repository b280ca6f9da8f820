"""The terminal face."""

from __future__ import annotations

import sys


def main() -> None:
    """Be the command `harnessd`. `serve` is the keeper's own process, so it loads nothing that the keeper must not."""
    if sys.argv[1:2] == ["serve"] and not {"--help", "-h"} & set(sys.argv):
        from harnessd.root import serve

        sys.exit(serve(sys.argv[2:]))
    from harnessd.cli.app import app

    app()
