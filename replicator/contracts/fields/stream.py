"""How a stream is declared: a `Stream` names its table, and every field once, with its type.

What reads, encodes, stores and compares events is made from it. Ours is `enrichment/contract.py`; sinks are given it.
`problems.py` says what is wrong with one.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from replicator.contracts.fields.parts import Dimension, Field, Role, Where
from replicator.contracts.fields.problems import problems


class StreamUnusable(ValueError):
    """A declaration that can't be used. The text says what is wrong with it, in one line."""


@dataclass(frozen=True)
class Stream:
    """What an event is: a row of a table, with its fields in the order that every destination sees."""

    name: str
    """Its table in ClickHouse, and the beginning of its keys in Redis."""
    table: str
    """`schema.table`."""
    fields: tuple[Field, ...]
    _: KW_ONLY
    dimensions: tuple[Dimension, ...] = ()
    """At most four. A table may be two of them, joined on different fields."""
    updates: Literal["ignore", "upsert"] = "ignore"
    deletes: Literal["ignore", "delete"] = "ignore"
    """What an update and a delete of a row mean; ignored ones are counted."""
    where: Where | None = None
    """Which rows it takes; None: all."""
    clickhouse_table: str = ""
    """What its table in ClickHouse is called; empty: as the stream."""
    redis_name: str = ""
    """What its keys in Redis are called; empty: as the stream."""

    def __post_init__(self) -> None:
        if problem := next(problems(self), None):
            raise StreamUnusable(f"stream {self.name!r}: {problem}")

    @property
    def identity(self) -> Field:
        """What makes two events the same."""
        return self._with(Role.IDENTITY)

    @property
    def key(self) -> Field:
        """What the event is about."""
        return self._with(Role.KEY)

    @property
    def time(self) -> Field:
        """When it happened."""
        return self._with(Role.TIME)

    @property
    def follows(self) -> bool:
        """Whether rows that change are followed; else a row counts when it is inserted, and never again."""
        return self.updates == "upsert" or self.deletes == "delete"

    def joins(self, field: Field) -> Dimension | None:
        """The dimension of a joined field; None: it is not joined, or does not say of which."""
        alone = self.dimensions[0] if len(self.dimensions) == 1 else None
        return (field.of or alone) if field.joined else None

    def _with(self, role: Role) -> Field:
        return next(field for field in self.fields if field.role is role)

    def compared(self, *, with_joined: bool) -> tuple[Field, ...]:
        """What reconcile's checksum is made of: all fields, or those that do not change with the joined row."""
        joined = {field.name for field in self.fields if field.joined}
        of = {field.name: field.derived.of if field.derived else (field.name,) for field in self.fields}
        known = (field for field in self.fields if not field.derived or field.derived.postgres)
        return tuple(field for field in known if with_joined or joined.isdisjoint(of[field.name]))
