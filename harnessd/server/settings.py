"""The settings of a daemon (`harnessd.toml`), and of one job harnessed by its own script (`ProcessHarness(config)`)."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from ssl import SSLContext
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from harnessd.errors import BadRequest, ConfigError
from harnessd.server.authority import parse_authority
from harnessd.server.certificate import Pem, expiry_warning, read, tls_context
from harnessd.server.nearest import MAX_INT_BITS, printable, problem_lines, shown
from harnessd.server.notices import TROUBLES, NoticeKind
from harnessd.server.timespan import span_us

MAX_CONFIG_DEPTH = 64
MAX_SIZE_BYTES = 1 << 62

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_SIZE = re.compile(r"([0-9]{1,18}(?:[.][0-9]{1,6})?) ?([kKmMgGtT][iI]?)?[bB]?")
_FACTORS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_FACTORS |= {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


class Table(BaseModel):
    """A table of a settings or job file: every key known, every type meant, nothing changed afterwards."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str, text: str = "", folder: Path | None = None) -> Self:
        """Return the table that `raw` describes; relative paths in it start at `folder` (default: the cwd).

        Raises ConfigError, each problem beginning with `where` and, when `text` is the file's own, naming its line.
        """
        context = {"folder": folder or Path.cwd(), "environ": os.environ}
        try:
            return cls.model_validate(dict(raw) if isinstance(raw, Mapping) else raw, context=context)
        except ValidationError as error:
            raise ConfigError(problem_lines(error, cls, where, text)) from None


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{shown(name)} is no name: 1 to 64 ASCII letters, digits, '.', '-' and '_', a letter or digit first"
        )
    if name == "all":
        raise ValueError("'all' is no name: it stands for every job")
    return name


def _read_size(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(f'must be a size in bytes, such as 65536, "10MB" or "64KiB", not {shown(value)}')
    return int(float(found[1]) * _FACTORS[(found[2] or "").upper()])


def absolute(path: str, folder: Path) -> Path:
    """Return the path as seen from `folder`. Links are followed in the folder only: a venv's python is one."""
    return Path(os.path.abspath(folder.resolve() / os.path.expanduser(check_text(path))))


def program(name: str, folder: Path) -> str:
    """Return the path of the program, which is looked for in PATH when its name has no slash. Raises ValueError."""
    path = absolute(name, folder) if "/" in name else shutil.which(check_text(name))
    if path is None or not os.path.isfile(path) or not os.access(path, os.X_OK):
        raise ValueError(f"there is no program {printable(path or name)}")
    return str(path)


def check_text(text: str) -> str:
    """Return the text, which a system call is to take. Raises ValueError when it holds a NUL."""
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    return text


def _read_folder(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str) and not value:
        raise ValueError("must not be empty")
    if isinstance(value, str | Path):
        return absolute(str(value), (info.context or {}).get("folder") or Path.cwd())
    return value


def _check_module(name: str) -> str:
    if not _MODULE.fullmatch(name):
        raise ValueError(f'must name modules, such as "numpy", not {shown(name)}')
    return name


def _check_database(url: str) -> str:
    if not re.match(r"[a-z][a-z0-9+_]*://", url):
        raise ValueError('must be an SQLAlchemy URL, such as "sqlite:////var/lib/harnessd/harnessd.db"')
    return url


def _check_token(token: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]+", token.get_secret_value()):
        raise ValueError("must be of visible ASCII characters without spaces")
    return token


def _read_span(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return span_us(value, "it") / 1e6
    except BadRequest:
        raise ValueError(f'must be seconds, or a length such as "30s", "15m" or "1h", not {shown(value)}') from None


def _check_url(url: SecretStr) -> SecretStr:
    text = url.get_secret_value()
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch(r"[!-~]+", text):
        raise ValueError('must be a URL that begins with "http://" or "https://", in ASCII and without spaces')
    return url


def _check_headers(headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
    for name, value in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise ValueError(f"{shown(name)} cannot be the name of a header")
        if not re.fullmatch(r"(?:[!-~](?:[ -~]*[!-~])?)?", value.get_secret_value()):
            raise ValueError(f"{printable(name)} must be of ASCII characters, without spaces at its ends")
    return headers


def _check_program(argv: list[str], info: ValidationInfo) -> list[str]:
    name, *arguments = [check_text(each) for each in argv]
    return [program(name, (info.context or {}).get("folder") or Path.cwd()), *arguments]


def _check_receivers(receivers: list[Notify]) -> list[Notify]:
    names = [each.receiver for each in receivers]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f'has two that are named {twice!r}: give each a name of its own, as in name = "oncall"')
    return receivers


def _check_host(host: str) -> str:
    if not re.fullmatch(r"[\w.:%-]+", host, re.ASCII):
        raise ValueError(f'must be an address or a host name, such as "127.0.0.1" or "0.0.0.0", not {shown(host)}')
    return host


def _check_allowed(name: str) -> str:
    if parse_authority(name, "") is None:
        raise ValueError(f'must be as in a Host header, such as "box", "box:2222" or "[::1]", not {shown(name)}')
    return name


def _check_json(table: dict[str, Any]) -> dict[str, Any]:
    _check_json_value(table, "", MAX_CONFIG_DEPTH)
    return table


def _check_json_value(value: object, key: str, depth: int) -> None:
    """Raise ValueError for what JSON cannot carry: a job gets its config as JSON."""
    if depth == 0:
        raise ValueError(f"is nested deeper than {MAX_CONFIG_DEPTH} levels")
    match value:
        case dict():
            for name, item in value.items():
                if not isinstance(name, str):
                    raise ValueError(f"has a key that is no string: {shown(name)}")
                _check_json_value(item, f"{key}.{name}", depth - 1)
        case list() | tuple():
            for number, item in enumerate(value):
                _check_json_value(item, f"{key}[{number}]", depth - 1)
        case int() if value.bit_length() > MAX_INT_BITS:
            raise ValueError(f"holds a number of more than 300 digits at {_short(key)}")
        case float() if not math.isfinite(value):
            raise ValueError(f"holds {value} at {_short(key)}, which JSON cannot carry")
        case None | bool() | int() | float() | str():
            pass
        case _:
            raise ValueError(
                f"holds a {type(value).__name__} at {_short(key)}, which JSON cannot carry; make it a string"
            )


def _short(key: str) -> str:
    return printable(key.removeprefix("."))[:100]


Name = Annotated[str, AfterValidator(_check_name)]
Size = Annotated[
    int,
    BeforeValidator(_read_size),
    Field(ge=0, le=MAX_SIZE_BYTES),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": f"^{_SIZE.pattern}$"}]}),
]
Folder = Annotated[Path, BeforeValidator(_read_folder)]
Module = Annotated[str, AfterValidator(_check_module)]
JsonTable = Annotated[dict[str, Any], AfterValidator(_check_json)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Journal = Literal["memory", "disk"]
Control = Literal["messages", "signals"]
KeepDays = Annotated[float, Field(gt=0, le=1e6)]
KeepRows = Annotated[int, Field(ge=1, le=MAX_SIZE_BYTES)]
Patience = Annotated[float, Field(gt=0, le=86400)]
MaxRate = Annotated[float, Field(gt=0, le=1e9)]
Span = Annotated[
    float,
    BeforeValidator(_read_span),
    Field(ge=0, le=1e9),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]}),
]


class Tls(Table):
    """The certificate of the server and its key, both PEM files."""

    cert: Folder = Field(description="the certificate, and those between it and its root behind it; PEM")
    key: Folder = Field(description="the certificate's private key, not encrypted; PEM")

    _pem: Pem = PrivateAttr()

    def context(self) -> SSLContext:
        """Return what a server needs to prove itself with what the files held when they were read."""
        return tls_context(self._pem)

    def warning(self) -> str | None:
        """Return what is not right with the certificate, though it can be used."""
        return expiry_warning(self.cert, self._pem)


def _read_tls(tls: Tls) -> Tls:
    tls._pem = read(tls.cert, tls.key)
    return tls


class Http(Table):
    """Where the HTTP interface listens and whom it lets in."""

    host: Annotated[str, AfterValidator(_check_host)] = Field(
        default="127.0.0.1", description="address to listen on; 0.0.0.0 and :: mean every interface"
    )
    port: int = Field(default=2222, ge=0, le=65535, description="TCP port; 0 takes a free one")
    allowed_hosts: list[Annotated[str, AfterValidator(_check_allowed)]] = Field(
        default=[],
        strict=False,
        description="names besides localhost and addresses that a request may give as its Host",
    )
    token: Annotated[SecretStr, AfterValidator(_check_token)] | None = Field(
        default=None, description="a bearer token with the role admin, beside those of `harnessd token`"
    )
    trust_loopback: bool = Field(
        default=True, description="whether peers on the loopback get in without a token; false for a shared host"
    )
    tls: Annotated[Tls, AfterValidator(_read_tls)] | None = Field(
        default=None, description="certificate and key; with them, https is spoken and http is not"
    )
    max_body_bytes: Size = Field(default=1_000_000, description="largest request body; bytes")
    max_header_bytes: Size = Field(
        default=32_768, ge=1024, le=1 << 20, description="largest request line and headers together; bytes"
    )
    max_headers: int = Field(default=100, ge=10, le=1000, description="headers that a request may have")
    header_seconds: Patience = Field(
        default=10.0, description="time that a request's headers may take to come, and a TLS handshake; seconds"
    )
    body_seconds: Patience = Field(default=60.0, description="time that a request's body may take to come; seconds")
    idle_seconds: Patience = Field(
        default=60.0, description="time that a connection may wait for a request before it is closed; seconds"
    )
    send_seconds: Patience = Field(
        default=120.0, description="time in which a client must take something of its answer; seconds"
    )
    max_connections: int = Field(
        default=2000, ge=1, le=1_000_000, description="connections over TCP; those to the Unix socket count apart"
    )
    max_connections_per_peer: int = Field(
        default=500, ge=1, le=1_000_000, description="connections from one address, of IPv6 from one /64"
    )


class HistoryOverride(Table):
    """What one job keeps differently; a key left out is as in the settings."""

    keep_days: KeepDays | None = Field(default=None, description="age at which this job's rows are deleted; days")
    keep_rows_per_job: KeepRows | None = Field(default=None, description="rows of this job beyond which the oldest go")
    max_rate: MaxRate | None = Field(default=None, description="statuses stored of this job before thinning; rows/s")


class History(Table):
    """How much is kept in the database."""

    keep_days: KeepDays = Field(default=90, description="age at which rows are deleted; days")
    keep_rows_per_job: KeepRows = Field(default=10_000_000, description="rows of a job beyond which the oldest go")
    max_rate: MaxRate = Field(default=200, description="statuses of a job stored before thinning; rows/s")

    def overridden(self, override: HistoryOverride | None) -> History:
        """Return these limits with what the job's own file says in their place."""
        return self.model_copy(update=override.model_dump(exclude_none=True)) if override else self


class Storage(Table):
    """The keys that both modes share: where things are kept, and how much of them."""

    state_dir: Folder | None = Field(
        default=None,
        description="logs, database and all else that lasts; default: /var/lib/harnessd as root, else "
        "$XDG_STATE_HOME/harnessd",
    )
    runtime_dir: Folder | None = Field(
        default=None,
        description="journals in memory; default: /run/harnessd as root, else $XDG_RUNTIME_DIR/harnessd, else "
        "/dev/shm/harnessd-UID",
    )
    journal: Journal = Field(
        default="memory", description="where journals lie: memory (runtime_dir) or disk (state_dir)"
    )
    journal_max_bytes: Size = Field(
        default=64_000_000, ge=1_000_000, description="unread statuses that a run's journal may hold; bytes"
    )
    http: Http = Http()
    history: History = History()


class Notify(Table):
    """One who is told what happens to jobs: over HTTP, or by a program."""

    name: Name | None = Field(
        default=None, description="what the receiver is called; default: the URL's host, or the program's name"
    )
    url: Annotated[SecretStr, AfterValidator(_check_url)] | None = Field(
        default=None, description="takes a POST of JSON, whose text a chat shows; never shown"
    )
    command: Annotated[list[str], Field(min_length=1), AfterValidator(_check_program)] | None = Field(
        default=None, strict=False, description="program that reads the JSON from its stdin, and its arguments"
    )
    headers: Annotated[dict[str, SecretStr], AfterValidator(_check_headers)] = Field(
        default={}, description="sent with the POST; never shown"
    )
    on: Annotated[list[NoticeKind], Field(min_length=1)] = Field(
        default=["failed", "backoff", "oom", "hung", "unhealthy", "recovered"],
        strict=False,
        description="what is told",
    )
    jobs: list[str] = Field(default=["*"], strict=False, description="names of jobs, or patterns such as feed-*")
    tags: list[Name] = Field(default=[], strict=False, description="only of jobs that have one of these tags")
    remind: Annotated[Span, Field(gt=0)] | None = Field(
        default=None, description="time after which what still fails is told again; seconds"
    )
    window: Annotated[Span, Field(le=86400)] = Field(
        default=5.0, description="what happens within so long of the first goes with it, in one message; seconds"
    )
    timeout: Annotated[Span, Field(gt=0, le=3600)] = Field(
        default=10.0, description="time that the receiver has for a message; seconds"
    )

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if (self.url is None) == (self.command is None):
            raise ValueError("needs url or command, one of the two")
        if self.headers and self.url is None:
            raise ValueError("headers go with url, not with command")
        if "recovered" in self.on and not set(TROUBLES).intersection(self.on):
            raise ValueError(f"on has recovered, and none of what there is to recover from: {', '.join(TROUBLES)}")
        return self

    @property
    def receiver(self) -> str:
        """Return what it is called in events and in the outbox, which never have its URL."""
        if self.name or not self.url:
            return self.name or Path((self.command or [""])[0]).name
        return str(urlsplit(self.url.get_secret_value()).hostname)


class Settings(Storage):
    """What `harnessd.toml` says. Relative paths in it start at its folder."""

    preload: list[Module] = Field(
        default=[], strict=False, description="libraries imported once, before the jobs that use them are forked"
    )
    default_job: Name | None = Field(
        default=None, description="the job that the routes without a name act on, when there are several"
    )
    database: Annotated[str, AfterValidator(_check_database)] | None = Field(
        default=None, repr=False, description="SQLAlchemy URL; default: SQLite in state_dir/harnessd.db"
    )
    sample_seconds: float = Field(
        default=10.0,
        gt=0,
        le=86400,
        description="time between two samples of a run's cpu, rss, threads and fds; seconds",
    )
    notify: Annotated[list[Notify], AfterValidator(_check_receivers)] = Field(
        default=[], strict=False, description="who is told what happens to jobs"
    )

    def with_tls_of(self, other: Settings) -> Settings:
        """Return these settings with the certificate of others: it takes no new server to put it in force."""
        return self.model_copy(update={"http": self.http.model_copy(update={"tls": other.http.tls})})

    def warnings(self) -> list[str]:
        """Return what is not right, though it can be used."""
        return [found for found in (self.http.tls and self.http.tls.warning(),) if found]


class ScriptSettings(Storage):
    """What a script hands to `ProcessHarness(config=...)`. Relative paths in it start at the cwd."""

    name: Name | None = Field(default=None, description="name of the job; default: its class's name in kebab case")
    config: JsonTable = Field(default={}, description="what get_config() returns until a CONFIG command changes it")
    kill_grace: Seconds = Field(default=3.0, description="time between SIGTERM and SIGKILL; seconds")
    control: Control = Field(default="messages", description="verbs reach the job as messages or as signals")
