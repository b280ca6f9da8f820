"""Settings and job files with anything in them: a value or a ConfigError, whose problems are printable lines."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from fuzz.profile import EVIL_NUMBERS, EVIL_TEXT, VALUES, examples
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from harnessd.errors import ConfigError
from harnessd.server.configdir import diff, load
from harnessd.server.definition import from_file
from harnessd.server.jobspec import JobSpec
from harnessd.server.settings import History, ScriptSettings, Settings, Table

TEXTS = EVIL_TEXT | st.sampled_from(
    [
        "http://[::1",
        "http://[",
        "http://a:99999/",
        "http://a:x/",
        "http://\u2100.example",
        "https://u:p@h/",
        "//x",
        "1e400B",
        "9" * 18 + "TiB",
        "99999999999999999d",
        "-1s",
        "1.5.5h",
        "0o777",
        "999",
        "~root",
        "~nobody-there/x",
        "/dev/zero",
        "/proc/self/mem",
        "a.b:C",
        "./x.py:C",
        "/:.py:A",
        "${",
        "${HOME}",
        "$$",
        "a=b",
        "all",
        "a..b",
        "[0]",
        "x[",
        "sqlite://",
        "postgresql://[",
        "sh",
        "/bin/sh",
        "root",
        "messages",
        "never",
        "restart",
        "disk",
        "failed",
    ]
)
TIMES = st.sampled_from([datetime.date(1, 1, 1), datetime.time(23, 59), datetime.datetime(9999, 12, 31, 23)])
ANYTHING = (
    VALUES | TEXTS | EVIL_NUMBERS | TIMES | st.lists(TEXTS, max_size=3) | st.dictionaries(TEXTS, TEXTS, max_size=2)
)


def tables(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """Return tables with the model's own keys and anything under them, tables of its tables among that."""
    keys: dict[str, st.SearchStrategy[Any]] = {}
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        listed = field.annotation not in below and str(field.annotation).startswith("list")
        inner = [tables(kind) if not listed else st.lists(tables(kind), max_size=2) for kind in below]
        keys[name] = st.one_of(ANYTHING, *inner, *inner)
    unknown = st.dictionaries(TEXTS | st.text(max_size=6), ANYTHING, max_size=1)
    some = st.lists(st.sampled_from(sorted(keys)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: keys[name] for name in names})
    )
    return st.one_of(some, some, some, st.builds(lambda a, b: a | b, some, unknown))


def check_problems(problems: list[str]) -> None:
    assert problems
    assert len(problems) <= 21
    for line in problems:
        assert line.isprintable(), line
        line.encode()
        assert len(line) < 2000 + 6000  # a path of EVIL_TEXT is named in full


def parsed(model: type[Table], raw: Mapping[str, Any]) -> Table | None:
    try:
        return model.parse(raw, "x.toml", folder=Path("/nonexistent"))
    except ConfigError as error:
        check_problems(error.problems)
        return None


@examples(60)
@given(tables(Settings))
def test_any_settings_are_taken_or_told_wrong(raw: dict[str, Any]) -> None:
    found = parsed(Settings, raw)
    if isinstance(found, Settings):
        found.warnings()
        repr(found)
        assert all(each.receiver for each in found.notify)


@examples(40)
@given(tables(ScriptSettings))
def test_any_settings_of_a_script_are_taken_or_told_wrong(raw: dict[str, Any]) -> None:
    found = parsed(ScriptSettings, raw)
    if isinstance(found, ScriptSettings):
        json.dumps(found.config, allow_nan=False)


STARTABLE = st.sampled_from([{"command": ["/bin/true"]}, {"entrypoint": "a.b:C"}, {}])


@examples(60)
@given(STARTABLE, tables(JobSpec))
def test_any_job_is_taken_and_can_be_shown_and_run_or_told_wrong(start: dict[str, Any], raw: dict[str, Any]) -> None:
    raw = {key: value for key, value in raw.items() if key not in ("name", "file")}
    try:
        spec = JobSpec.read(Path("/nonexistent/etl.toml"), {**raw, **start, "cwd": "/"}, "etl.toml", repr(raw))
    except ConfigError as error:
        check_problems(error.problems)
        return
    check_spec(spec)


def check_spec(spec: JobSpec) -> None:
    json.dumps([spec.masked(), spec.digest], allow_nan=False)
    definition = from_file(spec, History())
    json.dumps(definition.shown, allow_nan=False)
    json.dumps(dict(definition.config), allow_nan=False).encode()


KEYS = st.sampled_from(
    [*JobSpec.model_fields, *Settings.model_fields, "a.b", '"a\\nb"', "[x]", "[[notify]]", "[http]", "[env]"]
)
TOML_VALUES = st.sampled_from(
    [
        '"a"',
        "'''\n'''",
        "0x" + "f" * 300,
        "1e400",
        "-nan",
        "inf",
        "[]",
        "[[[[]]]]",
        "{}",
        "{a={b={}}}",
        "1979-05-27T07:32:00Z",
        *["true", '"\\u0000"', '"\\U0010FFFF"', '"\\uD800"', "['/bin/true']", '"http://["', "9" * 5000, "07:32:00"],
    ]
)
TOML = st.lists(st.tuples(KEYS, st.sampled_from([" = ", "", "=\n"]), TOML_VALUES).map("".join), max_size=6).map(
    "\n".join
)
JSON = tables(JobSpec).map(lambda raw: json.dumps(raw, default=str))
SPOILING = st.lists(
    st.tuples(st.integers(0, 500), st.sampled_from(["", "\0", "\ud800", "\r", '"', "{", "[", "\x85", "é"])), max_size=2
)


def spoilt(text: str, spoiling: list[tuple[int, str]]) -> bytes:
    for at, what in spoiling:
        at %= len(text) + 1
        text = text[:at] + what + text[at + 1 :]
    return text.encode("utf-8", "surrogatepass")


NAMES = st.sampled_from(["etl", "a b", "é", "all", "x" * 65, "-x", "a\nb", "..x", "\udcff", "harnessd"])


@examples(60)
@given(TOML, JSON, TOML, SPOILING, NAMES)
def test_a_directory_of_any_files_is_loaded_with_its_problems(
    job: str, other: str, settings: str, spoiling: list[tuple[int, str]], name: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        jobs = Path(folder, "jobs")
        jobs.mkdir()
        Path(jobs, f"{name}.toml").write_bytes(spoilt(job, spoiling))
        Path(jobs, "other.json").write_bytes(spoilt(other, spoiling))
        Path(folder, "harnessd.toml").write_bytes(spoilt(settings, spoiling))
        loaded = load(Path(folder))
    found = len(loaded.jobs) + len(loaded.problems) + len(loaded.disabled)
    assert found == 2 - name.startswith(".")
    for problems in loaded.problems.values():
        check_problems(problems)
    if loaded.settings is None:
        check_problems(loaded.settings_problems)
    for spec in loaded.jobs.values():
        check_spec(spec)
    assert not diff(loaded.jobs, loaded).changed
