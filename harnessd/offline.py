"""What can be done to a config directory, a database and its tokens without asking a daemon."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from harnessd.errors import ConfigError, StoreError
from harnessd.server import configdir, migrations, places
from harnessd.server.database import Database
from harnessd.server.desired import HEAD
from harnessd.server.tokens import RoleName, Tokens


def problems(config_dir: Path) -> tuple[list[str], int]:
    """Return a line for each thing that is wrong with the directory, and how many jobs are right."""
    try:
        loaded = configdir.load(config_dir)
    except ConfigError as error:
        return error.problems, 0
    return loaded.all_problems(), len(loaded.jobs)


def warnings(config_dir: Path) -> list[str]:
    """Return a line for each thing in the directory that is not right, though it can be used."""
    try:
        loaded = configdir.load(config_dir)
    except ConfigError:  # which is a problem
        return []
    no_jobs = [] if configdir.JOBS in loaded.there else [f"{config_dir}: there is no {configdir.JOBS}/ in it"]
    return [*no_jobs, *(loaded.settings.warnings() if loaded.settings else [])]


def schemas() -> str:
    """Return the JSON Schemas of the settings and of a job file."""
    return json.dumps(configdir.json_schemas(), indent=2)


def current(config_dir: Path) -> str:
    """Return the schema's revision in the database, and the one of this code."""
    with _database(config_dir) as database, database.readers.connect() as connection:
        return f"{migrations.current(connection) or 'none'} (this harnessd: {HEAD})"


def upgrade(config_dir: Path) -> str:
    """Make or migrate the tables."""
    with _database(config_dir) as database, database.connect() as connection:
        with connection.begin():
            migrations.upgrade(connection)
        return f"the schema is at {HEAD}"


def damage(config_dir: Path) -> list[str]:
    """Return what is wrong with the database file."""
    with _database(config_dir) as database, database.readers.connect() as connection:
        return database.damage(connection)


def vacuum(config_dir: Path) -> str:
    """Give the space of deleted rows back to the filesystem."""
    with _database(config_dir) as database, database.connect() as connection:
        database.vacuum(connection)
    return "done"


def backup(config_dir: Path, file: Path) -> str:
    """Copy the database as it is now into a new file, while it is in use."""
    if file.exists():
        raise StoreError(f"cannot back up to {file}: it exists")
    with _database(config_dir) as database:
        try:
            database.backup(file)
        except (sqlite3.Error, OSError) as error:
            why = getattr(error, "strerror", None) or error
            raise StoreError(f"cannot back up {database.path} to {file}: {why}") from error
    return f"{file}: {file.stat().st_size} bytes"


def tokens(state_dir: Path) -> list[dict[str, Any]]:
    """Return what may be shown of the tokens of the daemon that has this state directory."""
    return [token.shown(time.time()) for token in Tokens(state_dir).all()]


def new_token(state_dir: Path, name: str, role: RoleName, jobs: Sequence[str], expires: str | None) -> str:
    """Make a token; return its secret, which is kept nowhere. Raises BadRequest, WrongState when the name is taken."""
    return Tokens(state_dir).new(name, role, jobs, expires)


def revoke_token(state_dir: Path, name: str) -> None:
    """Forget a token."""
    Tokens(state_dir).revoke(name)


@contextmanager
def _database(config_dir: Path) -> Iterator[Database]:
    settings = configdir.load(config_dir).require_settings()
    where = settings.database or places.state_dir(settings.state_dir) / places.DATABASE_NAME
    if isinstance(where, Path) and not where.exists():
        raise StoreError(f"cannot use {where}: there is no database yet")
    database = Database(where)
    try:
        yield database
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise StoreError(f"cannot use {where}: {str(error).splitlines()[0]}") from error
    finally:
        database.dispose()
