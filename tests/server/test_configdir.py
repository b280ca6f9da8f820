from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harnessd.errors import ConfigError
from harnessd.server.configdir import MAX_FILE_BYTES, Loaded, diff, json_schemas, load, read_file
from harnessd.server.jobspec import JobSpec
from harnessd.server.settings import Settings

REPOSITORY = Path(__file__).parents[2]
COMMAND = 'command = ["true"]\n'


def write(folder: Path, **files: str) -> Path:
    """Write the settings (`harnessd`) and the jobs, each by its stem."""
    (folder / "jobs").mkdir(exist_ok=True)
    for stem, text in files.items():
        path = folder / "harnessd.toml" if stem == "harnessd" else folder / "jobs" / f"{stem}.toml"
        path.write_text(text)
    return folder


def test_settings_and_jobs_are_loaded_from_toml_and_json(tmp_path: Path) -> None:
    write(tmp_path, harnessd='state_dir = "../state"\ndefault_job = "etl"\n', etl=COMMAND)
    (tmp_path / "jobs/feed.json").write_text('{"command": ["true"], "config": {"a": null}}')
    (tmp_path / "jobs/.#etl.toml").write_text("an editor's own")
    (tmp_path / "jobs/README.md").write_text("not a job")
    loaded = load(tmp_path)
    assert loaded.all_problems() == []
    assert loaded.require_settings().state_dir == tmp_path.parent / "state"
    assert list(loaded.jobs) == ["etl", "feed"]
    assert loaded.jobs["feed"].config == {"a": None}


def test_the_settings_may_be_missing_or_json(tmp_path: Path) -> None:
    write(tmp_path)
    assert load(tmp_path) == Loaded(Settings())
    (tmp_path / "harnessd.json").write_text('{"http": {"port": 3}}')
    assert load(tmp_path).require_settings().http.port == 3


def test_a_disabled_job_is_left_out_whatever_else_it_says(tmp_path: Path) -> None:
    write(tmp_path, harnessd='default_job = "b"', a=COMMAND, b="enabled = false\nnonsense = 1")
    loaded = load(tmp_path)
    assert (list(loaded.jobs), loaded.disabled, loaded.all_problems()) == (["a"], ["b"], [])


def test_a_broken_job_leaves_the_others_alone(tmp_path: Path) -> None:
    write(tmp_path, good=COMMAND, typo=COMMAND + "restrat = 1", syntax="command = [\n\n= 3")
    loaded = load(tmp_path)
    assert list(loaded.jobs) == ["good"]
    assert loaded.problems["typo"] == [
        f"{tmp_path}/jobs/typo.toml: restrat (line 2): unknown key; did you mean 'restart'?"
    ]
    assert re.fullmatch(r".*/syntax\.toml: Invalid value \(at line 3, column 1\)", loaded.problems["syntax"][0])
    assert loaded.all_problems() == loaded.problems["syntax"] + loaded.problems["typo"]


def test_broken_settings_are_told_and_leave_the_jobs_alone(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, harnessd="[http]\nport = 'x'", etl=COMMAND))
    assert list(loaded.jobs) == ["etl"]
    assert loaded.settings is None
    assert loaded.settings_problems == [
        f"{tmp_path}/harnessd.toml: http.port (line 2): must be a whole number, not 'x'"
    ]
    with pytest.raises(ConfigError, match="whole number"):
        loaded.require_settings()


def test_a_doubled_name_is_refused_for_both_files(tmp_path: Path) -> None:
    write(tmp_path, etl=COMMAND, harnessd="")
    (tmp_path / "jobs/etl.json").write_text("{}")
    (tmp_path / "harnessd.json").write_text("{}")
    loaded = load(tmp_path)
    assert loaded.jobs == {}
    assert loaded.problems["etl"] == [
        f"{tmp_path}/jobs/etl.{suffix}: doubled name: etl.json and etl.toml both stand for it; remove one"
        for suffix in ("json", "toml")
    ]
    assert len(loaded.settings_problems) == 2


def test_a_default_job_that_is_none_is_refused_with_the_nearest(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, harnessd='default_job = "elt"', etl=COMMAND))
    assert loaded.settings_problems == [
        f"{tmp_path}/harnessd.toml: default_job: there is no job 'elt'; did you mean 'etl'?"
    ]


def test_a_default_job_whose_file_is_broken_is_no_second_problem(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, harnessd='default_job = "etl"', etl="nonsense"))
    assert loaded.settings_problems == []
    assert len(loaded.all_problems()) == 1


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"a": 1,\n"a": 2}', "doubled key: 'a'"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[1]", "must hold a table (a JSON object)"),
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"\xff", "is not UTF-8 text"),
        (rb'{"a": "\ud800"}', "is not UTF-8 text"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b" " * (MAX_FILE_BYTES + 1), "is larger than 1048576 bytes"),
    ],
    ids=["doubled", "nan", "list", "syntax", "bytes", "surrogate", "deep", "digits", "large"],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        read_file(path)
    assert refused.value.problems[0].startswith(f"{path}: {problem}")


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbf" + COMMAND.encode())
    assert read_file(path) == ({"command": ["true"]}, COMMAND)


def test_what_is_no_readable_file_is_a_problem(tmp_path: Path) -> None:
    jobs = write(tmp_path) / "jobs"
    (jobs / "folder.toml").mkdir()
    (jobs / "dangling.toml").symlink_to("nowhere")
    os.mkfifo(jobs / "fifo.toml")
    (jobs / "bad\n\udcff.toml").write_text(COMMAND)
    assert [line.removeprefix(f"{jobs}/") for line in load(tmp_path).all_problems()][1:] == [
        "dangling.toml: cannot be read: no such file or directory",
        "fifo.toml: is no regular file",
        "folder.toml: cannot be read: is a directory",
    ]
    assert load(tmp_path).problems[r"bad\n\udcff"][0].isprintable()


def test_a_directory_that_cannot_be_read_is_an_error_and_no_empty_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: cannot be read: no such file or directory$"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds neither harnessd.toml nor jobs/$"):
        load(tmp_path)
    (tmp_path / "jobs").write_text("")
    with pytest.raises(ConfigError, match=r"jobs: cannot be read: not a directory$"):
        load(tmp_path)
    (tmp_path / "jobs").unlink()
    (tmp_path / "jobs").symlink_to("away")
    (tmp_path / "harnessd.toml").touch()
    with pytest.raises(ConfigError, match=r"jobs: cannot be read: no such file or directory$"):
        load(tmp_path)


def test_what_was_there_before_is_not_removed_with_its_file(tmp_path: Path) -> None:
    before = load(write(tmp_path, harnessd='default_job = "etl"', etl=COMMAND))
    (tmp_path / "harnessd.toml").unlink()
    with pytest.raises(ConfigError, match=r"harnessd.toml is gone; an empty one stands for the defaults$"):
        load(tmp_path, before)
    assert load(tmp_path).settings == Settings()
    (tmp_path / "harnessd.json").write_text("{}")
    assert load(tmp_path, before).settings == Settings()
    (tmp_path / "jobs").rename(tmp_path / "aside")
    with pytest.raises(ConfigError, match=r"jobs/ is gone; an empty one stands for no jobs$"):
        load(tmp_path, before)
    (tmp_path / "jobs").mkdir()
    assert load(tmp_path, before).jobs == {}


def test_a_diff_names_what_a_reload_has_to_do(tmp_path: Path) -> None:
    old = load(write(tmp_path, same=COMMAND, new_tag=COMMAND, broken=COMMAND, gone=COMMAND, off=COMMAND)).jobs
    write(tmp_path, added=COMMAND, new_tag=COMMAND + 'tags = ["x"]', broken="[", off="enabled = false", wrong="")
    (tmp_path / "jobs/gone.toml").unlink()
    found = diff(old, load(tmp_path))
    assert (found.added, found.changed, found.unchanged) == (["added"], ["new_tag"], ["same"])
    assert found.removed == ["gone", "off"]
    assert sorted(found.refused) == ["broken", "wrong"]
    assert found.refused["broken"][0].startswith(f"{tmp_path}/jobs/broken.toml: Invalid")


def test_a_diff_sees_a_changed_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "1")
    old = load(write(tmp_path, etl=COMMAND + 'env = {A = "${SECRET_KEY}"}')).jobs
    monkeypatch.setenv("SECRET_KEY", "2")
    assert diff(old, load(tmp_path)).changed == ["etl"]


TOML_TEXT = st.lists(
    st.tuples(
        st.sampled_from([*JobSpec.model_fields, "[env]", "[log]", "[config]", "x"]),
        st.sampled_from(["=", ".", "", "=["]),
        st.sampled_from(
            ['"a.py:B"', "'${'", "1", "1e999", "nan", "0x" + "f" * 9000, "{a=1}", "[[", "1979-05-27", '"\0"']
        )
        | st.text(max_size=8),
    ).map("".join),
    max_size=5,
).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=200) | TOML_TEXT, suffix=st.sampled_from(["toml", "json"]))
@example(data=b"a=" + b"[" * 5000, suffix="toml")
@example(data=b'{"config":' + b'{"a":' * 500 + b"1" + b"}" * 501, suffix="json")
@example(data=b'{"command": ["a"], "cwd": "' + b"x" * 5000 + b'"}', suffix="json")
@example(data=b'entrypoint = "' + b"x" * 5000 + b'.py:B"', suffix="toml")
@example(data=b'{"command": ["a"], "user": "\\u0000"}', suffix="json")
@example(data=b'command = ["a"]\nconfig = {a = 0x' + b"f" * 9000 + b"}", suffix="toml")
def test_any_bytes_give_a_job_or_problems_of_one_line(data: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        jobs = write(Path(folder)) / "jobs"
        (jobs / f"etl.{suffix}").write_bytes(data)
        loaded = load(Path(folder))
    assert len(loaded.jobs) + len(loaded.problems) + len(loaded.disabled) == 1
    for line in loaded.problems.get("etl", []):
        assert line.isprintable()
    for job in loaded.jobs.values():
        json.dumps([job.masked(), job.digest])


def test_the_shipped_config_has_no_problem() -> None:
    assert load(REPOSITORY / "config").all_problems() == []


def test_the_schemas_know_every_key_of_a_file_and_no_other() -> None:
    schemas = json_schemas()
    assert set(schemas) == {"harnessd.toml", "jobs/NAME.toml"}
    assert set(schemas["harnessd.toml"]["properties"]) == set(Settings.model_fields)
    job = schemas["jobs/NAME.toml"]
    assert set(job["properties"]) == set(JobSpec.model_fields) - {"name", "file"}
    assert job["oneOf"] == [{"required": ["entrypoint"]}, {"required": ["command"]}]
    assert "required" not in job
    for schema in schemas.values():
        assert all(table["additionalProperties"] is False for table in [schema, *schema["$defs"].values()])
    json.dumps(schemas)


def test_every_key_of_the_schemas_is_described() -> None:
    for schema in json_schemas().values():
        for table in [schema, *schema["$defs"].values()]:
            assert table["description"]
            for key, described in table["properties"].items():
                assert "description" in described or "$ref" in described or "default" in described, key


def test_the_documented_files_have_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEED_PASSWORD", "x")
    page = (REPOSITORY / "docs/config.md").read_text()
    blocks = re.findall(r"```toml\n# config/([a-z/-]+)\.toml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    (tmp_path / "feed.py").write_text("")
    for name, text in blocks:
        write(tmp_path, **{name.removeprefix("jobs/"): text})
    assert load(tmp_path).all_problems() == []


def test_loading_a_config_imports_neither_web_nor_sql() -> None:
    code = (
        "import sys, harnessd.server.configdir;"
        "print(sorted({'sqlalchemy', 'starlette', 'uvicorn', 'psutil', 'asyncio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
