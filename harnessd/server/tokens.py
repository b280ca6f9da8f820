"""Bearer tokens with a role: the file that holds them, for the command that writes it and the server that reads it.

They lie in `tokens.json` in the state directory and not in the database, so that a token can be made and revoked while
the daemon is down or its database is damaged. The server looks at the file's stamp whenever a token is shown to it, so
what was written is in force with the next request.

A secret is 256 random bits and is not stored, its SHA-256 is. A slow, salted hash protects what people choose and can
be guessed; nobody guesses 256 bits, however fast the hash, and a slow one would cost each request its time.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field, TypeAdapter, ValidationError

from harnessd.errors import BadRequest, HarnessError, WrongState
from harnessd.server import places
from harnessd.server.nearest import did_you_mean, printable
from harnessd.server.settings import Name, Table
from harnessd.server.timespan import LATEST_US, span_us

FILE_NAME = "tokens.json"
PREFIX = "hd_"  # by which people and scanners of leaked secrets know it
SETTINGS = "settings"  # the name of the token that harnessd.toml has
MOST_TOKENS = 1000
MAX_FILE_BYTES = 4 << 20
GLOB = r"[A-Za-z0-9._*?!\[\]-]{1,100}"

_NOBODY_ELSE = stat.S_IWGRP | stat.S_IWOTH
_NAME: TypeAdapter[str] = TypeAdapter(Name)

logger = logging.getLogger(__name__)


RoleName = Literal["read", "operate", "admin"]


class Role(IntEnum):
    """What a visitor may: each may what those before it may."""

    READ = 1
    OPERATE = 2
    ADMIN = 3

    def __str__(self) -> str:
        return self.name.lower()


class Token(Table):
    """A token as it is stored."""

    name: Name
    role: RoleName
    jobs: list[Annotated[str, Field(pattern=f"^{GLOB}$")]] | None = Field(default=None, min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$", repr=False)
    created: AwareDatetime
    expires: AwareDatetime | None = None

    def has_expired(self, now_s: float) -> bool:
        """Whether it is no longer valid at that time, in epoch seconds."""
        return self.expires is not None and self.expires.timestamp() <= now_s

    def shown(self, now_s: float) -> dict[str, Any]:
        """Return all but what the secret is known by, ready for JSON."""
        return self.model_dump(mode="json", exclude={"sha256"}) | {"expired": self.has_expired(now_s)}


class _File(Table):
    version: Literal[1] = 1
    tokens: list[Token] = Field(default=[], max_length=MOST_TOKENS)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token that is valid gives: a role, for all jobs or for those that match one of the globs."""

    name: str
    role: Role
    jobs: tuple[str, ...] | None = None


def matches(job: str, globs: Sequence[str] | None) -> bool:
    """Whether the job is among those that the globs allow; None allows all."""
    return globs is None or any(fnmatchcase(job, glob) for glob in globs)


# reading


class TokenReader:
    """The file as the server sees it. A damaged one lets no token in, is said in the log, and `problem` tells why."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE_NAME
        self._stamp: object = None
        self._tokens: list[tuple[bytes, Token]] = []
        self._problem: str | None = None
        self.is_there = False  # somebody has made a token once
        self._look()

    @property
    def problem(self) -> str | None:
        """Why no token of the file is let in, None while nothing is wrong with it."""
        self._look()
        return self._problem

    def grant(self, secret: bytes) -> Grant | None:
        """Return what the secret gives, None when no token in force has it."""
        self._look()
        shown, found = hashlib.sha256(secret).digest(), None
        for digest, token in self._tokens:  # all of them, so that the time does not tell which one it was
            if hmac.compare_digest(shown, digest):
                found = token
        if found is None or found.has_expired(time.time()):
            return None
        return Grant(found.name, Role[found.role.upper()], tuple(found.jobs) if found.jobs else None)

    def _look(self) -> None:
        try:
            stamp = _stamp(os.stat(self._path))
            if stamp == self._stamp:
                return
            tokens, problem, self.is_there = _read(self._path).tokens, None, True
        except FileNotFoundError:
            tokens, problem, stamp, self.is_there = [], None, None, False
        except OSError as error:  # it may pass: the next request looks again
            tokens, problem, stamp, self.is_there = [], f"cannot read {self._path}: {error.strerror}", None, True
        except HarnessError as error:
            tokens, problem, self.is_there = [], str(error), True
        if problem and problem != self._problem:
            logger.error("%s; no token of it gets in", problem)
        elif self._problem and not problem:
            logger.info("%s can be read again", self._path)
        self._stamp, self._problem = stamp, problem
        self._tokens = [(bytes.fromhex(token.sha256), token) for token in tokens]


def _stamp(found: os.stat_result) -> object:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _read(path: Path) -> _File:
    """Return what is in the file. Raises HarnessError when that makes no sense or others may write it, OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
            raise HarnessError(f"cannot use {path}: it is no file of tokens")
        owners = 0, os.geteuid(), os.stat(path.parent).st_uid  # the last can put any file in its place
        if found.st_uid not in owners or found.st_mode & _NOBODY_ELSE:
            raise HarnessError(f"cannot use {path}: other users may write it; it must belong to its owner alone")
        text = file.read(MAX_FILE_BYTES)
    try:
        return _File.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "its text"
        raise HarnessError(f"cannot use {path}: {where}: {first['msg']}") from None


# writing


class Tokens:
    """The tokens of the daemon that has this state directory, for who looks after them.

    Methods raise HarnessError when the file cannot be used.
    """

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir
        self._path = state_dir / FILE_NAME

    def all(self) -> Sequence[Token]:
        """Return the tokens, by name."""
        try:
            return sorted(_read(self._path).tokens, key=lambda token: token.name)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise HarnessError(f"cannot read {self._path}: {error.strerror}") from error

    def new(self, name: str, role: RoleName, jobs: Sequence[str] = (), expires: str | None = None) -> str:
        """Make a token that is valid for so long (`90d`), by default for ever; return its secret, kept nowhere.

        Raises BadRequest for what is no name, glob or length of time, WrongState when the name is taken.
        """
        _check_name(name)
        _check_globs(jobs)
        secret = PREFIX + secrets.token_urlsafe(32)
        now_us = time.time_ns() // 1000
        until_us = None if expires is None else now_us + span_us(expires, "expires")
        token = Token(
            name=name,
            role=role,
            jobs=list(dict.fromkeys(jobs)) or None,
            sha256=hashlib.sha256(secret.encode()).hexdigest(),
            created=_moment(now_us),
            expires=None if until_us is None else _moment(min(until_us, LATEST_US - 1)),
        )
        with self._changing() as tokens:
            if any(other.name == name for other in tokens):
                raise WrongState(f"cannot make token {name!r}: there is one of that name; revoke it first")
            if len(tokens) >= MOST_TOKENS:
                raise WrongState(f"cannot make token {name!r}: there are {MOST_TOKENS}, revoke one first")
            tokens.append(token)
        return secret

    def revoke(self, name: str) -> None:
        """Forget the token. Raises HarnessError when there is none of that name."""
        with self._changing() as tokens:
            names = [token.name for token in tokens]
            if name not in names:
                hint = did_you_mean(name, names)
                raise HarnessError(f"cannot revoke token {name[:100]!r}: no such token{hint}")
            del tokens[names.index(name)]

    @contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        """Give the tokens to change, and put them in place of the file; nobody else does so meanwhile."""
        if not self._folder.exists():
            places.make_private(self._folder)
        try:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                tokens = [*self.all()]
                yield tokens
                self._write(_File(tokens=tokens).model_dump(mode="json"), os.fstat(folder))
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise HarnessError(f"cannot write {self._path}: {error.strerror}") from error

    def _write(self, content: object, owner: os.stat_result) -> None:
        """Replace the file whole, so that no reader and no power failure sees a part of it."""
        path = self._path.with_name(f".{FILE_NAME}.new")
        with suppress(FileNotFoundError):
            path.unlink()  # a writer that was killed has left it
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            if os.geteuid() != owner.st_uid:  # root writes for the daemon of another user
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(json.dumps(content, indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(path, self._path)


def _check_name(name: str) -> None:
    try:
        _NAME.validate_python(name)
    except ValidationError as error:
        raise BadRequest(f"cannot make this token: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if name == SETTINGS:
        raise BadRequest(f"cannot make token {SETTINGS!r}: that is the name of the one in the settings")


def _check_globs(globs: Sequence[str]) -> None:
    for glob in globs:
        if not re.fullmatch(GLOB, glob):
            raise BadRequest(
                f"cannot use jobs {printable(glob)[:100]!r}: it takes a job's name or a glob, as in feed-*"
            )


def _moment(at_us: int) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=at_us)
