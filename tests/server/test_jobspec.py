from __future__ import annotations

import json
import os
import pwd
import re
import resource
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from harnessd.errors import ConfigError
from harnessd.server.jobspec import Check, JobSpec, Watchdog
from harnessd.server.settings import HistoryOverride

ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "job.py").write_text("class VolTarget: ...\n")
    return tmp_path / "jobs"


def read(folder: Path, text: str, name: str = "vol-target") -> JobSpec:
    return JobSpec.read(folder / f"{name}.toml", tomllib.loads(text), f"jobs/{name}.toml", text)


def refusal(folder: Path, text: str, name: str = "etl") -> str:
    with pytest.raises(ConfigError) as refused:
        read(folder, text, name)
    return str(refused.value)


def spec(**keys: Any) -> JobSpec:
    return JobSpec(name="etl", file=Path("/jobs/etl.toml"), **({"command": ["true"]} | keys))


def test_an_entrypoint_is_all_that_a_job_needs(folder: Path) -> None:
    job = read(folder, 'entrypoint = "pkg.mod:Class"')
    assert (job.name, job.file, job.entrypoint) == ("vol-target", folder / "vol-target.toml", "pkg.mod:Class")
    assert (job.command, job.python, job.args, job.env, job.cwd) == (None, None, [], {}, folder)
    assert (job.user, job.umask, job.nice, job.enabled, job.autostart) == (None, None, 0, True, True)
    assert (job.restart, job.start_seconds, job.max_failures, job.kill_grace) == ("on-failure", 1.0, 5, 3.0)
    assert (job.control, job.config, job.tags, job.history) == (None, {}, [], None)
    assert list(job.backoff.model_dump().values()) == [0.5, 2.0, 60.0, 0.2, 60.0]
    assert set(job.limits.model_dump().values()) == {None}
    assert list(job.log.model_dump().values()) == [10_000_000, 10, True, True]


def test_every_key_is_taken(folder: Path) -> None:
    text = f"""
        entrypoint = "../job.py:VolTarget"
        python = "{sys.executable}"
        args = ["--symbol", "SPX"]
        env = {{A = "1"}}
        cwd = ".."
        user = "{ME}"
        umask = "027"
        nice = 5
        enabled = true
        autostart = false
        restart = "always"
        start_seconds = 0
        max_failures = 1
        backoff = {{first_s = 1, factor = 1, max_s = 1, jitter = 0, reset_after_s = 0}}
        kill_grace = 0.5
        control = "signals"
        watchdog = {{pulse_seconds = 10, action = "notify"}}
        check = {{command = ["true"], every = 5, timeout = 1, failures = 2, action = "notify"}}
        config = {{target_vol = 4.0}}
        limits = {{nofile = 64, nproc = 10, memory = "1GiB", core = 0, cpu_seconds = 60}}
        log = {{max_bytes = "1MB", keep = 0, compress = false, merge = false}}
        tags = ["demo"]
        metrics = ["pnl", "book.bids[0].size"]
        history = {{keep_days = 7}}
    """
    job = read(folder, text)
    assert job.entrypoint == f"{folder.parent}/job.py:VolTarget"
    assert job.python == sys.executable
    assert job.cwd == folder.parent
    assert job.umask == 0o027
    assert job.limits.memory == 1 << 30
    assert job.history == HistoryOverride(keep_days=7)
    assert set(JobSpec.model_fields) - set(job.model_fields_set) == {"command"}


def test_limits_are_handed_on_by_the_names_of_setrlimit() -> None:
    limits = spec(limits={"nofile": 64, "nproc": 10, "core": 0, "cpu_seconds": 60}).limits.rlimits()
    assert limits == {"nofile": 64, "nproc": 10, "core": 0, "cpu": 60}
    assert all(hasattr(resource, f"RLIMIT_{name.upper()}") for name in limits)
    assert spec().limits.rlimits() == {} == spec().limits.caps()
    whole = {"memory": "1GiB", "cpu": 0.5, "pids": 9}
    assert spec(limits=whole).limits.caps() == {"memory": 1 << 30, "cpu": 0.5, "pids": 9}


def test_a_command_is_controlled_by_signals_unless_it_says_otherwise() -> None:
    assert spec().control_mode == "signals"
    assert spec(control="messages").control_mode == "messages"
    assert spec(command=None, entrypoint="a:B").control_mode == "messages"


def test_a_python_without_a_slash_is_looked_up_in_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "python9"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    assert read(folder, 'entrypoint = "a:B"\npython = "python9"').python == str(program)


def test_a_virtual_environments_python_stays_the_link_that_it_is(folder: Path) -> None:
    (folder / "python").symlink_to(sys.executable)
    assert read(folder, 'entrypoint = "a:B"\npython = "./python"').python == f"{folder}/python"


def test_env_takes_values_of_the_daemons_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter$2")
    job = read(folder, 'command = ["a"]\nenv = {A = "x-${SECRET_KEY}-$$-$y", B = "$${SECRET_KEY}"}')
    assert job.env == {"A": "x-hunter$2-$-$y", "B": "${SECRET_KEY}"}
    assert JobSpec.model_validate(job.model_dump()) == job, "a spec that was read is not expanded again"


def test_secrets_appear_nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    job = read(folder, 'command = ["a"]\numask = "022"\nenv = {A = "${SECRET_KEY}", B = "hunter2"}')
    masked = job.masked()
    assert masked["env"] == {"A": "***", "B": "***"}
    assert (masked["umask"], masked["control"], masked["cwd"]) == ("022", "signals", str(folder))
    assert "hunter2" not in json.dumps(masked) + repr(job) + str(job)
    assert "hunter2" not in refusal(
        folder, 'comand = ["a"]\nenv = {A = "${hunter}", B = ["hunter2"], C = "hunter2\\u0000"}'
    )
    assert "hunter2" not in refusal(folder, 'env = "A=hunter2"')


def test_an_environment_that_is_not_utf8_can_be_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD", "\udcff")
    job = read(folder, 'command = ["a"]\nenv = {A = "${ODD}"}')
    assert job.env == {"A": "\udcff"}
    assert len(job.digest) == 64
    json.dumps(job.masked()).encode()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", 'needs entrypoint = "pkg.mod:Class" or "path/to/file.py:Class" or command = [...]'),
        ('entrypoint = "a:B"\ncommand = ["a"]', "has both entrypoint and command; keep one of them"),
        ('command = ["a"]\npython = "/bin/sh"', "has python beside command; python goes with an entrypoint"),
        (
            'entrypoint = "job.py"',
            """entrypoint (line 1): must be "pkg.mod:Class" or "path/to/file.py:Class", not 'job.py'""",
        ),
        (
            'entrypoint = "a/b:C"',
            """entrypoint (line 1): must be "pkg.mod:Class" or "path/to/file.py:Class", not 'a/b:C'""",
        ),
        ('entrypoint = "nope.py:C"', "entrypoint (line 1): there is no file FOLDER/nope.py"),
        ('entrypoint = "a\\u0000.py:C"', "entrypoint (line 1): must not contain a NUL character"),
        ('entrypont = "a:B"', "entrypont (line 1): unknown key; did you mean 'entrypoint'?"),
        ("command = []", "command (line 1): must not be empty"),
        ('command = "sh -c x"', "command (line 1): must be a list, not 'sh -c x'"),
        ('command = ["a", 1]', "command[1] (line 1): must be a string, not 1"),
        ('command = ["a\\u0000"]', "command[0] (line 1): must not contain a NUL character"),
        ('entrypoint = "a:B"\npython = "no/python"', "python (line 2): there is no program FOLDER/no/python"),
        ('entrypoint = "a:B"\npython = "nopython"', "python (line 2): there is no program nopython"),
        ('command = ["a"]\nname = "x"', "name: unknown key; a job's name is that of its file"),
        ('command = ["a"]\nargs = "x"', "args (line 2): must be a list, not 'x'"),
        ('command = ["a"]\n[env]\nPORT = 5', "env.PORT (line 3): must be a string"),
        ('command = ["a"]\nenv = ["A=1"]', "env (line 2): must be a table"),
        ('command = ["a"]\nenv = {"A=" = "1"}', "env (line 2): 'A=' cannot be the name of an environment variable"),
        (
            'command = ["a"]\nenv = {A = "${SECRT_KEY}"}',
            "env (line 2): A needs ${SECRT_KEY}, which the daemon's environment lacks; did you mean 'SECRET_KEY'?",
        ),
        ('command = ["a"]\nenv = {A = "${a-b}"}', 'env (line 2): A has a "${" that is no ${NAME}; write $$ for a dol'),
        ('command = ["a"]\ncwd = "nope"', "cwd (line 2): there is no folder FOLDER/nope"),
        ('command = ["a"]\ncwd = 5', "cwd (line 2): must be a path, not 5"),
        ('command = ["a"]\nuser = "rooot"', "user (line 2): this host has no user 'rooot'; did you mean 'root'?"),
        ('command = ["a"]\numask = "89"', """umask (line 2): must be an octal string, such as "022", not '89'"""),
        ('command = ["a"]\numask = 512', "umask (line 2): must be at most 511, not 512"),
        ('command = ["a"]\nnice = 20', "nice (line 2): must be at most 19, not 20"),
        ('command = ["a"]\nautostart = "yes"', "autostart (line 2): must be true or false, not 'yes'"),
        (
            'command = ["a"]\nrestart = "onfailure"',
            "restart (line 2): must be 'on-failure', 'always' or 'never', not 'onfailure'; did you mean 'on-failure'?",
        ),
        ('command = ["a"]\nrestrat = "never"', "restrat (line 2): unknown key; did you mean 'restart'?"),
        ('command = ["a"]\nstart_seconds = -1', "start_seconds (line 2): must be at least 0.0, not -1"),
        ('command = ["a"]\nmax_failures = 0', "max_failures (line 2): must be at least 1, not 0"),
        ('command = ["a"]\nbackoff = 5', "backoff (line 2): must be a table, not 5"),
        ('command = ["a"]\nbackoff = {first = 5}', "backoff.first (line 2): unknown key; did you mean 'first_s'?"),
        (
            'command = ["a"]\n[backoff]\nmax_s = 0.1',
            "backoff (line 2): max_s (0.1) must not be less than first_s (0.5)",
        ),
        ('command = ["a"]\nbackoff = {jitter = 1}', "backoff.jitter (line 2): must be less than 1.0, not 1"),
        ('command = ["a"]\nkill_grace = "3s"', "kill_grace (line 2): must be a number, not '3s'"),
        ('command = ["a"]\ncontrol = "none"', "control (line 2): must be 'messages' or 'signals', not 'none'"),
        (
            'command = ["a"]\n[config]\nstart = 2020-01-01T00:00:00Z',
            "config (line 2): holds a datetime at start, which JSON cannot carry; make it a string",
        ),
        ('command = ["a"]\nlimits = {nofiles = 1}', "limits.nofiles (line 2): unknown key; did you mean 'nofile'?"),
        (
            'command = ["a"]\nlimits = {memory = "1XB"}',
            """limits.memory (line 2): must be a size in bytes, such as 65536, "10MB" or "64KiB", not '1XB'""",
        ),
        ('command = ["a"]\nlog = {keep = -1}', "log.keep (line 2): must be at least 0, not -1"),
        ('command = ["a"]\ntags = ["a b"]', "tags[0] (line 2): 'a b' is no name: 1 to 64 ASCII letters, digits, '.'"),
        (
            'command = ["a"]\n[history]\nkeep_day = 5',
            "history.keep_day (line 3): unknown key; did you mean 'keep_days'?",
        ),
    ],
)
def test_a_wrong_key_is_refused_with_file_line_and_reason(
    folder: Path, text: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    lines = refusal(folder, text).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"jobs/etl.toml: {problem}".replace("FOLDER", str(folder)))


@pytest.mark.parametrize("name", ["a", "A.b-c_9", "0", "x" * 64])
def test_a_good_name_is_taken(folder: Path, name: str) -> None:
    assert read(folder, 'command = ["a"]', name).name == name


@pytest.mark.parametrize("name", ["a b", "-a", "_a", "x" * 65, "ä", "а", "a\n", "a%2f", "all"])
def test_a_bad_name_is_refused(folder: Path, name: str) -> None:
    line = refusal(folder, 'command = ["a"]\n[config]\nname = "x"', name)
    assert f": name: {name!r} is no name" in line or name == "x" * 65


BEFORE = {"command": ["a"], "env": {"A": "1"}, "nice": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"command": ["b"]},
        {"command": None, "entrypoint": "a:B"},
        {"args": ["x"]},
        {"env": {"A": "2"}},
        {"cwd": "/"},
        {"user": ME},
        {"umask": "022"},
        {"nice": 0},
        {"control": "messages"},
        {"limits": {"nofile": 64}},
    ],
    ids=lambda change: "+".join(change),
)
def test_what_a_run_is_made_from_needs_a_restart(change: dict[str, Any]) -> None:
    assert spec(**BEFORE).digest != spec(**BEFORE | change).digest


def test_another_python_needs_a_restart() -> None:
    keys = {"command": None, "entrypoint": "a:B"}
    assert spec(**keys).digest != spec(**keys, python=sys.executable).digest


@pytest.mark.parametrize(
    "change",
    [
        {"restart": "never"},
        {"start_seconds": 9.0},
        {"max_failures": 9},
        {"backoff": {"first_s": 1.0}},
        {"kill_grace": 9.0},
        {"tags": ["x"]},
        {"autostart": False},
        {"log": {"keep": 1}},
        {"history": {"keep_days": 1.0}},
        {"config": {"x": 1}},
        {"control": "signals"},
    ],
    ids=lambda change: "+".join(change),
)
def test_what_only_the_server_uses_needs_no_restart(change: dict[str, Any]) -> None:
    before, after = spec(**BEFORE), spec(**BEFORE | change)
    assert before != after
    assert before.digest == after.digest


def test_the_digest_is_the_same_in_every_process() -> None:
    one, other = spec(env={"A": "1", "B": "2"}, cwd="/"), spec(env={"B": "2", "A": "1"}, cwd="/")
    assert one.digest == other.digest
    assert re.fullmatch(r"[0-9a-f]{64}", one.digest)


def test_every_key_is_described_and_documented() -> None:
    page = Path(__file__).parents[2].joinpath("docs/config.md").read_text()
    tables = {"backoff", "limits", "log", "history", "watchdog", "check"}
    for key in set(JobSpec.model_fields) - {"name", "file"} - tables:
        assert re.search(rf"^\| `{key}` \|", page, re.MULTILINE), key
        assert JobSpec.model_fields[key].description, key
    for table in tables:
        optional = {"history": HistoryOverride, "watchdog": Watchdog, "check": Check}
        inner = optional.get(table) or type(JobSpec.model_fields[table].default)
        for key in inner.model_fields:
            assert re.search(rf"^\| `{table}\.{key}` \|", page, re.MULTILINE), key
