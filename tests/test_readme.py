"""README.md: what it tells a reader to write and to type works as it stands there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
from helpers.brand import Brand
from helpers.daemon import Daemon, free_port
from helpers.documents import ROOT, Shell, commands, described, fenced, section, text, titled
from helpers.waiting import DEADLINE_S, until


def test_the_targets_of_make_are_there() -> None:
    page = text("README.md")
    targets = {line.split()[1] for line in commands(page, "make")} | set(re.findall(r"`make (\w+)`", page))
    assert targets == {"test", "run", "lint", "bench", "chaos"}
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True, timeout=DEADLINE_S)


def test_every_page_is_linked() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", text("README.md")))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def test_the_job_in_a_script_answers_every_line_and_leaves_nothing(tmp_path: Path) -> None:
    part = section("README.md", "A job")
    shell = Shell(tmp_path, free_port())
    (program,) = fenced(part, "python")
    (tmp_path / "example.py").write_text(shell.here(program))
    (run,) = commands(part, "python")
    brand = Brand()
    script = subprocess.Popen(
        [sys.executable, *run.split()[1:]], cwd=tmp_path, env=shell.env, preexec_fn=brand.wear, start_new_session=True
    )
    try:
        until(lambda: listens(shell.port) or script.poll() is not None, "the script listens")
        lines = commands(part, "curl")
        assert len(lines) == 8
        answers = [shell(line) for line in lines]
        assert '"state"' in answers[0] and '"reason":"killed"' in answers[-1]
        assert script.wait(DEADLINE_S) == 128 + 15
        until(lambda: not brand.members(), "nothing is left")
    finally:
        brand.kill()
        script.wait(DEADLINE_S)


def listens(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/hb", trust_env=False).is_success
    except httpx.TransportError:
        return False


def test_the_two_files_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "config/jobs").mkdir(parents=True)
    for block in fenced(section("README.md", "Many jobs"), "toml"):
        (tmp_path / titled(block)).write_text(block)
    assert (tmp_path / "config/jobs/vol-target.toml").exists()
    assert "1 jobs, no problems" in Shell(tmp_path, 2222)("harnessd check config")


def test_every_line_on_many_jobs_is_answered_by_the_example_jobs(tmp_path: Path) -> None:
    part = section("README.md", "Many jobs")
    daemon = Daemon(tmp_path)
    try:
        shutil.copytree(ROOT / "config", daemon.config, dirs_exist_ok=True)
        (tmp_path / "harnessd").symlink_to(ROOT / "harnessd")  # of whose folder the shell script is started
        described(daemon, (ROOT / "config/harnessd.toml").read_text())
        shell = Shell(tmp_path, daemon.port)
        shell("harnessd check config")
        daemon.start()
        daemon.wait_all("running")
        assert daemon.status("disk-report")["total_bytes"] > 0
        for command in commands(part, "curl"):
            assert shell(command)
        assert daemon.stop() == 0
    finally:
        daemon.close()
