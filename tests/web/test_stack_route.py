"""What becomes of a stack that cannot be shown, whatever the reason."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harnessd.errors import NotPython, Unavailable, WrongState
from harnessd.server import stack
from harnessd.server.tokens import Role
from harnessd.states import State
from harnessd.web.app import ENDPOINTS
from harnessd.web.problem import status_of


def a_job() -> Any:
    info = SimpleNamespace(pid=os.getpid(), mark=0)
    return SimpleNamespace(
        name="etl", live=SimpleNamespace(info=info, run=1, ended=False), job=SimpleNamespace(state=State.RUNNING)
    )


def spy(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Have this in place of py-spy."""
    program = folder / "py-spy"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(stack, "_program", lambda: str(program))


def refused() -> Any:
    with pytest.raises((Unavailable, NotPython, WrongState)) as caught:
        asyncio.run(stack.of(a_job()))
    assert caught.value.job == "etl" and str(caught.value).startswith("cannot show the stack of 'etl': ")
    return caught.value


def test_it_takes_the_role_operate() -> None:
    assert [endpoint.role for endpoint in ENDPOINTS if endpoint.path == "stack"] == [Role.OPERATE]


def test_without_py_spy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    error = refused()
    assert status_of(error) == 503 and "pip install 'harnessd[stack]'" in str(error)
    assert asyncio.run(stack.for_event(os.getpid())) == {
        "stack": None,
        "stack_error": "py-spy is not installed: pip install 'harnessd[stack]'",
    }


@pytest.mark.parametrize(
    ("said", "status", "told"),
    [
        ("Permission Denied: Try running again with elevated permissions", 503, "ptrace_scope"),
        ("Error: Failed to find python version from target process", 409, "not Python"),
        ("Error: Failed to get stack traces\n\nCaused by: it moved", 503, "Failed to get stack traces"),
    ],
)
def test_what_py_spy_says_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, status: int, told: str
) -> None:
    spy(monkeypatch, tmp_path, f"echo '{said}' >&2; exit 1")
    error = refused()
    assert status_of(error) == status and told in str(error)


def test_a_dump_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spy(monkeypatch, tmp_path, f"test -e {tmp_path}/again && echo '[]' || {{ touch {tmp_path}/again; exit 1; }}")
    assert asyncio.run(stack.of(a_job()))["processes"] == [{"pid": os.getpid(), "threads": []}]


def test_the_job_is_never_paused_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spy(monkeypatch, tmp_path, f"echo $* > {tmp_path}/asked; echo '[]'")
    asyncio.run(stack.of(a_job()))
    assert "--nonblocking" in (tmp_path / "asked").read_text()
    assert "--locals" not in (tmp_path / "asked").read_text()


def test_a_dump_that_takes_too_long_does_not_hold_up_a_watchdog(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stack, "TIMEOUT_S", 0.1)
    spy(monkeypatch, tmp_path, "exec sleep 2")
    assert "within 0.1 s" in asyncio.run(stack.for_event(os.getpid()))["stack_error"]


def test_an_event_keeps_a_bounded_part(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [{"function": "f", "file": "f.py", "line": 1}] * 500
    monkeypatch.setattr(stack, "dump", lambda _: [{"frames": frames}] * 100)
    kept = asyncio.run(stack.for_event(1))["stack"]
    assert len(kept) == 20 and {len(thread["frames"]) for thread in kept} == {30}
