"""The start of a run under an interpreter of its own, which need not have harnessd: the keeper executes this file.

What the job needs of harnessd is lent to it by path, and nothing else of the daemon's libraries is.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path


def _lend(name: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if (folder / "__init__.py").exists():
        spec.loader.exec_module(module)


def main() -> None:
    if sys.version_info < (3, 11):
        sys.exit(f"harnessd: cannot run the job under Python {sys.version.split()[0]}: 3.11 or later is needed")
    package = Path(__file__).resolve().parent.parent
    _lend("harnessd", package)
    _lend("bqm", package.parent / "bqm")
    from harnessd.job.conduct import Ends, conduct
    from harnessd.job.journal import Journal
    from harnessd.wire import RunSpec

    with open(int(sys.argv[1]), "rb") as file:
        file.seek(0)
        handed = json.load(file)
    spec = RunSpec.from_frame(handed["spec"])
    mailbox, pulse, journal = handed["fds"]
    for fd in (mailbox, pulse, journal):
        os.set_inheritable(fd, False)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    conduct(spec, Ends(mailbox, pulse, journal), Journal(journal, pulse, spec.journal_max_bytes), None)


if __name__ == "__main__":
    main()
