"""The tables and their version. `store` reads and writes them, `database` knows how to reach them.

Every name starts with `replicator_`: the database may be shared with other programs.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Column, String

from replicator.contracts.errors import CheckpointAbsent, CheckpointUnusable, command
from replicator.contracts.events import parse_lsn

VERSION = 6
"""A program reads and writes the tables of its own version only; `create` brings older ones up to it."""
OLDEST = 4
"""The version that had no contents. Version 5 had no names of events."""

NAME = String(255)  # MySQL wants a bound for what is in a key, and two of these fit its 3,072 bytes
CREATE_LOCK_KEY = 0x7265706C  # of an advisory lock; "repl", which other programs are unlikely to use


class LsnText(sa.TypeDecorator[int]):
    """An LSN as `00000016/B374D848`: PostgreSQL's own form, filled with zeros so that text order is LSN order.

    Integer columns end at 2^63 in every database; this holds all 64 bits, and people can read it.
    """

    impl = String(17)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: sa.Dialect) -> str | None:  # noqa: ARG002  SQLAlchemy's signature
        return None if value is None else f"{value >> 32:08X}/{value & 0xFFFFFFFF:08X}"

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> int | None:  # noqa: ARG002  SQLAlchemy's signature
        return None if value is None else parse_lsn(value)


metadata = sa.MetaData()

schema_version = sa.Table(
    "replicator_schema", metadata, Column("version", sa.Integer, primary_key=True, autoincrement=False)
)

checkpoints = sa.Table(
    "replicator_checkpoints",
    metadata,
    Column("slot", NAME, primary_key=True),
    Column("system_identifier", String(20), nullable=False),
    Column("timeline", sa.BigInteger, nullable=False),
    Column("end_lsn", LsnText, nullable=False),
    Column("updated_at", sa.Double, nullable=False),  # Unix seconds
    Column("committed_at", sa.Double, nullable=False),  # likewise, by PostgreSQL's clock
    Column("contents", String(64)),  # what `contents` is a copy of; NULL: there is none to be used
)

sink_positions = sa.Table(
    "replicator_sink_positions",
    metadata,
    Column("slot", sa.ForeignKey(checkpoints.c.slot), primary_key=True),
    Column("sink", NAME, primary_key=True),
    Column("commit_lsn", LsnText, nullable=False),
    Column("ordinal", sa.BigInteger, nullable=False),
    Column("end_lsn", LsnText, nullable=False),
)

dead_letters = sa.Table(
    "replicator_dead_letters",
    metadata,
    # SQLite numbers rows only in an INTEGER key, and only with AUTOINCREMENT never gives a dropped row's number again.
    Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("slot", NAME, nullable=False),  # no foreign key: one may come before any checkpoint
    Column("letter_key", NAME, nullable=False),
    Column("origin", String(10), nullable=False),
    Column("sink", NAME),  # NULL: no event could be made of the row
    Column("commit_lsn", LsnText),  # NULL, like ordinal: it has no position
    Column("ordinal", sa.BigInteger),
    Column("event_id", sa.BigInteger),
    Column("event_name", sa.Text),  # the identity, where it is no number
    Column("reason", sa.Text, nullable=False),
    Column("payload", sa.LargeBinary(2**30), nullable=False),  # MySQL's plain BLOB ends at 64 kB
    Column("created_at", sa.Double, nullable=False),  # Unix seconds
    # What makes two letters the same is one text, since NULLs in a unique key count as different.
    sa.UniqueConstraint("slot", "letter_key", name="replicator_dead_letters_key"),
    sqlite_autoincrement=True,
)

tasks = sa.Table(
    "replicator_tasks",
    metadata,
    Column("slot", NAME, primary_key=True),
    Column("task", NAME, primary_key=True),
    Column("progress", sa.Text, nullable=False),
    Column("updated_at", sa.Double, nullable=False),  # Unix seconds
)


contents = sa.Table(
    "replicator_contents",
    metadata,
    Column("slot", NAME, primary_key=True),
    Column("content_id", sa.BigInteger, primary_key=True, autoincrement=False),
    Column("content", sa.Text, nullable=False),  # JSON
    sqlite_with_rowid=False,  # half the size
)


named_contents = sa.Table(
    "replicator_named_contents",
    metadata,
    Column("slot", NAME, primary_key=True),
    Column("content_id", String(36), primary_key=True),  # a uuid
    Column("content", sa.Text, nullable=False),  # JSON
    sqlite_with_rowid=False,
)


def create(connection: sa.Connection) -> list[str]:
    """Make the tables inside the caller's transaction; a line for each thing done."""
    if connection.dialect.name == "postgresql":  # replicators that start together; SQLite's write lock does this
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATE_LOCK_KEY)))
    if sa.inspect(connection).has_table(schema_version.name):
        if _is_older(_version(connection)):
            return [_upgrade(connection)]
        require(connection)
        return []
    metadata.create_all(connection)
    connection.execute(schema_version.insert().values(version=VERSION))
    return [f"made the checkpoint tables ({', '.join(sorted(metadata.tables))}), schema version {VERSION}"]


def _upgrade(connection: sa.Connection) -> str:
    """From an older version, which lacks columns."""
    for table, name, kind in ((checkpoints, "contents", "VARCHAR(64)"), (dead_letters, "event_name", "TEXT")):
        if all(column["name"] != name for column in sa.inspect(connection).get_columns(table.name)):
            connection.execute(sa.text(f"ALTER TABLE {table.name} ADD COLUMN {name} {kind}"))
    metadata.create_all(connection)
    connection.execute(schema_version.update().values(version=VERSION))
    return f"brought the checkpoint tables to schema version {VERSION}"


def _is_older(version: int | None) -> bool:
    return version is not None and OLDEST <= version < VERSION


def _version(connection: sa.Connection) -> int | None:
    version: int | None = connection.execute(sa.select(schema_version.c.version)).scalar()
    return version


def require(connection: sa.Connection) -> None:
    """Raise CheckpointUnusable unless the tables are there, in this program's version."""
    if not sa.inspect(connection).has_table(schema_version.name):
        raise CheckpointAbsent(problem="it has no checkpoint tables yet", cure=f"Run {command('init')}")
    found = _version(connection)
    if found != VERSION:
        problem = f"its tables have schema version {found}, this program needs {VERSION}"
        cure = "Run the release that made them, or name another database in REPLICATOR_CHECKPOINT_URL"
        if _is_older(found):
            cure = f"Run {command('init')}, or `run`: both bring them up to it"
        raise CheckpointUnusable(problem=problem, cure=cure)
