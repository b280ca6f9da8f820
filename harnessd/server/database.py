"""Opens a database, and says what is wrong with one that fails."""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from contextlib import closing
from enum import Enum, auto
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.pool import NullPool, QueuePool

from harnessd.errors import StoreError
from harnessd.server import migrations
from harnessd.server.desired import BUSY_MS

WAL_LIMIT_BYTES = 64 << 20  # a larger write-ahead log is cut as soon as no reader needs it
_CHECKPOINT_PAGES = 1000
_WRITER_CACHE_KIB = 32 << 10


class Trouble(Enum):
    """What an error of the database means."""

    STORAGE = auto()  # it may work later: locked, full, read-only, unreachable
    LOST = auto()  # the file is damaged or gone
    ROWS = auto()  # the database is well, what it was given is not


class FileGone(StoreError):
    """The file was deleted or replaced while it was in use."""


class Database:
    """One database, by URL: one engine for the writer, one for whoever reads."""

    def __init__(self, where: str | os.PathLike[str]) -> None:
        """`where` is an SQLAlchemy URL or the path of an SQLite file."""
        text = os.fspath(where)
        self.url = make_url(text) if "://" in text else make_url("sqlite://").set(database=text)
        if self.url.drivername == "postgresql":
            self.url = self.url.set(drivername="postgresql+psycopg")
        self.path = Path(self.url.database or "") if self.url.get_backend_name() == "sqlite" else None
        self.readers = self._engine(QueuePool, reads=True)
        self._writer = self._engine(NullPool, reads=False)
        self._identity: tuple[int, int] | None = None

    def connect(self) -> Connection:
        """Return the writer's connection, and the tables as this code has them. Raise NewerSchema, or any error."""
        if self.path:
            self._make_private(self.path)
        connection = self._writer.connect()
        try:
            with connection.begin():
                migrations.upgrade(connection)
        except BaseException:
            connection.close()
            raise
        self._identity = self._stat()
        return connection

    @staticmethod
    def _make_private(path: Path) -> None:
        """Make the file, so that it and its WAL have the mode; one that is there is not touched.

        Closing a descriptor of a file drops every POSIX lock that this process has on it, those of SQLite's connections
        too, and the next program that closes the database would take itself for the last one and delete the WAL.
        """
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            if os.statvfs(path).f_flag & os.ST_RDONLY:  # SQLite would only say that it cannot open it
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path)) from None

    def check(self) -> None:
        """Raise FileGone when the file that was connected to is no longer the one of that name."""
        if self._identity != self._stat():
            raise FileGone(f"the database {self.path} was deleted or replaced")

    def set_aside(self) -> Path | None:
        """Rename what is left of the file; return its new name, None when nothing is left."""
        assert self.path is not None
        self.readers.dispose()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        aside = self.path.with_name(f"{self.path.name}.corrupt-{stamp}")
        number = 1
        while aside.exists():
            number += 1
            aside = self.path.with_name(f"{self.path.name}.corrupt-{stamp}-{number}")
        for suffix in ("-shm", "-wal", ""):
            if os.path.exists(f"{self.path}{suffix}"):
                os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
        return aside if aside.exists() else None

    def wal_bytes(self) -> int:
        """Return the size of the write-ahead log."""
        try:
            return os.stat(f"{self.path}-wal").st_size if self.path else 0
        except OSError:
            return 0  # there is none yet

    def bound_wal(self, connection: Connection) -> None:
        """Cut the write-ahead log if it is long and no reader needs it; wait for readers no longer than 50 ms."""
        if self.wal_bytes() > WAL_LIMIT_BYTES:
            driver = _driver(connection)
            driver.execute("PRAGMA busy_timeout = 50")
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            driver.execute(f"PRAGMA busy_timeout = {BUSY_MS}")

    def vacuum(self, connection: Connection) -> None:
        """Give freed pages back to the filesystem. Raise StoreError where the database does it by itself."""
        if self.path is None:
            raise StoreError("cannot vacuum: this database does that by itself")
        _driver(connection).execute("VACUUM")
        _driver(connection).execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def damage(self, connection: Connection) -> list[str]:
        """Return what SQLite finds wrong with the file; nothing for another database, which looks after itself."""
        if connection.dialect.name != "sqlite":
            return []
        rows = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA quick_check(20)")]
        return [] if rows == ["ok"] else rows

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy the database into a file, in one go: a reader that takes long does not hold up the writer.

        Raise StoreError, OSError or sqlite3.Error; then no file of that name was made.
        """
        if self.path is None:
            raise StoreError("cannot back up: use the database's own tool for it, pg_dump for PostgreSQL")
        partial = f"{os.fspath(path)}.partial"
        os.close(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        try:
            with closing(sqlite3.connect(self.path)) as source, closing(sqlite3.connect(partial)) as target:
                source.backup(target)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise

    def trouble(self, error: BaseException) -> Trouble:
        """Return what the error means."""
        if isinstance(error, FileGone):
            return Trouble.LOST
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(cause, sqlite3.Error):
            code = getattr(cause, "sqlite_errorcode", 0)
            if (
                code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
                or code == sqlite3.SQLITE_READONLY_DBMOVED
            ):
                return Trouble.LOST
        gone = isinstance(error, DBAPIError) and error.connection_invalidated
        return Trouble.STORAGE if gone or isinstance(error, _STORAGE) else Trouble.ROWS

    def dispose(self) -> None:
        self.readers.dispose()
        self._writer.dispose()

    def _stat(self) -> tuple[int, int] | None:
        if self.path is None:
            return None
        try:
            stat = os.stat(self.path)
        except OSError:
            return 0, 0
        return stat.st_ino, stat.st_dev

    def _engine(self, pool: type[NullPool | QueuePool], reads: bool) -> Engine:
        engine = create_engine(self.url, poolclass=pool)
        if self.path is None:
            return engine

        @event.listens_for(engine, "connect")
        def connected(connection: DBAPIConnection, _record: Any) -> None:
            connection.isolation_level = None  # BEGIN is ours, below
            for pragma in (*_PRAGMAS, "query_only = on" if reads else f"cache_size = -{_WRITER_CACHE_KIB}"):
                connection.execute(f"PRAGMA {pragma}")

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

        return engine


def _driver(connection: Connection) -> sqlite3.Connection:
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


_STORAGE = (StoreError, OperationalError, InterfaceError, OSError, MemoryError)
_PRAGMAS = (
    f"busy_timeout = {BUSY_MS}",
    "journal_mode = wal",
    "synchronous = normal",
    "foreign_keys = on",
    f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
    f"journal_size_limit = {WAL_LIMIT_BYTES}",
)
