from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect, text

from alembic import command
from harnessd.errors import NewerSchema, StoreError
from harnessd.server import migrations, schema
from harnessd.server.desired import HEAD


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    engine = create_engine(f"sqlite:///{tmp_path / 'x.db'}")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def objects(connection: Connection) -> list[tuple[str, str, str]]:
    """Return every table, index and view with its SQL, without the whitespace that only its maker chose."""
    rows = connection.exec_driver_sql("SELECT type, name, coalesce(sql, '') FROM sqlite_master ORDER BY type, name")
    return [(kind, name, " ".join(sql.replace("\t", " ").split()).replace("( ", "(")) for kind, name, sql in rows]


def test_head_is_the_last_migration(connection: Connection) -> None:
    scripts = ScriptDirectory.from_config(migrations.config(connection))
    assert scripts.get_heads() == [HEAD]
    revisions = [script.revision for script in scripts.walk_revisions()]
    assert revisions == sorted(revisions, reverse=True), "a later schema is known by its greater name"


def test_models_equal_the_migrations(connection: Connection) -> None:
    command.upgrade(migrations.config(connection), "head")
    assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []


def test_a_database_made_at_once_equals_a_migrated_one(connection: Connection) -> None:
    migrations.upgrade(connection)
    other = create_engine("sqlite://")
    with other.connect() as migrated:
        command.upgrade(migrations.config(migrated), "head")
        assert sorted(inspect(migrated).get_table_names()) == sorted(inspect(connection).get_table_names())
        assert [row[:2] for row in objects(migrated)] == [row[:2] for row in objects(connection)]
        views = [[row for row in objects(each) if row[0] == "view"] for each in (migrated, connection)]
        assert views[0] == views[1]
        for table in inspect(connection).get_table_names():
            assert describe(migrated, table) == describe(connection, table)
    other.dispose()


def describe(connection: Connection, table: str) -> list[object]:
    pragmas = ("table_xinfo", "foreign_key_list", "index_list")
    found = [connection.exec_driver_sql(f"PRAGMA {name}({table})").all() for name in pragmas]
    rows = [sorted(tuple(row)[1:] for row in rows) for rows in found]
    without_rowid = connection.exec_driver_sql(f"PRAGMA table_list({table})").one()[4]
    return [*rows, without_rowid]


@pytest.mark.parametrize("version", ["0001", "0002"])
def test_every_old_schema_is_upgraded(connection: Connection, version: str) -> None:
    command.upgrade(migrations.config(connection), version)
    migrations.upgrade(connection)
    assert migrations.current(connection) == HEAD
    assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []


def test_migrations_go_back_to_nothing(connection: Connection) -> None:
    migrations.upgrade(connection)
    command.downgrade(migrations.config(connection), "base")
    assert [row[1] for row in objects(connection) if row[0] == "view"] == []
    assert inspect(connection).get_table_names() == ["alembic_version"]


def test_a_newer_schema_is_refused_and_both_versions_are_named(connection: Connection) -> None:
    migrations.upgrade(connection)
    connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(NewerSchema, match=rf"9999 is newer.*{HEAD}"):
        migrations.upgrade(connection)


def test_a_database_of_something_else_is_left_alone(connection: Connection) -> None:
    connection.execute(text("CREATE TABLE customers (id INTEGER)"))
    with pytest.raises(StoreError, match="customers"):
        migrations.upgrade(connection)


@pytest.mark.parametrize("exists", [False, True])
def test_alembic_is_not_imported_for_a_new_or_current_database(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "x.db"
    code = (
        "import sys; from harnessd.server.store import Store; Store.open(sys.argv[1]).close();"
        "sys.exit('alembic' in sys.modules)"
    )
    root = Path(migrations.__file__).parents[2]
    for _ in range(1 + exists):
        subprocess.run([sys.executable, "-c", code, path], check=True, env={**os.environ, "PYTHONPATH": str(root)})


def test_migrations_inside_the_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "harnessd" / "server" / "migrations.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(migrations, "__file__", str(module))
    assert migrations.scripts() == tmp_path / "alembic"
    (tmp_path / "harnessd" / "_alembic").mkdir()
    assert migrations.scripts() == tmp_path / "harnessd" / "_alembic"
