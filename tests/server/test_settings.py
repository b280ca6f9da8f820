from __future__ import annotations

import datetime
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from harnessd.errors import ConfigError
from harnessd.server.nearest import did_you_mean, nearest, printable, shown
from harnessd.server.settings import History, HistoryOverride, ScriptSettings, Settings

NAME_RULE = "1 to 64 ASCII letters, digits, '.', '-' and '_', a letter or digit first"


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        Settings.parse(tomllib.loads(text), "harnessd.toml", text)
    return str(refused.value)


def script_refusal(raw: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        ScriptSettings.parse(raw, "config")
    return str(refused.value)


def test_an_empty_file_gives_the_defaults() -> None:
    parsed = Settings.parse({}, "harnessd.toml")
    assert parsed == Settings()
    assert parsed.http.model_dump() == {
        "host": "127.0.0.1",
        "port": 2222,
        "allowed_hosts": [],
        "token": None,
        "trust_loopback": True,
        "tls": None,
        "max_body_bytes": 1_000_000,
        "max_header_bytes": 32_768,
        "max_headers": 100,
        "header_seconds": 10,
        "body_seconds": 60,
        "idle_seconds": 60,
        "send_seconds": 120,
        "max_connections": 2000,
        "max_connections_per_peer": 500,
    }
    assert parsed.history.model_dump() == {"keep_days": 90, "keep_rows_per_job": 10_000_000, "max_rate": 200}
    assert (parsed.state_dir, parsed.runtime_dir, parsed.database, parsed.default_job) == (None,) * 4
    assert (parsed.journal, parsed.journal_max_bytes, parsed.sample_seconds) == ("memory", 64_000_000, 10)


def test_every_key_is_taken() -> None:
    text = """
        state_dir = "../state"
        runtime_dir = "/run/x"
        preload = ["numpy", "xml.dom"]
        default_job = "vol-target"
        database = "postgresql+psycopg://u:p@db/x"
        journal = "disk"
        journal_max_bytes = "2MiB"
        sample_seconds = 2
        http = {host = "::", port = 0, allowed_hosts = ["box.example"], token = "s3cret", max_body_bytes = "1.5 MB"}
        history = {keep_days = 1.5, keep_rows_per_job = 10, max_rate = 5}
        notify = [{command = ["true"]}]
    """
    parsed = Settings.parse(tomllib.loads(text), "harnessd.toml", text, folder=Path("/etc/harnessd"))
    assert parsed.state_dir == Path("/etc/state")
    assert parsed.runtime_dir == Path("/run/x")
    assert parsed.journal_max_bytes == 2 << 20
    assert parsed.http.max_body_bytes == 1_500_000
    assert parsed.http.token is not None
    assert parsed.http.token.get_secret_value() == "s3cret"
    assert parsed.history == History(keep_days=1.5, keep_rows_per_job=10, max_rate=5)
    assert set(parsed.model_fields_set) == set(Settings.model_fields)


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [
        (5 * 10**6, 5 * 10**6),
        ("5000000", 5 * 10**6),
        ("10MB", 10**7),
        ("10 mb", 10**7),
        ("2048KiB", 2 << 20),
        ("2G", 2 * 10**9),
    ],
)
def test_a_size_is_a_number_or_a_number_with_a_unit(size: int | str, size_bytes: int) -> None:
    assert Settings.parse({"journal_max_bytes": size}, "x").journal_max_bytes == size_bytes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('stat_dir = "x"', "stat_dir (line 1): unknown key; did you mean 'state_dir'?"),
        ("[http]\n# prot\nprot = 1", "http.prot (line 3): unknown key; did you mean 'port'?"),
        ("port = 1", "port (line 1): unknown key; did you mean 'http.port'?"),
        ('[http]\ndefault_job = "x"', "http.default_job (line 2): unknown key; did you mean 'default_job'?"),
        (
            "[history]\nzzz = 1",
            "history.zzz (line 2): unknown key; the keys are: keep_days, keep_rows_per_job, max_rate",
        ),
        ("http.port = '1'", "http.port (line 1): must be a whole number, not '1'"),
        ("http = {port = true}", "http.port (line 1): must be a whole number, not true"),
        ("[http]\nport = 65536", "http.port (line 2): must be at most 65535, not 65536"),
        ("[http]\nport = -1", "http.port (line 2): must be at least 0, not -1"),
        ("http = 3", "http (line 1): must be a table, not 3"),
        (
            "[http]\nhost = ''",
            """http.host (line 2): must be an address or a host name, such as "127.0.0.1" or "0.0.0.0", not ''""",
        ),
        ("[http]\nallowed_hosts = 'x'", "http.allowed_hosts (line 2): must be a list, not 'x'"),
        (
            "[http]\nallowed_hosts = ['::1']",
            (
                "http.allowed_hosts[0] (line 2): must be as in a Host header, such as"
                """ "box", "box:2222" or "[::1]", not '::1'"""
            ),
        ),
        ("[http]\ntoken = 12345", "http.token (line 2): must be a string"),
        ("[http]\ntoken = ''", "http.token (line 2): must be of visible ASCII characters without spaces"),
        ("journal = 'dsk'", "journal (line 1): must be 'memory' or 'disk', not 'dsk'; did you mean 'disk'?"),
        (
            "journal_max_bytes = '5 apples'",
            """journal_max_bytes (line 1): must be a size in bytes, such as 65536, "10MB" or "64KiB", not '5 apples'""",
        ),
        ("journal_max_bytes = 5", "journal_max_bytes (line 1): must be at least 1000000, not 5"),
        ("journal_max_bytes = 1.5e6", "journal_max_bytes (line 1): must be a whole number, not 1500000.0"),
        ("preload = 'numpy'", "preload (line 1): must be a list, not 'numpy'"),
        ("preload = ['a', 'b c']", """preload[1] (line 1): must name modules, such as "numpy", not 'b c'"""),
        ("default_job = 'all'", "default_job (line 1): 'all' is no name: it stands for every job"),
        (
            "default_job = 'a/b'",
            f"default_job (line 1): 'a/b' is no name: {NAME_RULE}",
        ),
        (
            "database = 'secret.db'",
            'database (line 1): must be an SQLAlchemy URL, such as "sqlite:////var/lib/harnessd/harnessd.db"',
        ),
        ("sample_seconds = 0", "sample_seconds (line 1): must be more than 0.0, not 0"),
        ("sample_seconds = inf", "sample_seconds (line 1): must be a finite number"),
        ("sample_seconds = 2020-01-01", "sample_seconds (line 1): must be a number, not a date"),
        ("state_dir = ''", "state_dir (line 1): must not be empty"),
        ("state_dir = 5", "state_dir (line 1): must be a path, not 5"),
        ('state_dir = "a\\u0000"', "state_dir (line 1): must not contain a NUL character"),
        ("[history]\nkeep_days = 0", "history.keep_days (line 2): must be more than 0.0, not 0"),
    ],
)
def test_a_wrong_setting_is_refused_with_key_line_and_reason(text: str, problem: str) -> None:
    assert refusal(text) == f"harnessd.toml: {problem}"


def test_every_problem_is_told_at_once() -> None:
    assert len(refusal("stat_dir = 'x'\njournal = 'dsk'\n[http]\nport = 'x'").splitlines()) == 3


def test_a_flood_of_problems_is_cut() -> None:
    lines = refusal("\n".join(f"key{number} = 1" for number in range(50))).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "harnessd.toml: and 30 more problems"


def test_a_secret_is_never_repeated() -> None:
    text = "database = 'hunter2'\n[http]\ntoken = 'hunter2 hunter2'"
    assert "hunter2" not in refusal(text)
    parsed = Settings.parse({"database": "sqlite:///hunter2", "http": {"token": "hunter2"}}, "x")
    assert "hunter2" not in repr(parsed)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().journal = "disk"  # type: ignore[misc]


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert Settings.parse({"state_dir": "~/state"}, "x").state_dir == Path("/home/ada/state")


def test_a_job_overrides_only_what_it_names() -> None:
    history = History(keep_days=30, max_rate=50)
    assert history.overridden(None) == history
    assert history.overridden(HistoryOverride(keep_days=7)) == History(keep_days=7, max_rate=50)


def test_a_script_has_defaults_for_everything() -> None:
    parsed = ScriptSettings.parse({}, "config")
    assert (parsed.name, parsed.config, parsed.kill_grace, parsed.control) == (None, {}, 3.0, "messages")
    assert parsed.http.port == 2222


def test_a_script_may_say_all_that_concerns_one_job() -> None:
    raw = {
        "name": "etl",
        "http": {"host": "0.0.0.0", "port": 3000, "allowed_hosts": ("box",)},
        "config": {"target_vol": 4.0, "nested": [1, None, {"a": (True, "x")}]},
        "kill_grace": 1,
        "control": "signals",
        "state_dir": Path("state"),
        "runtime_dir": "/dev/shm/x",
        "journal": "disk",
        "journal_max_bytes": "1MB",
        "history": {"max_rate": 5},
    }
    parsed = ScriptSettings.parse(raw, "config")
    assert parsed.state_dir == Path(os.getcwd(), "state")
    assert parsed.http.allowed_hosts == ["box"]
    assert set(raw) == set(ScriptSettings.model_fields)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ([1], "config: must be a table, not a list"),
        ({1: 2}, "config: [1]: must have a string as its name"),
        ({"prot": 1}, "config: prot: unknown key; did you mean 'http.port'?"),
        ({"default_job": "x"}, "config: default_job: unknown key; the keys are: "),
        ({"config": {1: 2}}, "config: config[1]: must be a string, not 1"),
        ({"config": {"a": {1: 2}}}, "config: config: has a key that is no string: 1"),
        ({"config": {"a": [datetime.date(2020, 1, 1)]}}, "config: config: holds a date at a[0], which JSON cannot"),
        ({"config": {"a": float("nan")}}, "config: config: holds nan at a, which JSON cannot carry"),
        ({"config": {"a": 10**5000}}, "config: config: holds a number of more than 300 digits at a"),
        ({"http": {"port": 10**5000}}, "config: http.port: must be at most 65535, not a very large number"),
        ({"kill_grace": 10**5000}, "config: kill_grace: must be a number, not a very large number"),
        ({"control": "signal"}, "config: control: must be 'messages' or 'signals', not 'signal'; did you mean 'sig"),
    ],
)
def test_a_wrong_script_config_is_refused(raw: Any, problem: str) -> None:
    assert script_refusal(raw).startswith(problem)


def test_a_config_that_holds_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    assert script_refusal({"config": loop}) == "config: config: is nested deeper than 64 levels"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=st.dictionaries(st.sampled_from(sorted({*Settings.model_fields, *ScriptSettings.model_fields})), JSON))
def test_any_values_give_settings_or_problems_of_one_line(raw: dict[str, Any]) -> None:
    for model in (Settings, ScriptSettings):
        problems = ["x"]
        try:
            model.parse(raw, "x")
        except ConfigError as error:
            problems = error.problems
        assert problems
        assert all(line.isprintable() for line in problems)


def test_the_nearest_name_is_found_whatever_the_case() -> None:
    assert nearest("ETL", ["load", "etl2"]) == "etl2"
    assert nearest("zzz", ["load", "etl2"]) is None
    assert did_you_mean("lode", ["load"]) == "; did you mean 'load'?"
    assert did_you_mean("zzz", ["load"]) == ""


def test_what_is_shown_is_one_short_printable_line() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 1000)) < 70
    assert printable("a\x1b[1m\udcff") == r"a\x1b[1m\udcff"


def dotted_keys(model: type[BaseModel]) -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        inner = field.default
        keys += dotted_keys(type(inner)) if isinstance(inner, BaseModel) else [name]
    return keys


def test_every_key_is_described_and_documented() -> None:
    page = Path(__file__).parents[2].joinpath("docs/config.md").read_text()
    for key in {*dotted_keys(Settings), *dotted_keys(ScriptSettings), *HistoryOverride.model_fields}:
        assert re.search(rf"^\| `([a-z_.]+\.)?{key}(\.[a-z_]+)?` \|", page, re.MULTILINE), key
