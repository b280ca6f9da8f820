"""docs/tutorial.md, docs/howto.md and docs/cli.md: what they tell a reader to write and to type works, in order."""

from __future__ import annotations

import getpass
import re
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx
import pytest
from helpers.daemon import Daemon, free_port
from helpers.documents import Shell, described, fenced, text, titled, typed
from helpers.waiting import DEADLINE_S, until
from typer.testing import CliRunner

from harnessd.cli.app import app

JOB = """
from harnessd import Cradle

class {name}(Cradle):
    def run(self):
        while not (msg := self.get_msg(timeout=0.1)) or msg["cmd"] != "STOP":
            self.set_status(status={{"argv": __import__("sys").executable}})
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    yield made
    made.close()


def lines(page: str) -> list[str]:
    return [line for block in typed(page) for line in block.splitlines()]


def type_in(shell: Shell, line: str) -> str:
    """Return what the line prints. Plain calls of `harnessd` are made in this process: that is ten times as fast."""
    if not line.startswith("harnessd ") or re.search("[|>$]", line):
        return shell(line)
    done = CliRunner().invoke(app, shlex.split(line)[1:], env=shell.env)
    assert done.exit_code == 0, f"{line}\n{done.output}"
    return done.output


def test_the_tutorial_works(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    page = text("docs/tutorial.md")
    monkeypatch.chdir(daemon.folder)
    (program,), (settings, job) = fenced(page, "python"), fenced(page, "toml")
    assert (titled(settings), titled(job)) == ("counting/harnessd.toml", "counting/jobs/counter.toml")
    (daemon.folder / "counter.py").write_text(program)
    (daemon.folder / "counting").symlink_to(daemon.config)
    described(daemon, settings)
    daemon.write("counter", job)
    shell = Shell(daemon.folder, daemon.port)
    venv, enter, install, check, serve, again, export, *rest = lines(page)
    assert [venv, enter, install, again] == ["python3.11 -m venv venv", ". venv/bin/activate", "pip install .", enter]
    assert "1 jobs, no problems" in shell(check)
    assert serve == "harnessd serve counting"
    daemon.start()
    daemon.wait_state("counter", "running")
    daemon.status("counter")
    name, value = export.removeprefix("export ").split("=")
    shell.env[name] = str(daemon.folder / value)
    sample = fenced(page, "text")[0].splitlines()
    told = {line: told_by(daemon, shell, line) for line in rest}
    assert told["harnessd ps"].splitlines()[0].split() == sample[0].split()
    assert "100" in told["harnessd config counter"]
    assert daemon.get("/config").json()["overrides"] == {"step": 5}
    assert "stopped" in told["harnessd runs counter"] and "signaled" in told["harnessd runs counter"]
    assert len(told[rest[-1]].splitlines()) == 5


def told_by(daemon: Daemon, shell: Shell, line: str) -> str:
    """Return what the line prints, once what it kills has come again."""
    before, server = daemon.hb("counter"), daemon.server_pid()
    told = type_in(shell, line)
    if line.startswith("kill") and "healthz" in line:
        daemon.wait_new_server(server)
        assert daemon.hb("counter")["pid"] == before["pid"]
    elif line.startswith("kill"):
        daemon.wait_for(lambda: daemon.hb("counter")["restarts"] == 1, "it is started again")
        daemon.wait_for(lambda: daemon.get("/jobs/counter/status").json()["seq"] >= 5, "it has reported five times")
    return told


def test_the_page_on_tasks_works(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    page = text("docs/howto.md")
    monkeypatch.chdir(daemon.folder)
    told = daemon.folder / "told.json"
    apart = {
        "/srv/report/venv/bin/python": sys.executable,
        "nobody": getpass.getuser(),
        '"numpy", "pandas"': '"decimal"',
    }
    apart |= {"/var/log/harnessd-told.json": str(told)}
    settings = ""
    for block in fenced(page, "toml"):
        for written, here in apart.items():
            block = block.replace(written, here)
        if titled(block) == "config/harnessd.toml":
            settings = block + settings if block.splitlines()[1].startswith("preload") else settings + block
        else:
            daemon.write(Path(titled(block)).stem, block)
    described(daemon, settings.replace("[http]", "[http]\nport = 2222"))
    for name in ("Report", "Feed"):
        (daemon.config / f"{name.lower()}.py").write_text(JOB.format(name=name))
    daemon.write("feed", 'entrypoint = "../feed.py:Feed"\n[config]\nlimit = 1\n')
    daemon.launch()
    shell = Shell(daemon.folder, daemon.port)
    shell.env |= {"HARNESSD_CONFIG": str(daemon.config)}
    daemon.wait_for(lambda: "serving" in daemon.log, "it serves")
    for job in ("feed", "report", "backup"):
        has_reported = f"harnessd status {job}"
        daemon.wait_for(lambda line=has_reported: type_in(shell, line).strip() != "null", has_reported)
    assert sys.executable in type_in(shell, "harnessd status report")
    said = {line: type_in(shell, line) for line in lines(page)}
    assert "feed" in said["HARNESSD_URL=http://127.0.0.1:2222 HARNESSD_TOKEN=$(cat alice.token) harnessd ps"]
    assert "report" not in said["HARNESSD_URL=http://127.0.0.1:2222 HARNESSD_TOKEN=$(cat alice.token) harnessd ps"]
    # A start is answered before there is a process, so the page's own question may come too early.
    daemon.wait_for(lambda: "nightly" in type_in(shell, "harnessd runs nightly"), "its run is stored")
    assert "5" in said["harnessd config feed"]
    daemon.write("bad", 'command = ["sh", "-c", "exit 3"]\nrestart = "never"\n')
    type_in(shell, "harnessd reload")
    daemon.wait_for(lambda: told.exists() and '"failed"' in told.read_text(), "it is told")


def test_the_first_commands_of_the_page_on_the_command_line_work(daemon: Daemon) -> None:
    (block,) = fenced(text("docs/cli.md"), "sh")
    daemon.job("vol-target", "harnessd.examples.vol_target:VolTarget", config={"step_seconds": 0.01})
    daemon.job("feed-a", "Idle")
    daemon.start()
    daemon.wait_status("vol-target", target_vol=4.0)
    daemon.wait_all("running")
    shell = Shell(daemon.folder, daemon.port)
    shell.env |= {"HARNESSD_CONFIG": str(daemon.config)}
    for line in (line.partition("  #")[0] for line in block.splitlines()):
        if " -f " not in line:
            assert type_in(shell, line), line
            continue
        with subprocess.Popen(["bash", "-c", f"exec {line}"], env=shell.env, stdout=subprocess.PIPE) as going:
            try:
                daemon.wait_for(lambda going=going: changed(daemon) and ready(going.stdout), "it shows what happens")
                assert going.stdout and b"feed-a" in going.stdout.read1()
            finally:
                going.kill()


def changed(daemon: Daemon) -> bool:
    return daemon.get("/jobs/feed-a/restart").status_code == 202


def ready(stream: IO[bytes] | None) -> bool:
    return bool(select.select([stream], [], [], 0)[0])


def test_the_problems_of_the_page_on_the_configuration_are_told_so(daemon: Daemon) -> None:
    (sample,) = fenced(text("docs/config.md"), "")
    for line in sample.splitlines():
        file, _, number = re.match(r"(\S+): (\S+) \(line (\d+)\)", line).groups()  # type: ignore[union-attr]
        above = "\n" * (int(number) - 2)
        if file.endswith("harnessd.toml"):
            (daemon.config / "harnessd.toml").write_text(f"{above}[http]\nprot = 2222\n")
        else:
            daemon.write(Path(file).stem, f'command = ["true"]{above}\nenv = {{ TOKEN = "${{FEED_TOKEN}}" }}\n')
    command = [str(Path(sys.executable).with_name("harnessd")), "check", "config"]
    done = subprocess.run(command, cwd=daemon.folder, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (1, sample)


def test_the_script_of_the_page_on_jobs_works(tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text("\n".join(fenced(text("docs/job.md"), "python")))
    shell = Shell(tmp_path, free_port())
    command = [sys.executable, "page.py", "-x", f'{{"http": {{"port": {shell.port}}}}}']
    script = subprocess.Popen(command, cwd=tmp_path, env=shell.env)
    try:
        until(lambda: serves(f"http://127.0.0.1:{shell.port}/jobs/vol-target/hb"), "the script serves")
        shell("curl http://127.0.0.1:2222/kill")
        assert script.wait(DEADLINE_S) == 128 + signal.SIGTERM
    finally:
        script.kill()
        script.wait(DEADLINE_S)


def serves(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False
