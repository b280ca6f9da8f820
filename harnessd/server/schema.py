"""The tables and views. `alembic/versions` makes the same, step by step; a test compares the two.

`status` is the one that grows to many millions of rows, and has what its queries need and no more:

- `id` counts rows as they are stored, the order of a history over all jobs;
- (run_id, seq) is unique, so that a line which is read again is not stored again;
  the newest status of a run is the last of them;
- (job_id, at_us) serves the history of one job, a page at a time, and the status as of a moment.

Its `job_id` follows from `run_id`, so only `run_id` is a foreign key. `event` and `sample` name their run without one:
they may outlive it when old history is trimmed. The ids of events are given by the store, in the order of commits.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    text,
)

from harnessd.server.desired import HEAD

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

_Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite's rowid must be declared INTEGER

job = Table(
    "job",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("spec", Text, nullable=False),
    Column("digest", String, nullable=False),
    Column("want", String, nullable=False),
    Column("state", String, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
    Column("overrides", Text, nullable=False),
    Column("restarts", Integer, nullable=False),
    Column("ever_up", Boolean, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("removed_us", BigInteger),
)

run = Table(
    "run",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=False),
    Column("job_id", _Id, ForeignKey("job.id"), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("start_ticks", BigInteger, nullable=False),
    Column("mark", BigInteger, nullable=False),
    Column("spec_digest", String, nullable=False),
    Column("started_us", BigInteger, nullable=False),
    Column("ended_us", BigInteger),
    Column("exit_code", Integer),
    Column("signal", Integer),
    Column("reason", String),
    Column("cpu_s", Float),
    Column("peak_rss_bytes", BigInteger),
    Column("wall_s", Float),
    Column("mono_s", Float),
    Column("journal", Text, nullable=False),
    Column("journal_offset", BigInteger, nullable=False),
    Column("journal_lines", BigInteger, nullable=False),
    Column("journal_done", Boolean, nullable=False),
    Column("status_rows", BigInteger, nullable=False),  # of this run in `status`: counting ten million takes too long
    Column("thinned", BigInteger, nullable=False),  # statuses of this run that were left out
    Index("ix_run_job_id_id", "job_id", "id"),
    Index("ix_run_job_id_started_us", "job_id", "started_us"),
    _unread := Index("ix_run_unread", "id"),
)

status = Table(
    "status",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("job_id", _Id, nullable=False),
    Column("run_id", _Id, ForeignKey("run.id"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Index("ix_status_run_id_seq", "run_id", "seq", unique=True),
    Index("ix_status_job_id_at_us", "job_id", "at_us"),
)

event = Table(
    "event",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=False),
    Column("job_id", _Id, ForeignKey("job.id")),
    Column("run_id", _Id),
    Column("at_us", BigInteger, nullable=False),
    Column("kind", String, nullable=False),
    Column("actor", String),
    Column("data", Text, nullable=False),
    Index("ix_event_job_id_at_us", "job_id", "at_us"),
    Index("ix_event_job_id_kind_at_us", "job_id", "kind", "at_us"),
    Index("ix_event_at_us", "at_us"),
    Index("ix_event_kind_at_us", "kind", "at_us"),
    Index("ix_event_run_id_at_us", "run_id", "at_us"),
)

sample = Table(
    "sample",
    metadata,
    Column("job_id", _Id, ForeignKey("job.id"), primary_key=True, autoincrement=False),
    Column("at_us", BigInteger, primary_key=True, autoincrement=False),
    Column("run_id", _Id, nullable=False),
    Column("cpu_percent", Float, nullable=False),
    Column("rss_bytes", BigInteger, nullable=False),
    Column("threads", Integer, nullable=False),
    Column("fds", Integer, nullable=False),
    sqlite_with_rowid=False,
)

outbox = Table(  # a notice goes when it was delivered, and what it tells of is over
    "outbox",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=False),
    Column("receiver", String, nullable=False),
    Column("job", String, nullable=False),
    Column("run_id", _Id),
    Column("at_us", BigInteger, nullable=False),
    Column("kind", String, nullable=False),
    Column("waiting", Boolean, nullable=False),
    Column("lasting", Boolean, nullable=False),
    Column("body", Text, nullable=False),
)

_ISO = {
    "sqlite": "strftime('%Y-%m-%dT%H:%M:%S', {0} / 1000000, 'unixepoch') || printf('.%06dZ', {0} % 1000000)",
    "postgresql": "to_char(timestamp 'epoch' + {0} * interval '1 microsecond', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
}


def views(dialect: str) -> dict[str, str]:
    """Return the SELECT of each view. Times in them are ISO 8601 in UTC, with microseconds."""

    def iso(column: str) -> str:
        return _ISO[dialect].format(column)

    return {
        "status_history": f"SELECT {iso('s.at_us')} AS at, job.name AS job, s.run_id AS run, s.seq AS seq, "
        "s.status AS status FROM status AS s JOIN job ON job.id = s.job_id",
        "job_events": f"SELECT {iso('e.at_us')} AS at, e.id AS id, job.name AS job, e.run_id AS run, "
        "e.kind AS kind, e.actor AS actor, e.data AS data FROM event AS e LEFT JOIN job ON job.id = e.job_id",
        "run_summary": f"SELECT r.id AS run, job.name AS job, r.pid AS pid, {iso('r.started_us')} AS started, "
        f"{iso('r.ended_us')} AS ended, r.wall_s AS wall_s, r.exit_code AS exit_code, r.signal AS signal, "
        "r.reason AS reason, r.cpu_s AS cpu_s, r.peak_rss_bytes AS peak_rss_bytes "
        "FROM run AS r JOIN job ON job.id = r.job_id",
    }


def create_all(connection: Connection) -> None:
    """Make everything in an empty database, at once and without Alembic, whose import takes longer than this."""
    # Said here for this dialect alone, since SQLAlchemy loads each dialect that an index has an option for.
    _unread.dialect_kwargs[f"{connection.dialect.name}_where"] = text("NOT journal_done")
    metadata.create_all(connection)
    for name, select in views(connection.dialect.name).items():
        connection.exec_driver_sql(f"CREATE VIEW {name} AS {select}")
    connection.exec_driver_sql(_VERSION_TABLE)
    connection.exec_driver_sql(f"INSERT INTO alembic_version VALUES ('{HEAD}')")


_VERSION_TABLE = (
    "CREATE TABLE alembic_version "
    "(version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
)
