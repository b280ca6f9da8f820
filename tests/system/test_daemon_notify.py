"""Who is told what happens to the jobs: a web server that comes and goes, and a program."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers.daemon import Daemon
from helpers.documents import Shell, commands, fenced, section, text
from helpers.receiver import Receiver

from harnessd.server.notices import NoticeKind
from harnessd.server.settings import Notify

SECRETS = ("URL-SECRET", "HEADER-SECRET")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.down()


def notify(daemon: Daemon, **keys: Any) -> None:
    """Write the settings, with one that is told."""
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in ({"window": 0.2} | keys).items())
    daemon.settings()
    with open(daemon.config / "harnessd.toml", "a") as file:
        file.write(f"\n[[notify]]\n{lines}\n")


def start(daemon: Daemon) -> None:
    daemon.start(NO_PROXY="*")


def state_of_outbox(daemon: Daemon) -> list[tuple[Any, ...]]:
    return daemon.rows("SELECT job, kind, waiting, lasting FROM outbox ORDER BY id")


def test_a_receiver_that_was_down_gets_everything_in_order_whatever_was_killed(
    daemon: Daemon, receiver: Receiver
) -> None:
    notify(daemon, url=receiver.url)
    with open(daemon.config / "harnessd.toml", "a") as file:
        file.write('headers = {Authorization = "Bearer HEADER-SECRET"}\n')
    says = 'printf "\\033[31mit breaks\\033[0m\\n"; echo \'{"status": {"n": 7}}\' >> $HARNESS_JOURNAL; exit 3'
    daemon.job("a", ["sh", "-c", says], restart="never")
    daemon.job("b", "Ends", args=["4", "0"], restart="never", autostart=False)
    good = daemon.folder / "good"
    daemon.job("c", ["sh", "-c", f"test -e {good} && exec sleep 1000"], restart="never", autostart=False)
    start(daemon)
    daemon.wait_for(lambda: daemon.health()["notify"][0]["error"], "it was tried in vain")
    daemon.wait_new_server(daemon.kill_server())
    for name in ("b", "c"):
        daemon.post(f"/jobs/{name}/start")
        daemon.wait_state(name, "failed")
    daemon.wait_for(lambda: len(state_of_outbox(daemon)) == 3, "all is stored")
    assert daemon.health()["notify"][0]["waiting"] == 3
    daemon.stop()

    start(daemon)  # it starts job a again, which fails again: that is no news
    daemon.wait_state("a", "failed")
    receiver.up()
    daemon.wait_for(lambda: len(receiver.told) == 3, "all is told")
    assert receiver.told == [("a", "failed"), ("b", "failed"), ("c", "failed")]
    good.touch()
    daemon.post("/jobs/c/start")
    daemon.wait_for(lambda: len(receiver.told) == 4, "the recovery is told")
    assert receiver.told[3] == ("c", "recovered")
    daemon.wait_for(
        lambda: state_of_outbox(daemon) == [("a", "failed", 0, 1), ("b", "failed", 0, 1)], "what lasts is kept"
    )
    first = receiver.messages[0]
    assert {headers["Authorization"] for headers in receiver.headers} == {"Bearer HEADER-SECRET"}
    assert first["text"].startswith(f"a on {first['host']}: failed (exit code 3)")
    told = first["notices"][0]
    assert (told["log"], told["status"], told["exit"]["code"], told["state"]) == (["it breaks"], {"n": 7}, 3, "failed")
    events = daemon.get("/jobs/a/events", kind="notified").json()["rows"]
    assert [event["data"]["receiver"] for event in events] == ["127.0.0.1"]
    show_no_secret(daemon)


def show_no_secret(daemon: Daemon) -> None:
    pages = [daemon.get(path).text for path in ("/healthz", "/events", "/jobs", "/jobs/a", "/metrics", "/openapi.json")]
    checked = (daemon.state / "harnessd.db").read_bytes().decode(errors="replace")
    for secret in SECRETS:
        assert not [page for page in (*pages, checked, daemon.log) if secret in page]


def test_what_happens_together_is_one_message_and_flapping_is_one_notice(daemon: Daemon, receiver: Receiver) -> None:
    receiver.up()
    notify(daemon, url=receiver.url, window=1.5, jobs=["feed-*"], remind="2s")
    flapping = {"restart": "always", "backoff": {"first_s": 0.05, "max_s": 0.05}, "max_failures": 1000}
    for number in range(3):
        daemon.job(f"feed-{number}", "Ends", args=["1", "0"], **flapping)
    daemon.job("other", "Ends", args=["1", "0"], **flapping)
    start(daemon)
    feeds = ["feed-0", "feed-1", "feed-2"]
    daemon.wait_for(lambda: {job for job, _ in receiver.told[3:]} == {*feeds}, "they are told, and reminded of")
    first, *later = receiver.messages
    assert sorted((each["job"], each["kind"]) for each in first["notices"]) == [(feed, "backoff") for feed in feeds]
    assert all(each["reminder"] for message in later for each in message["notices"])
    assert "still in backoff since" in later[0]["text"]


def test_a_program_gets_the_message_on_its_stdin(daemon: Daemon) -> None:
    out, program, good = daemon.folder / "out", daemon.config / "tell", daemon.folder / "good"
    program.write_text(f'#!/bin/sh\ncat >> "{out}"; echo >> "{out}"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    notify(daemon, command=["./tell"], on=["backoff", "recovered", "stopped"], tags=["prod"], window=0)
    script = f"test -e {good} && exec sleep 1000"
    daemon.job("feed", ["sh", "-c", script], tags=["prod"], backoff={"first_s": 0.3, "reset_after_s": 0.3})
    daemon.job("test", ["sh", "-c", script])
    start(daemon)

    def told() -> list[str]:
        lines = out.read_text().splitlines() if out.exists() else []
        return [f"{each['job']} {each['kind']}" for line in lines for each in json.loads(line)["notices"]]

    daemon.wait_for(lambda: state_of_outbox(daemon) == [("feed", "backoff", 0, 1)], "it is told, and that is stored")
    assert told() == ["feed backoff"]
    daemon.wait_new_server(daemon.kill_server())
    good.touch()
    daemon.wait_for(lambda: told() == ["feed backoff", "feed recovered"], "it is told that it is over")
    daemon.post("/jobs/feed/stop")
    daemon.wait_for(lambda: told()[2:] == ["feed stopped"], "it is told that somebody has stopped it")
    daemon.stop()
    assert len(told()) == 3, "that the daemon ends is no news"


def test_a_reload_puts_another_receiver_in_force(daemon: Daemon, receiver: Receiver) -> None:
    daemon.job("bad", "Ends", args=["1", "0"], restart="never")
    start(daemon)
    daemon.wait_state("bad", "failed")
    assert "notify" not in daemon.health()
    notify(daemon, url=receiver.url)
    assert daemon.reload()["restart_needed"] == []
    daemon.wait_for(lambda: daemon.health()["notify"][0]["waiting"] == 1, "it is to be told what is wrong")
    other = Receiver()
    other.up()
    try:
        notify(daemon, url=other.url)
        daemon.reload()
        daemon.wait_for(lambda: other.told == [("bad", "failed")], "it gets at its new address what was waiting")
    finally:
        other.down()
    pid = daemon.folder / "pid"
    notify(daemon, command=["sh", "-c", f"echo $$ > {pid}; exec sleep 1000"], name="slow", window=0, timeout="1h")
    daemon.reload()
    daemon.wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"), "it is told")
    assert [each["receiver"] for each in daemon.health()["notify"]] == ["slow"]
    assert daemon.stop() == 0, "the daemon waits for no receiver"
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()
    rows = daemon.rows("SELECT receiver, job, waiting FROM outbox")
    assert rows == [("slow", "bad", 1)], "what was for one that is gone is forgotten"


def test_the_page_on_notifications_works(daemon: Daemon, receiver: Receiver) -> None:
    page = text("docs/notifications.md")
    (settings,), (program,), (sample,) = (fenced(page, language) for language in ("toml", "python", "json"))
    receiver.up()
    (daemon.config / "oncall").write_text(program.replace("/tmp", str(daemon.folder)))
    (daemon.config / "oncall").chmod(0o700)
    daemon.settings()
    with open(daemon.config / "harnessd.toml", "a") as file:
        file.write(re.sub('https://hooks[^"]*', receiver.url, settings).replace("remind", "window = 0\nremind"))
    says = 'echo cannot log in; echo \'{"status": {"orders": 12}}\' >> $HARNESS_JOURNAL; exit 1'
    daemon.job("feed-eu", ["sh", "-c", says], tags=["prod"], restart="never")
    daemon.job("feed-us", ["sh", "-c", says], restart="never")
    start(daemon)
    out = daemon.folder / "oncall.txt"
    daemon.wait_for(lambda: len(receiver.told) == 2 and out.exists(), "both are told")
    daemon.wait_for(lambda: out.read_text() == "failed feed-eu cannot log in\n", "it is told of one of the jobs")
    documented, sent = json.loads(sample), receiver.messages[0]
    assert sent.keys() == documented.keys()
    (told,) = (each for message in receiver.messages for each in message["notices"] if each["job"] == "feed-eu")
    assert told.keys() == documented["notices"][0].keys()
    assert told["exit"].keys() == documented["notices"][0]["exit"].keys()
    assert (told["status"], told["log"]) == ({"orders": 12}, ["cannot log in"])
    shell = Shell(daemon.folder, daemon.port)
    shell.env |= {"HARNESSD_CONFIG": str(daemon.config)}
    for command in commands(page, "harnessd"):
        daemon.wait_for(
            lambda command=command: shell(command).count("notified") == 3, "what was told is in the history"
        )


def test_the_page_on_notifications_has_every_kind() -> None:
    page = text("docs/notifications.md")
    assert [kind for kind in get_args(NoticeKind) if f"`{kind}`" not in page] == []
    part = section("docs/config.md", "[[notify]]")
    (row,) = re.findall(r"^\| `notify\.on` .*$", part, re.MULTILINE)
    assert [kind for kind in get_args(NoticeKind) if kind not in row] == []
    assert row.split("|")[3].strip() == ", ".join(Notify.model_fields["on"].default)
