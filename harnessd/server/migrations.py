"""Brings a database to the tables of this code. Alembic is imported only when there is something to migrate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect

from harnessd.errors import StoreError
from harnessd.server import schema
from harnessd.server.desired import HEAD, refuse_newer

if TYPE_CHECKING:
    from alembic.config import Config


def upgrade(connection: Connection) -> None:
    """Make or migrate the tables, inside the caller's transaction. Raise NewerSchema or StoreError."""
    version = current(connection)
    if version == HEAD:
        return
    if version is None:
        if tables := inspect(connection).get_table_names():
            raise StoreError(f"cannot use the database: it has the tables {', '.join(tables[:5])} of something else")
        schema.create_all(connection)
        return
    refuse_newer(version)
    from alembic import command

    command.upgrade(config(connection), "head")


def current(connection: Connection) -> str | None:
    """Return the revision of the database, None when it has none."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    row = connection.exec_driver_sql("SELECT version_num FROM alembic_version").first()
    return None if row is None else str(row[0])


def config(connection: Connection) -> Config:
    """Return Alembic's configuration for the connection: there is no alembic.ini."""
    from alembic.config import Config

    result = Config()
    result.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    result.attributes["connection"] = connection
    return result


def scripts() -> Path:
    """Return the folder of the migrations: in an installed package it lies inside, in a checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_alembic"
    return inside if inside.is_dir() else package.parent / "alembic"
