"""What a declaration consists of. `stream.py` puts it together, `types.py` has the types of fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from enum import Enum, auto

from replicator.contracts.fields.types import Type


class Role(Enum):
    """What a field is to the event. Each role is one field's."""

    IDENTITY = auto()
    KEY = auto()
    TIME = auto()


@dataclass(frozen=True)
class Derived:
    """A field that is computed from others, and NULL when one of them is."""

    function: Callable[..., object]
    of: tuple[str, ...]
    """The fields that are its arguments; none of them is derived."""
    _: KW_ONLY
    shortcut: str = ""
    """Python source, `<expression> if <condition>`: the same for ordinary values, without a call. For the engagement
    stream alone: where there is one, nobody checks what the function returns."""
    postgres: str = ""
    """The same in SQL, with `{name}` for an argument; empty: `reconcile` does not compare the field."""


@dataclass(frozen=True)
class Dimension:
    """A table of which an event takes over columns: those of the row whose `key` is the event's field `on`."""

    table: str
    key: str
    _: KW_ONLY
    on: str = ""
    """Empty: the field has the key's name."""

    def __post_init__(self) -> None:
        if not self.on:
            object.__setattr__(self, "on", self.key)


@dataclass(frozen=True)
class Field:
    """One field of the event: a `column` of the table (its own name by default), of a `joined` one, or `derived`."""

    name: str
    type: Type
    _: KW_ONLY
    column: str = ""
    joined: str = ""
    of: Dimension | None = None
    """Which dimension the joined column is of; where there is one alone, it need not be said."""
    derived: Derived | None = None
    role: Role | None = None

    def __post_init__(self) -> None:
        if not (self.column or self.joined or self.derived):
            object.__setattr__(self, "column", self.name)


@dataclass(frozen=True)
class Where:
    """Only the rows whose field, a column of the table, has one of these values."""

    field: str
    values: tuple[str | int | bool, ...]
