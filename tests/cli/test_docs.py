"""docs/cli.md has every verb and option, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

import harnessd
from harnessd.cli.app import app
from harnessd.cli.outcome import Code

TEXT = (Path(harnessd.__file__).parent.parent / "docs" / "cli.md").read_text()
ROW = re.compile(r"^\| `([a-z][a-z ]*)([^`]*)` \|([^|]*)\|", re.MULTILINE)
GROUP: Any = typer.main.get_command(app)


def verbs(group: Any, before: str = "") -> dict[str, set[str]]:
    """Return the options of each verb."""
    found: dict[str, set[str]] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= verbs(command, f"{before}{name} ")
        else:
            found[before + name] = {opt for param in command.params for opt in options(param)}
    return found


def options(param: Any) -> list[str]:
    return [opt for opt in (*param.opts, *param.secondary_opts) if opt.startswith("-")]


APP = verbs(GROUP)
DOCUMENTED = {name.strip(): set(re.findall(r"`(-[^`]+)`", given)) for name, _, given in ROW.findall(TEXT)}


def test_the_documented_verbs_are_those_of_the_app() -> None:
    assert DOCUMENTED.keys() == APP.keys()


@pytest.mark.parametrize("verb", sorted(APP))
def test_the_documented_options_are_those_of_the_verb(verb: str) -> None:
    assert DOCUMENTED[verb] == APP[verb]


def test_the_options_of_all_verbs_and_the_exit_codes_are_documented() -> None:
    for option in (opt for param in GROUP.params for opt in options(param)):
        assert f"`{option}" in TEXT or f"harnessd {option}`" in TEXT
    assert {int(code) for code in re.findall(r"^\| (\d+) \| (?!`)", TEXT, re.MULTILINE)} >= set(Code)


def test_every_verb_has_a_line_of_help() -> None:
    def lines(group: Any) -> None:
        for command in group.commands.values():
            assert command.help
            assert all(getattr(param, "help", None) for param in command.params), command.name
            if hasattr(command, "commands"):
                lines(command)

    lines(GROUP)
