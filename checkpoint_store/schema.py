"""The tables and their versions. `store` reads and writes them, `database` knows how to reach them.

Every name starts with `replicator_`: the URL may be that of a database shared with others.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Dialect,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    func,
    inspect,
    select,
)

from replicator.contracts.errors import CheckpointUnusable, command
from replicator.contracts.events import parse_lsn

VERSION = 4

MAX_PAYLOAD_BYTES = 2**30  # makes MySQL choose LONGBLOB, since its plain BLOB ends at 64 kB; others ignore it
MAX_NAME_CHARACTERS = 63  # of a slot, as in PostgreSQL, and of a sink; MySQL wants a bound for what is in a key
MAX_LETTER_KEY_CHARACTERS = 160  # an origin, a sink and a position, or a number
MAX_TASK_CHARACTERS = 255  # two points in time and the names of the sinks; likewise
CREATE_LOCK_KEY = 0x7265706C  # "repl": of an advisory lock, any number that others are unlikely to take


class LsnText(TypeDecorator[int]):
    """An LSN as `00000016/B374D848`: PostgreSQL's own form, filled with zeros so that text order is LSN order.

    Integer columns end at 2^63 in every database; this holds all 64 bits, and people can read it.
    """

    impl = String(17)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:  # noqa: ARG002  SQLAlchemy's signature
        """64-bit offset → text."""
        return None if value is None else f"{value >> 32:08X}/{value & 0xFFFFFFFF:08X}"

    def process_result_value(self, value: str | None, dialect: Dialect) -> int | None:  # noqa: ARG002  SQLAlchemy's signature
        """Text → 64-bit offset."""
        return None if value is None else parse_lsn(value)


metadata = MetaData()

schema_version = Table(
    "replicator_schema",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
)

checkpoints = Table(
    "replicator_checkpoints",
    metadata,
    Column("slot", String(MAX_NAME_CHARACTERS), primary_key=True),
    Column("system_identifier", String(20), nullable=False),
    Column("timeline", BigInteger, nullable=False),
    Column("end_lsn", LsnText, nullable=False),
    Column("updated_at", Double, nullable=False),  # Unix seconds
    Column("committed_at", Double, nullable=False),  # likewise, by PostgreSQL's clock
)

sink_positions = Table(
    "replicator_sink_positions",
    metadata,
    Column("slot", ForeignKey(checkpoints.c.slot), primary_key=True),
    Column("sink", String(MAX_NAME_CHARACTERS), primary_key=True),
    Column("commit_lsn", LsnText, nullable=False),
    Column("ordinal", BigInteger, nullable=False),
    Column("end_lsn", LsnText, nullable=False),
)

dead_letters = Table(
    "replicator_dead_letters",
    metadata,
    # SQLite numbers rows only in an INTEGER key, and with AUTOINCREMENT never gives a dropped row's number again.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("slot", String(MAX_NAME_CHARACTERS), nullable=False),  # no foreign key: one may come before any checkpoint
    Column("letter_key", String(MAX_LETTER_KEY_CHARACTERS), nullable=False),  # what makes two letters the same
    Column("origin", String(10), nullable=False),
    Column("sink", String(MAX_NAME_CHARACTERS)),  # NULL: no event could be made of the row
    Column("commit_lsn", LsnText),  # NULL, like ordinal: it has no position
    Column("ordinal", BigInteger),
    Column("event_id", BigInteger),
    Column("reason", Text, nullable=False),
    Column("payload", LargeBinary(MAX_PAYLOAD_BYTES), nullable=False),
    Column("created_at", Double, nullable=False),  # Unix seconds
    # One text, since NULLs in a unique key count as different everywhere.
    UniqueConstraint("slot", "letter_key", name="replicator_dead_letters_key"),
    sqlite_autoincrement=True,
)

tasks = Table(
    "replicator_tasks",
    metadata,
    Column("slot", String(MAX_NAME_CHARACTERS), primary_key=True),
    Column("task", String(MAX_TASK_CHARACTERS), primary_key=True),
    Column("progress", Text, nullable=False),
    Column("updated_at", Double, nullable=False),  # Unix seconds
)


def create(connection: Connection) -> list[str]:
    """Make the tables inside the caller's transaction; a line for each thing done."""
    _take_turns(connection)
    found = _stored_version(connection)
    if found is None:
        metadata.create_all(connection)
        connection.execute(schema_version.insert().values(version=VERSION))
        return [f"made the checkpoint tables ({', '.join(sorted(metadata.tables))}), schema version {VERSION}"]
    _refuse_other(found)
    return []


def require(connection: Connection) -> None:
    """Raise CheckpointUnusable unless the tables are there, in this program's version."""
    found = _stored_version(connection)
    if found is None:
        raise CheckpointUnusable(problem="it has no checkpoint tables yet", cure=f"Run {command('init')}")
    _refuse_other(found)


def _take_turns(connection: Connection) -> None:
    # Replicators that start together find no table together; SQLite's write lock keeps them apart by itself.
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(CREATE_LOCK_KEY)))


def _stored_version(connection: Connection) -> int | None:
    if not inspect(connection).has_table(schema_version.name):
        return None
    return connection.execute(select(schema_version.c.version)).scalar()


def _refuse_other(found: int) -> None:
    if found != VERSION:
        problem = f"its tables have schema version {found}, this program needs {VERSION}"
        cure = "Run the release that made them, or name another database in REPLICATOR_CHECKPOINT_URL"
        raise CheckpointUnusable(problem=problem, cure=cure)
