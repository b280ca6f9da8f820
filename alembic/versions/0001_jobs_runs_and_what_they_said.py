"""jobs, runs and what they said"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0001"
down_revision = None

_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")

_ISO = {
    "sqlite": "strftime('%Y-%m-%dT%H:%M:%S', {0} / 1000000, 'unixepoch') || printf('.%06dZ', {0} % 1000000)",
    "postgresql": "to_char(timestamp 'epoch' + {0} * interval '1 microsecond', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
}


def upgrade() -> None:
    _job_and_run()
    _status()
    _event()
    _sample()
    _views()


def downgrade() -> None:
    for view in ("run_summary", "job_events", "status_history"):
        op.execute(f"DROP VIEW {view}")
    for table in ("sample", "event", "status", "run", "job"):
        op.drop_table(table)


def _job_and_run() -> None:
    op.create_table(
        "job",
        sa.Column("id", _Id, nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("want", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.Column("overrides", sa.Text(), nullable=False),
        sa.Column("restarts", sa.Integer(), nullable=False),
        sa.Column("ever_up", sa.Boolean(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("removed_us", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_job"),
        sa.UniqueConstraint("name", name="uq_job_name"),
    )
    op.create_table(
        "run",
        sa.Column("id", _Id, autoincrement=False, nullable=False),
        sa.Column("job_id", _Id, nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("start_ticks", sa.BigInteger(), nullable=False),
        sa.Column("mark", sa.BigInteger(), nullable=False),
        sa.Column("spec_digest", sa.String(), nullable=False),
        sa.Column("started_us", sa.BigInteger(), nullable=False),
        sa.Column("ended_us", sa.BigInteger()),
        sa.Column("exit_code", sa.Integer()),
        sa.Column("signal", sa.Integer()),
        sa.Column("reason", sa.String()),
        sa.Column("cpu_s", sa.Float()),
        sa.Column("peak_rss_bytes", sa.BigInteger()),
        sa.Column("wall_s", sa.Float()),
        sa.Column("mono_s", sa.Float()),
        sa.Column("journal", sa.Text(), nullable=False),
        sa.Column("journal_offset", sa.BigInteger(), nullable=False),
        sa.Column("journal_lines", sa.BigInteger(), nullable=False),
        sa.Column("journal_done", sa.Boolean(), nullable=False),
        sa.Column("status_rows", sa.BigInteger(), nullable=False),
        sa.Column("thinned", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_run"),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_run_job_id"),
    )
    op.create_index("ix_run_job_id_id", "run", ["job_id", "id"])
    op.create_index("ix_run_job_id_started_us", "run", ["job_id", "started_us"])
    unread = sa.text("NOT journal_done")
    op.create_index("ix_run_unread", "run", ["id"], sqlite_where=unread, postgresql_where=unread)


def _status() -> None:
    op.create_table(
        "status",
        sa.Column("id", _Id, nullable=False),
        sa.Column("job_id", _Id, nullable=False),
        sa.Column("run_id", _Id, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_status"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_status_run_id"),
    )
    op.create_index("ix_status_run_id_seq", "status", ["run_id", "seq"], unique=True)
    op.create_index("ix_status_job_id_at_us", "status", ["job_id", "at_us"])


def _event() -> None:
    op.create_table(
        "event",
        sa.Column("id", _Id, autoincrement=False, nullable=False),
        sa.Column("job_id", _Id),
        sa.Column("run_id", _Id),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("actor", sa.String()),
        sa.Column("data", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_event"),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_event_job_id"),
    )
    op.create_index("ix_event_job_id_at_us", "event", ["job_id", "at_us"])
    op.create_index("ix_event_job_id_kind_at_us", "event", ["job_id", "kind", "at_us"])
    op.create_index("ix_event_at_us", "event", ["at_us"])
    op.create_index("ix_event_kind_at_us", "event", ["kind", "at_us"])
    op.create_index("ix_event_run_id_at_us", "event", ["run_id", "at_us"])


def _sample() -> None:
    op.create_table(
        "sample",
        sa.Column("job_id", _Id, autoincrement=False, nullable=False),
        sa.Column("at_us", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("run_id", _Id, nullable=False),
        sa.Column("cpu_percent", sa.Float(), nullable=False),
        sa.Column("rss_bytes", sa.BigInteger(), nullable=False),
        sa.Column("threads", sa.Integer(), nullable=False),
        sa.Column("fds", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "at_us", name="pk_sample"),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_sample_job_id"),
        sqlite_with_rowid=False,
    )


def _views() -> None:
    def iso(column: str) -> str:
        return _ISO[op.get_context().dialect.name].format(column)

    views = {
        "status_history": f"SELECT {iso('s.at_us')} AS at, job.name AS job, s.run_id AS run, s.seq AS seq, "
        "s.status AS status FROM status AS s JOIN job ON job.id = s.job_id",
        "job_events": f"SELECT {iso('e.at_us')} AS at, e.id AS id, job.name AS job, e.run_id AS run, "
        "e.kind AS kind, e.actor AS actor, e.data AS data FROM event AS e LEFT JOIN job ON job.id = e.job_id",
        "run_summary": f"SELECT r.id AS run, job.name AS job, r.pid AS pid, {iso('r.started_us')} AS started, "
        f"{iso('r.ended_us')} AS ended, r.wall_s AS wall_s, r.exit_code AS exit_code, r.signal AS signal, "
        "r.reason AS reason, r.cpu_s AS cpu_s, r.peak_rss_bytes AS peak_rss_bytes "
        "FROM run AS r JOIN job ON job.id = r.job_id",
    }
    for name, select in views.items():
        op.get_bind().exec_driver_sql(f"CREATE VIEW {name} AS {select}")
