from __future__ import annotations

import os
from pathlib import Path

import pytest

from harnessd.cli.outcome import Code, Failure
from harnessd.cli.where import Address, Given, addresses


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return tmp_path


def config(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "harnessd.toml").write_text(text)
    return folder


def test_a_url_is_asked_alone_and_has_the_token() -> None:
    said = Given(url="https://box:9000", socket=Path("s"), config=Path("c"))
    assert addresses(said, {"HARNESSD_TOKEN": "t"}) == [Address(url="https://box:9000", token="t")]


def test_the_command_line_goes_before_the_environment() -> None:
    environ = {"HARNESSD_URL": "http://a", "HARNESSD_SOCKET": "e.sock", "HARNESSD_TOKEN": "t"}
    assert addresses(Given(socket=Path("s")), environ) == [Address(Path("s"))]
    assert addresses(Given(), environ) == [Address(url="http://a", token="t")]
    del environ["HARNESSD_URL"]
    assert addresses(Given(), environ) == [Address(Path("e.sock"))]


def test_a_config_directory_names_the_state_directory_and_the_port(elsewhere: Path) -> None:
    folder = config(elsewhere / "etc", 'state_dir = "../state"\n[http]\nhost = "0.0.0.0"\nport = 3000')
    expected = [Address(elsewhere / "state" / "harnessd.sock"), Address(url="http://127.0.0.1:3000")]
    assert addresses(Given(config=folder), {}) == expected
    assert addresses(Given(), {"HARNESSD_CONFIG": str(folder)}) == expected


@pytest.mark.parametrize(
    ("http", "url"),
    [
        ("", "http://127.0.0.1:2222"),
        ('host = "::"', "http://[::1]:2222"),
        ('host = "box"\nport = 80\ntls = {}', "https://box:80"),
        ("port = 0", None),
    ],
)
def test_the_address_is_the_one_that_the_settings_listen_on(elsewhere: Path, http: str, url: str | None) -> None:
    folder = config(elsewhere / "etc", f'state_dir = "/s"\n[http]\n{http}')
    found = addresses(Given(config=folder), {"HARNESSD_TOKEN": "t"})
    assert found == [Address(Path("/s/harnessd.sock")), *([Address(url=url)] if url else [])]


def test_json_settings_are_read_too(elsewhere: Path) -> None:
    (elsewhere / "etc").mkdir()
    (elsewhere / "etc" / "harnessd.json").write_text('{"state_dir": "s", "http": {"port": 0}}')
    assert addresses(Given(config=Path("etc")), {}) == [Address(elsewhere / "etc" / "s" / "harnessd.sock")]


def test_a_config_directory_here_is_found(elsewhere: Path) -> None:
    config(elsewhere / "config", 'state_dir = "/s"')
    assert addresses(Given(), {})[0] == Address(Path("/s/harnessd.sock"))


def test_a_folder_named_config_without_settings_is_somebody_elses(elsewhere: Path) -> None:
    (elsewhere / "config").mkdir()
    assert addresses(Given(), {"XDG_STATE_HOME": "/x"})[0] == Address(Path("/x/harnessd/harnessd.sock"))


def test_nothing_said_means_the_usual_state_directory_then_the_usual_port(monkeypatch: pytest.MonkeyPatch) -> None:
    port = Address(url="http://127.0.0.1:2222")
    assert addresses(Given(), {"XDG_STATE_HOME": "/x"}) == [Address(Path("/x/harnessd/harnessd.sock")), port]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert addresses(Given(), {}) == [Address(Path("/var/lib/harnessd/harnessd.sock")), port]


@pytest.mark.parametrize("text", ["state_dir = ", "\x00"])
def test_settings_that_cannot_be_read_are_named(elsewhere: Path, text: str) -> None:
    config(elsewhere / "etc", text)
    with pytest.raises(Failure, match=r"etc/harnessd\.toml") as failure:
        addresses(Given(config=Path("etc")), {})
    assert failure.value.code is Code.USAGE


def test_a_config_directory_that_is_none_is_refused() -> None:
    with pytest.raises(Failure, match="no directory"):
        addresses(Given(config=Path("nowhere")), {})
