"""What nobody but the owner may see or reach: the daemon's files, and the secrets that it and its jobs are given."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from helpers.daemon import COMMAND, Daemon
from helpers.waiting import until

from harnessd.web.app import ENDPOINTS, paths

OF_A_JOB = "s3cret-of-a-job"
OF_THE_DAEMON = "s3cret-of-the-daemon"
TOKEN = "s3cret-token"
NAME = "{name}"


def kept_files(daemon: Daemon) -> list[Path]:
    return [path for root in (daemon.state, daemon.folder / "run") for path in (root, *root.rglob("*"))]


def test_what_the_daemon_keeps_is_its_owners_alone_whatever_the_umask(daemon: Daemon) -> None:
    daemon.job("one", "Idle")
    daemon.job("two", ["sh", "-c", "echo hello; sleep 3600"])
    daemon.start(("sh", "-c", 'umask 0; exec "$@"', "sh", *COMMAND))
    daemon.status("one")
    daemon.wait_for(lambda: daemon.output("two"), "there is output")
    daemon.wait_for(lambda: (daemon.state / "harnessd.db-wal").exists(), "there is a database")
    found = kept_files(daemon)
    assert {"harnessd.db", "harnessd.db-wal", "harnessd.db-shm", "harnessd.sock", "lock", "two.log"} <= {
        path.name for path in found
    }
    assert any(path.suffix == ".jsonl" for path in found)
    for path in found:
        mode = path.lstat().st_mode
        # A job of another user reaches its own journal by its name, and can list nothing.
        traversable = stat.S_ISDIR(mode) and (daemon.folder / "run") in (path, *path.parents)
        assert not mode & (0o066 if traversable else 0o077), f"{path}: {stat.filemode(mode)}"
    daemon.stop()
    for path in daemon.state.rglob("*"):
        assert not path.lstat().st_mode & 0o077, path


def shown_by_routes(daemon: Daemon) -> Iterator[tuple[str, str]]:
    for endpoint in ENDPOINTS:
        if "GET" not in endpoint.methods or endpoint.path in ("kill", "start", "stop", "pause", "resume", "restart"):
            continue
        for path in paths(endpoint):
            asked = path.replace(NAME, "secretive")
            yield asked, daemon.get(asked).text
    yield "/jobs?full=1", daemon.get("/jobs", full=1).text


def shown_by_proc(daemon: Daemon) -> Iterator[tuple[str, str]]:
    """What every user of the host can read of the daemon's processes."""
    for pid in daemon.left():
        for name in ("cmdline", "comm", "status"):
            try:
                yield f"{pid}/{name}", Path(f"/proc/{pid}/{name}").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                pass  # it has ended meanwhile


def test_secrets_of_the_environment_appear_nowhere(daemon: Daemon) -> None:
    daemon.settings(http=f'token = "{TOKEN}"')
    secret = {"PASSWORD": OF_A_JOB, "OTHER": "${MY_SECRET}"}
    daemon.job("secretive", "Idle", env=secret)
    daemon.job("executed", ["sleep", "3600"], env=secret)
    daemon.job("fails", ["/nowhere/at/all"], env=secret, max_failures=1, start_seconds=5)
    daemon.write("broken", f'command = ["true"]\nenv = {{PASSWORD = "{OF_A_JOB}"}}\nno_such_key = 1\n')
    daemon.write("worse", f'command = ["true"]\nenv = {{PASSWORD = ["{OF_A_JOB}"]}}\n')
    daemon.start(MY_SECRET=OF_THE_DAEMON, HARNESSD_TOKEN=TOKEN)
    daemon.wait_state("fails", "failed")
    daemon.wait_state("executed", "running")
    daemon.status("secretive")
    daemon.reload()
    assert daemon.post("/jobs/secretive/config", {"a": 1}, wait=30).status_code == 200
    daemon.wait_for(lambda: daemon.rows("SELECT 1 FROM event WHERE kind = 'reload'"), "the reload is stored")
    for where, text in [*shown_by_routes(daemon), *shown_by_proc(daemon), ("the daemon's log", daemon.log)]:
        for secret_text in (OF_A_JOB, OF_THE_DAEMON, TOKEN):
            assert secret_text not in text, where
    daemon.stop()
    for path in kept_files(daemon):
        if path.is_file():
            for secret_text in (OF_A_JOB, OF_THE_DAEMON, TOKEN):
                assert secret_text.encode() not in path.read_bytes(), path


def test_a_job_gets_its_secrets_and_none_of_the_daemons_own(daemon: Daemon) -> None:
    script = 'env > "$OUT"; sleep 3600'
    out = daemon.folder / "env"
    daemon.job("job", ["sh", "-c", script], env={"PASSWORD": OF_A_JOB, "OUT": str(out)})
    daemon.start(HARNESSD_TOKEN=TOKEN)
    until(lambda: out.exists() and OF_A_JOB in out.read_text(), "the job has its environment")
    assert "HARNESSD_" not in out.read_text()
    assert TOKEN not in out.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_job_of_another_user_writes_its_own_journal_and_reaches_nothing_of_the_daemons() -> None:
    folder = Path(tempfile.mkdtemp(prefix="harnessd-test-"))
    folder.chmod(0o755)
    daemon = Daemon(folder)
    try:
        (daemon.state).mkdir()
        (daemon.state / "tokens.json").write_text("{}")
        (daemon.state / "tokens.json").chmod(0o644)
        daemon.job("root", "Idle")
        daemon.start(("sh", "-c", 'umask 0; exec "$@"', "sh", *COMMAND))
        daemon.status("root")
        journals = next((folder / "run").glob("*/*.jsonl"))
        wanted = [daemon.state, daemon.state / "harnessd.db", daemon.state / "tokens.json", daemon.state / "log"]
        wanted += [daemon.state / "log" / "root.log", journals, journals.parent, f"/proc/{daemon.keeper_pid}/environ"]
        wanted += [f"/proc/{daemon.keeper_pid}/fd", f"/proc/{daemon.server_pid()}/fd"]
        tries = " ".join(f'{{ [ -d "{path}" ] && ls "{path}" || cat "{path}"; }} && r="$r {path}";' for path in wanted)
        sock = f"import socket; socket.socket(socket.AF_UNIX).connect('{daemon.state}/harnessd.sock')"
        tries += f' python3 -c "{sock}" && r="$r socket";'
        report = 'echo "{\\"status\\": {\\"who\\": \\"$(id -un)\\", \\"reached\\": \\"$r\\"}}" >> $HARNESS_JOURNAL'
        daemon.job("nobody", ["sh", "-c", f"r=; {tries} {report}; sleep 3600"], user="nobody", cwd="/")
        daemon.reload()
        assert daemon.status("nobody") == {"who": "nobody", "reached": ""}
        daemon.close()
    finally:
        shutil.rmtree(folder)


# names that are tricks

TRICKS = {
    "..": "parent",
    ".": "itself",
    "%2e%2e": "parent, escaped",
    "..%2f..%2fetc%2fpasswd": "slashes, escaped",
    "x%2fhb": "slash, escaped",
    "x%5c..%5cy": "backslash, escaped",
    "x%00": "NUL",
    "x%0a": "line feed",
    "x%7f": "delete",
    "%c0%ae%c0%ae": "overlong UTF-8",
    "%ff": "no UTF-8",
    "%ed%a0%80": "half a surrogate pair",
    "%D1%85": "look-alike of x",
    "%EF%BD%98": "fullwidth x",
    "x%E2%80%AE": "right to left",
    "x.": "trailing dot",
    "x%20": "trailing space",
    "x%20hb": "space",
    "x%2500": "escaped twice",
    "X": "another case",
    "x" * 65: "too long",
    "%78%3f": "question mark, escaped",
    "~root": "home",
}
MALFORMED = ["%", "%x", "%2", "%zz", "x%u002e"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("tricks"))
    daemon.job("x", "Idle")
    daemon.start()
    yield daemon
    daemon.close()


def ask_as_it_is(daemon: Daemon, method: str, path: str) -> tuple[int, dict[str, object]]:
    """Return the status and the body of the answer to a path that no client has tidied up."""
    with closing(http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=40)) as connection:
        connection.putrequest(method, path)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


NAMED = sorted({(endpoint.methods[0], path) for endpoint in ENDPOINTS for path in paths(endpoint) if NAME in path})


@pytest.mark.parametrize("trick", TRICKS, ids=TRICKS.values())
def test_a_name_that_is_a_trick_names_no_job(served: Daemon, trick: str) -> None:
    for method, path in NAMED:
        status, body = ask_as_it_is(served, method, path.replace(NAME, trick))
        assert status in (404, 422), f"{method} {path}: {body}"
        assert body["status"] == status
    assert served.hb("x")["state"] == "running"


@pytest.mark.parametrize("trick", MALFORMED)
def test_a_malformed_escape_is_400(served: Daemon, trick: str) -> None:
    for method, path in NAMED:
        assert ask_as_it_is(served, method, path.replace(NAME, trick))[0] == 400


def test_a_path_that_is_too_long_is_414(served: Daemon) -> None:
    assert ask_as_it_is(served, "GET", f"/jobs/{'x' * 2000}/hb")[0] == 414


@pytest.mark.parametrize(
    "path",
    ["/jobs//hb", "//jobs/x/hb", "/jobs/x/hb/", "/jobs/x//hb", "/jobs/./x/hb", "/jobs/y/../x/hb", "/jobs/x/hb%00"],
)
def test_a_path_is_not_tidied_up_to_one_that_is_there(served: Daemon, path: str) -> None:
    assert ask_as_it_is(served, "GET", path)[0] == 404
