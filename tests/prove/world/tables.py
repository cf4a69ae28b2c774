"""DDL on the two tables while events arrive: what people who run PostgreSQL do to them, and do again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import psycopg

from tests.prove.world.world import FAULTS, Victim, World, fault
from tests.prove.world.writers import write
from tests.support.environment import ROLE

EVENTS = "public.engagement_events"
LOOK_SECONDS = 1.0
"""Between the steps of a change: shorter than the program's own interval, or longer, by chance."""
COLUMNS = "id, content_id, user_id, event_type, event_ts, duration_ms, device, raw_payload"

BARE = """INSERT INTO engagement_events (content_id, user_id, event_type)
SELECT 1, n, '{kind}' FROM generate_series(1, 20) AS n"""
_WITHOUT_KEY = """DO $$ DECLARE key name; BEGIN
    SELECT conname INTO key FROM pg_constraint WHERE conrelid = '{table}'::regclass AND contype = 'p';
    IF FOUND THEN EXECUTE format('ALTER TABLE {table} DROP CONSTRAINT %I', key); END IF;
END $$"""
"""Its name depends on what happened before."""
SWAP_FOR_PARTITIONED = (
    "LOCK TABLE engagement_events",
    "ALTER TABLE engagement_events RENAME TO engagement_events_old",
    _WITHOUT_KEY.format(table="engagement_events_old"),
    """CREATE TABLE engagement_events (LIKE engagement_events_old INCLUDING DEFAULTS, PRIMARY KEY (id, event_type))
       PARTITION BY LIST (event_type)""",
    "ALTER TABLE engagement_events ATTACH PARTITION engagement_events_old DEFAULT",
    f"GRANT SELECT ON engagement_events TO {ROLE}",
)


def _insert(world: World, chance: random.Random, table: str, kind: str, rows: int = 50) -> None:
    """Events that the application writes into exactly this table."""
    with world.postgres_is_ours, psycopg.connect(world.dsn) as connection:
        write(connection, table, chance, rows, kind)


def _partition(world: World, chance: random.Random) -> tuple[str, str]:
    """A name that needs quotes, or a plain one, and the kind of event that belongs there."""
    world.partitions += 1
    name = chance.choice((f"p{world.partitions}", f'"P, {world.partitions}.a b"', f'"p{world.partitions}""q"'))
    return name, f"kind-{world.partitions}"


def _make_partitioned(world: World) -> bool:
    """Swap the table for a partitioned one, unless it is one; False where it has children by inheritance."""
    if not world.partitioned and not world.has_children:
        world.alter(*SWAP_FOR_PARTITIONED)
        world.partitioned = True
    return world.partitioned


Step: TypeAlias = Callable[[World, random.Random], object]


def _play(victim: Victim, name: str, begin: Sequence[Step], end: Sequence[Step] = ()) -> None:
    """Register a fault that takes the same steps every time."""

    @fault(victim, name)
    def script(world: World, chance: random.Random) -> Iterator[None]:
        for step in begin:
            step(world, chance)
        yield
        for step in end:
            step(world, chance)


def _alter(*statements: str) -> Step:
    return lambda world, _: world.alter(*statements)


def _change(*statements: str, grant: bool = True) -> Step:
    """Of content."""
    return lambda world, _: world.change_content(*statements, grant=grant)


def _some(world: World, chance: random.Random) -> None:
    """Events that the application writes into the table at its place by contract."""
    _insert(world, chance, EVENTS, "some")


# -- engagement_events ---------------------------------------------------------------------------------------------


@fault("events")
def swapped_for_a_partitioned_one(world: World, chance: random.Random) -> Iterator[None]:
    """At three in the morning, by the book: rename, create, attach."""
    if not _make_partitioned(world):
        _some(world, chance)
    yield


@fault("events")
def a_partition_is_made(world: World, chance: random.Random) -> Iterator[None]:
    """And written to at once, in the same transaction or in the next."""
    if not _make_partitioned(world):
        yield
        return
    name, kind = _partition(world, chance)
    made = f"CREATE TABLE {name} PARTITION OF engagement_events FOR VALUES IN ('{kind}')"
    if chance.random() < 0.5:
        world.alter(made, BARE.format(kind=kind))
    else:
        world.alter(made)
    _insert(world, chance, EVENTS, kind)
    yield
    _insert(world, chance, EVENTS, kind)


@fault("events")
def a_filled_table_is_attached(world: World, chance: random.Random) -> Iterator[None]:
    """Its rows were committed before they were events."""
    if not _make_partitioned(world):
        yield
        return
    name, kind = _partition(world, chance)
    world.alter(f"CREATE TABLE {name} (LIKE engagement_events INCLUDING DEFAULTS)")
    if chance.random() < 0.8:
        _insert(world, chance, name, kind, rows=chance.choice((3, 500)))
    world.wait(chance.uniform(0, 2 * LOOK_SECONDS))
    world.alter(f"ALTER TABLE engagement_events ATTACH PARTITION {name} FOR VALUES IN ('{kind}')")
    _insert(world, chance, EVENTS, kind)
    yield
    _insert(world, chance, EVENTS, kind)


@fault("events")
def a_partition_is_detached_and_attached_again(world: World, chance: random.Random) -> Iterator[None]:
    """Meanwhile somebody writes into it."""
    if not _make_partitioned(world):
        yield
        return
    name, kind = _partition(world, chance)
    world.alter(f"CREATE TABLE {name} PARTITION OF engagement_events FOR VALUES IN ('{kind}')")
    _insert(world, chance, EVENTS, kind)
    world.wait(chance.choice((0.0, chance.uniform(0, 8))))
    world.alter(f"ALTER TABLE engagement_events DETACH PARTITION {name}")
    yield
    if chance.random() < 0.5:
        _insert(world, chance, name, kind)
    world.alter(f"ALTER TABLE engagement_events ATTACH PARTITION {name} FOR VALUES IN ('{kind}')")
    _insert(world, chance, EVENTS, kind)


@fault("events")
def a_child_by_inheritance(world: World, chance: random.Random) -> Iterator[None]:
    """As partitions were made before PostgreSQL 10, and as hypertables are."""
    if world.partitioned:
        _some(world, chance)
        yield
        return
    world.has_children = True
    name, kind = _partition(world, chance)
    world.alter(f"CREATE TABLE {name} () INHERITS (engagement_events)")
    _insert(world, chance, name, kind)
    yield
    _insert(world, chance, name, kind)


@fault("events")
def a_filled_child_inherits(world: World, chance: random.Random) -> Iterator[None]:
    """A table with rows becomes a child, stops being one, and becomes one again."""
    if world.partitioned:
        _some(world, chance)
        yield
        return
    world.has_children = True
    name, kind = _partition(world, chance)
    world.alter(f"CREATE TABLE {name} (LIKE engagement_events INCLUDING DEFAULTS)")
    _insert(world, chance, name, kind)
    world.alter(f"ALTER TABLE {name} INHERIT engagement_events")
    _insert(world, chance, name, kind)
    yield
    world.alter(f"ALTER TABLE {name} NO INHERIT engagement_events")
    _insert(world, chance, name, kind)
    world.wait(chance.uniform(0, 2 * LOOK_SECONDS))
    world.alter(f"ALTER TABLE {name} INHERIT engagement_events")


def _away(name: str, there: tuple[str, ...], back: tuple[str, ...], table: str) -> None:
    """Register a fault that has the table somewhere else for a while; the application follows it, or meets nothing."""

    @fault("events", name)
    def script(world: World, chance: random.Random) -> Iterator[None]:
        world.alter(*there)
        if chance.random() < 0.6:
            world.place.table = table
        yield
        world.alter(*back)
        world.place.table = EVENTS


_away(
    "renamed and back",  # by mistake, or by a migration that is rolled back
    there=("ALTER TABLE engagement_events RENAME TO engagement_events_v2",),
    back=("ALTER TABLE engagement_events_v2 RENAME TO engagement_events",),
    table="public.engagement_events_v2",
)
_away(
    "a view takes its name",  # expand and contract: the application goes on through the view
    there=(
        "ALTER TABLE engagement_events RENAME TO engagement_events_v2",
        "CREATE VIEW engagement_events AS SELECT * FROM engagement_events_v2",
    ),
    back=("DROP VIEW engagement_events", "ALTER TABLE engagement_events_v2 RENAME TO engagement_events"),
    table=EVENTS,
)
_away(
    "moved to another schema and back",  # the application's search_path follows
    there=("CREATE SCHEMA IF NOT EXISTS tracking", "ALTER TABLE engagement_events SET SCHEMA tracking"),
    back=("ALTER TABLE tracking.engagement_events SET SCHEMA public",),
    table="tracking.engagement_events",
)


@fault("events")
def swapped_for_a_copy(world: World, chance: random.Random) -> Iterator[None]:
    """Blue and green: a copy takes its name, and the old one stays beside it."""
    if not world.partitioned and not world.has_children:
        world.partitions += 1
        world.alter(
            "LOCK TABLE engagement_events",
            "CREATE TABLE engagement_events_new (LIKE engagement_events INCLUDING ALL)",
            f"INSERT INTO engagement_events_new ({COLUMNS}) SELECT {COLUMNS} FROM engagement_events",
            f"ALTER TABLE engagement_events RENAME TO engagement_events_blue{world.partitions}",
            "ALTER TABLE engagement_events_new RENAME TO engagement_events",
            f"GRANT SELECT ON engagement_events TO {ROLE}",
        )
    _some(world, chance)
    yield


@fault("events")
def unlogged_and_back(world: World, chance: random.Random) -> Iterator[None]:
    """Rows that are written meanwhile are never in the WAL."""
    table = "engagement_events_old" if world.partitioned else "engagement_events"
    world.alter(f"ALTER TABLE {table} SET UNLOGGED")
    _some(world, chance)
    yield
    world.alter(f"ALTER TABLE {table} SET LOGGED")


@fault("events")
def a_needed_column_is_renamed_and_back(world: World, chance: random.Random) -> Iterator[None]:
    """The application follows at once, for it was deployed together with the change."""
    column = chance.choice(("device", "duration_ms"))
    world.alter(f"ALTER TABLE engagement_events RENAME {column} TO renamed")
    _bare(world)
    yield
    _bare(world)
    world.alter(f"ALTER TABLE engagement_events RENAME renamed TO {column}")


def _bare(world: World) -> None:
    """Events without what may be null."""
    world.alter(BARE.format(kind="bare"))


@fault("events")
def a_needed_column_is_retyped_and_back(world: World, chance: random.Random) -> Iterator[None]:
    """To one that fits, or to one that does not."""
    column, was = chance.choice((("duration_ms", "int"), ("user_id", "bigint"), ("content_id", "bigint")))
    other = chance.choice(("text", "numeric", "varchar(40)", "bigint"))
    world.alter(f"ALTER TABLE engagement_events ALTER {column} TYPE {other} USING {column}::{other}")
    _some(world, chance)
    yield
    world.alter(f"ALTER TABLE engagement_events ALTER {column} TYPE {was} USING {column}::{was}")


_play(
    "events",
    "a column is added and dropped",  # nobody needs it
    [_alter("ALTER TABLE engagement_events ADD COLUMN IF NOT EXISTS note text DEFAULT 'none'"), _some],
    [_alter("ALTER TABLE engagement_events DROP COLUMN note")],
)
_play(
    "events",
    "harmless changes",  # rights, an index, a trigger, statistics
    [
        _alter("GRANT SELECT ON engagement_events TO PUBLIC", "COMMENT ON TABLE engagement_events IS 'events'"),
        _alter("CREATE INDEX IF NOT EXISTS by_user ON engagement_events (user_id)"),
        _alter(
            "CREATE FUNCTION chaos.nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
            "CREATE TRIGGER nothing AFTER INSERT ON engagement_events FOR EACH ROW EXECUTE FUNCTION chaos.nothing()",
        ),
    ],
    [_alter("DROP FUNCTION chaos.nothing() CASCADE", "DROP INDEX by_user", "ANALYZE engagement_events")],
)
_play(
    "events",
    "rewritten",  # every row in another file, no row changed
    [_alter("ALTER TABLE engagement_events ADD COLUMN stamp timestamptz DEFAULT clock_timestamp()"), _some],
    [_alter("ALTER TABLE engagement_events DROP COLUMN stamp")],
)


# -- content -------------------------------------------------------------------------------------------------------

OF_CONTENT = "content_id, content_type, length_seconds"
LONGER = "UPDATE content SET length_seconds = coalesce(length_seconds, 0) + 60 WHERE content_id % 3 = 1"
"""A change that some contents see."""


@fault("content")
def updated(world: World, chance: random.Random) -> Iterator[None]:
    """What an application does: the control."""
    world.change_content(LONGER)
    yield
    world.change_content(f"DELETE FROM content WHERE content_id = {chance.randint(4, 40)}")


@fault("content")
def swapped_by_rename(world: World, chance: random.Random) -> Iterator[None]:
    """Blue and green, with other values."""
    if world.content_partitioned:
        world.change_content(LONGER)
        yield
        return
    world.partitions += 1
    world.change_content(
        "CREATE TABLE content_new (LIKE content INCLUDING ALL)",
        f"INSERT INTO content_new ({OF_CONTENT})"
        " SELECT content_id, content_type || '-v2', length_seconds * 2 FROM content",
        f"ALTER TABLE content RENAME TO content_blue{world.partitions}",
        "ALTER TABLE content_new RENAME TO content",
    )
    yield
    world.change_content(LONGER)


_play(
    "content",
    "its length is rewritten",  # a rewrite is not in the stream
    [_change("ALTER TABLE content ALTER length_seconds TYPE int USING length_seconds + 7")],
)
_play(
    "content",
    "its length is dropped and added",  # with a default, which is in no row
    [_change("ALTER TABLE content DROP length_seconds, ADD length_seconds int DEFAULT 600")],
    [_change(LONGER)],
)


@fault("content")
def made_again(world: World, chance: random.Random) -> Iterator[None]:
    """Dropped and created, empty at first."""
    world.change_content(
        "CREATE TABLE content_kept AS SELECT content_id, content_type, length_seconds FROM content",
        "DROP TABLE content CASCADE",
        "CREATE TABLE content (content_id bigint PRIMARY KEY, content_type text NOT NULL, length_seconds int)",
    )
    world.content_partitioned = False
    yield
    world.change_content(
        f"INSERT INTO content ({OF_CONTENT}) SELECT content_id, content_type, length_seconds + 1 FROM content_kept"
    )
    world.alter("DROP TABLE content_kept")


@fault("content")
def content_becomes_partitioned(world: World, chance: random.Random) -> Iterator[None]:
    """Its changes arrive under the partition's name."""
    if not world.content_partitioned:
        world.change_content(
            "ALTER TABLE content RENAME TO content_old",
            "CREATE TABLE content (LIKE content_old, PRIMARY KEY (content_id)) PARTITION BY HASH (content_id)",
            "CREATE TABLE content_0 PARTITION OF content FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
            "CREATE TABLE content_1 PARTITION OF content FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
            f"INSERT INTO content ({OF_CONTENT}) SELECT {OF_CONTENT} FROM content_old",
            "DROP TABLE content_old CASCADE",
        )
        world.content_partitioned = True
    yield
    world.change_content(LONGER)


@fault("content")
def without_identity_and_back(world: World, chance: random.Random) -> Iterator[None]:
    """Updates are left out of the stream."""
    tables = ("content_0", "content_1") if world.content_partitioned else ("content",)
    world.change_content(*(f"ALTER TABLE {table} REPLICA IDENTITY NOTHING" for table in tables))
    world.change_content(LONGER)
    yield
    world.change_content(LONGER)
    world.change_content(*(f"ALTER TABLE {table} REPLICA IDENTITY DEFAULT" for table in tables))


_play(
    "content",
    "its primary key is made again",  # with an update in between
    [_change(_WITHOUT_KEY.format(table="content")), _change(LONGER)],
    [_change(LONGER), _change("ALTER TABLE content ADD PRIMARY KEY (content_id)")],
)
_play(
    "content",
    "content renamed and back",  # events wait until it is back
    [_alter("ALTER TABLE content RENAME TO content_v2")],
    [_alter("ALTER TABLE content_v2 RENAME TO content")],
)
_play(
    "content",
    "content moved and back",
    [_alter("CREATE SCHEMA IF NOT EXISTS tracking", "ALTER TABLE content SET SCHEMA tracking")],
    [_alter("ALTER TABLE tracking.content SET SCHEMA public")],
)


@fault("content")
def content_unlogged_and_back(world: World, chance: random.Random) -> Iterator[None]:
    """What changes meanwhile is not in the WAL."""
    table = "content_0" if world.content_partitioned else "content"
    world.alter(f"ALTER TABLE {table} SET UNLOGGED")
    world.change_content(LONGER)
    yield
    world.change_content(LONGER)
    world.alter(f"ALTER TABLE {table} SET LOGGED")


@fault("content")
def a_needed_column_of_content_is_renamed_and_back(world: World, chance: random.Random) -> Iterator[None]:
    """Or retyped."""
    if chance.random() < 0.5:
        world.alter("ALTER TABLE content RENAME length_seconds TO seconds")
        yield
        world.alter("ALTER TABLE content RENAME seconds TO length_seconds")
    else:
        world.alter("ALTER TABLE content ALTER length_seconds TYPE text USING length_seconds::text")
        yield
        world.alter("ALTER TABLE content ALTER length_seconds TYPE int USING length_seconds::int")


_play(
    "content",
    "content is emptied and filled",  # TRUNCATE and a load, in one transaction
    [
        _change(
            "CREATE TABLE content_kept AS SELECT content_id, content_type, length_seconds FROM content",
            "TRUNCATE content",
            f"INSERT INTO content ({OF_CONTENT}) SELECT content_id, content_type, length_seconds + 3 FROM content_kept",
            "DROP TABLE content_kept",
        )
    ],
)
_play(
    "content",
    "harmless changes of content",  # a column that nobody needs, rights, statistics
    [_alter("ALTER TABLE content ADD COLUMN title text DEFAULT 'none'", "GRANT SELECT ON content TO PUBLIC")],
    [_alter("ALTER TABLE content DROP COLUMN title", "ANALYZE content")],
)
_play(
    "content",
    "the right to read content is taken and given",  # look-ups fail meanwhile
    [_alter(f"REVOKE SELECT ON content FROM {ROLE}, PUBLIC"), _change(LONGER, grant=False)],
    [_alter(f"GRANT SELECT ON content TO {ROLE}")],
)


PLAYS = sorted(one.name for one in FAULTS if one.victim in {"events", "content"})
"""What is played; docs/reference/tables.md says what the program does then."""
