"""Where the daemon is: where the command line or the environment says, else where it usually is.

The first of these that is given, or is there, decides; no other daemon is asked in its place:

1. `--url`, `--socket`, `--config`
2. `HARNESSD_URL` (with `HARNESSD_TOKEN`), `HARNESSD_SOCKET`, `HARNESSD_CONFIG`
3. `./config`, when it holds harnessd.toml
4. the usual state directory, then http://127.0.0.1:2222
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harnessd.cli.outcome import Code, Failure

SOCKET_NAME = "harnessd.sock"
DEFAULT_PORT = 2222
SETTINGS = ("harnessd.toml", "harnessd.json")
_EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Address:
    """A Unix socket, or a URL; `source` is what has made the URL, if that is no URL itself."""

    socket: Path | None = None
    url: str = ""
    token: str | None = None
    source: str = field(default="", compare=False)

    @property
    def shown(self) -> str:
        return str(self.socket or self.url)


@dataclass(frozen=True, slots=True)
class Given:
    """What was said of where it is."""

    url: str | None = None
    socket: Path | None = None
    config: Path | None = None

    @classmethod
    def by(cls, environ: Mapping[str, str]) -> Given:
        socket, config = environ.get("HARNESSD_SOCKET"), environ.get("HARNESSD_CONFIG")
        return cls(environ.get("HARNESSD_URL"), Path(socket) if socket else None, Path(config) if config else None)


def addresses(given: Given, environ: Mapping[str, str]) -> list[Address]:
    """Return where to look for the daemon, one after the other. Raises Failure when what was given cannot be used."""
    said = _first(given, environ)
    if said.url:
        token = environ.get("HARNESSD_TOKEN")
        if token and not re.fullmatch("[!-~]+", token):  # as read from a file with its end of line
            raise Failure(
                Code.USAGE, "cannot use HARNESSD_TOKEN: a space, an end of line or another such character is in it"
            )
        return [Address(url=said.url, token=token)]
    if said.socket:
        return [Address(said.socket)]
    if said.config:
        return _by_config(said.config, environ)
    return [Address(_usual_state_dir(environ) / SOCKET_NAME), Address(url=f"http://127.0.0.1:{DEFAULT_PORT}")]


def state_dir(given: Given, environ: Mapping[str, str]) -> Path:
    """Return the state directory of the daemon, which must be of this host. Raises Failure."""
    said = _first(given, environ)
    if said.url:
        raise Failure(Code.USAGE, f"cannot tell the state directory of {said.url}: say --config DIR, on its host")
    if said.socket:
        return said.socket.absolute().parent
    return _state_dir(_settings(said.config), said.config, environ) if said.config else _usual_state_dir(environ)


def _first(given: Given, environ: Mapping[str, str]) -> Given:
    for said in (given, Given.by(environ)):
        if said.url or said.socket or said.config:
            return said
    return Given(config=Path("config") if any(Path("config", name).exists() for name in SETTINGS) else None)


def _state_dir(settings: Mapping[str, Any], config_dir: Path, environ: Mapping[str, str]) -> Path:
    configured = settings.get("state_dir")
    if not isinstance(configured, str):
        return _usual_state_dir(environ)
    # As harnessd.server.settings reads it, whose import takes too long here.
    return Path(os.path.abspath(config_dir.resolve() / os.path.expanduser(configured)))


def _by_config(config_dir: Path, environ: Mapping[str, str]) -> list[Address]:
    settings = _settings(config_dir)
    state = _state_dir(settings, config_dir, environ)
    http = settings.get("http")
    url = _url(http if isinstance(http, dict) else {})
    source = f"http.host and http.port in {_settings_file(config_dir)}"
    return [Address(state / SOCKET_NAME), *([Address(url=url, source=source)] if url else [])]


def _settings_file(config_dir: Path) -> Path | None:
    return next((config_dir / name for name in SETTINGS if (config_dir / name).exists()), None)


def _settings(config_dir: Path) -> dict[str, Any]:
    if not config_dir.is_dir():
        raise Failure(Code.USAGE, f"cannot use {config_dir}: it is no directory")
    path = _settings_file(config_dir)
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found: object = json.loads(text)
        else:
            import tomllib

            found = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise Failure(Code.USAGE, f"cannot read {path}: {error}") from None
    return found if isinstance(found, dict) else {}


def _url(http: Mapping[str, Any]) -> str:
    """Return where the settings have it listen; nothing for a port that was chosen when it started."""
    port = http.get("port", DEFAULT_PORT)
    if not port:
        return ""
    host = str(http.get("host", "127.0.0.1"))
    host = _EVERY_INTERFACE.get(host, host)
    return f"{'https' if 'tls' in http else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _usual_state_dir(environ: Mapping[str, str]) -> Path:
    """Return what harnessd.server.places has for settings without a state_dir."""
    if os.geteuid() == 0:
        return Path("/var/lib/harnessd")
    return Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "harnessd"
