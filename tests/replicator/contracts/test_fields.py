"""Declarations: what is wrong with one is said in a line, and numbers are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal

import pytest

from replicator import BIGINT, JSONB, TEXT, TIMESTAMPTZ, UUID, Derived, Dimension, Field, Role, Stream, Where, numeric
from replicator.contracts.fields import StreamUnusable

ORDER = Field("order_id", UUID, role=Role.IDENTITY)
CUSTOMER = Field("customer_id", BIGINT, role=Role.KEY)
AT = Field("ordered_at", TIMESTAMPTZ, role=Role.TIME)
GOOD = Stream("orders", "shop.orders", (ORDER, CUSTOMER, AT, Field("total", numeric(12, 2))))
CUSTOMERS = Dimension("shop.customers", key="customer_id")
PAYERS = replace(CUSTOMERS, on="payer_id")
PAYER = Field("payer_id", BIGINT)
NAME = Field("name", TEXT.nullable(), joined="name", of=CUSTOMERS)


def with_(*more: Field) -> Callable[[], Stream]:
    """The good one with other fields, too."""
    return lambda: replace(GOOD, fields=(*GOOD.fields, *more))


def joined(*dimensions: Dimension, more: tuple[Field, ...] = ()) -> Callable[[], Stream]:
    """The good one with these dimensions."""
    return lambda: replace(GOOD, fields=(*GOOD.fields, PAYER, *more), dimensions=dimensions)


WRONG: dict[str, Callable[[], Stream]] = {
    "'Orders' is no name; it takes up to 41": lambda: replace(GOOD, name="Orders"),
    "'orders' is no table; it takes schema.table": lambda: replace(GOOD, table="orders"),
    "2 fields have the name total": with_(Field("total", BIGINT)),
    "'from' is no field's name": with_(Field("from", BIGINT)),
    "no fields have the role KEY; exactly one has to": lambda: replace(GOOD, fields=(ORDER, AT)),
    "2 fields have the role KEY; exactly one has to": with_(Field("other", BIGINT, role=Role.KEY)),
    "the field order_id is jsonb; an identity and a key are BIGINT, UUID or TEXT": lambda: replace(
        GOOD, fields=(Field("order_id", JSONB, role=Role.IDENTITY), CUSTOMER, AT)
    ),
    "the field ordered_at is text; the time is a TIMESTAMPTZ": lambda: replace(
        GOOD, fields=(ORDER, CUSTOMER, Field("ordered_at", TEXT, role=Role.TIME))
    ),
    "the field customer_id has a role, so it has to be a column that is never NULL": lambda: replace(
        GOOD, fields=(ORDER, replace(CUSTOMER, type=BIGINT.nullable()), AT)
    ),
    "the field name is joined, and there is no dimension": with_(Field("name", TEXT.nullable(), joined="name")),
    "the field name is joined, so it has to be nullable": lambda: replace(
        GOOD, dimensions=(CUSTOMERS,), fields=(*GOOD.fields, Field("name", TEXT, joined="name"))
    ),
    "the field vat is derived from net, which is no column's field": with_(
        Field("vat", numeric(12, 2), derived=Derived(max, of=("net",)))
    ),
    "the field both has more than one source": with_(Field("both", BIGINT, column="a", joined="b")),
    "2 fields are the column total": with_(Field("again", BIGINT, column="total")),
    "shop.customers is joined on total, which is no column's field of type BIGINT or UUID (on=…)": lambda: replace(
        GOOD, dimensions=(Dimension("shop.customers", key="customer_id", on="total"),)
    ),
    "its condition is on total, which has to be a column's field: a text, an integer or a boolean": lambda: replace(
        GOOD, where=Where("total", (1,))
    ),
    "its condition on customer_id has values that are not a 64-bit integer, or none": lambda: replace(
        GOOD, where=Where("customer_id", ("one",))
    ),
    "2 of its tables have the name orders": joined(Dimension("crm.orders", key="customer_id")),
    "2 of its tables have the name customers": joined(CUSTOMERS, Dimension("crm.customers", key="customer_id")),
    "shop.orders can't be its own dimension": joined(Dimension("shop.orders", key="customer_id")),
    "it has 5 dimensions; 4 are the most": joined(*[CUSTOMERS] * 5),
    "shop.customers is joined on customer_id 2 times": joined(CUSTOMERS, replace(CUSTOMERS, key="id")),
    "the field name is joined, and does not say of which dimension (of=…)": joined(
        CUSTOMERS, PAYERS, more=(replace(NAME, of=None),)
    ),
    "the field name is of shop.customers, which is not among the dimensions": joined(PAYERS, more=(NAME,)),
    "the field total2 is of a dimension, and not joined": joined(
        CUSTOMERS, more=(Field("total2", BIGINT, of=CUSTOMERS),)
    ),
    "2 fields are the column name": joined(CUSTOMERS, PAYERS, more=(NAME, replace(NAME, name="again"))),
    "the column name of shop.customers has two types": joined(
        CUSTOMERS, PAYERS, more=(NAME, Field("payer", BIGINT.nullable(), joined="name", of=PAYERS))
    ),
}


def test_one_table_may_be_two_dimensions() -> None:
    """Joined on different fields; where there is one dimension alone, a field need not say of which it is."""
    two = joined(CUSTOMERS, PAYERS, more=(NAME, replace(NAME, name="payer", of=PAYERS)))()
    assert [CUSTOMERS, PAYERS] == [two.joins(field) for field in two.fields if field.joined]
    one = joined(PAYERS, more=(replace(NAME, of=None),))()
    assert [PAYERS] == [one.joins(field) for field in one.fields if field.joined]


@pytest.mark.parametrize("problem", WRONG)
def test_what_is_wrong_is_one_line(problem: str) -> None:
    """It names the stream and the field."""
    with pytest.raises(StreamUnusable) as caught:
        WRONG[problem]()
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (Decimal("9999999999.99"), True),
        (Decimal("-0.01"), True),
        (12, True),
        (0, True),
        (Decimal("10000000000.00"), False),
        (10**10, False),
        (Decimal("0.001"), False),
        (Decimal("NaN"), False),
        ("1", False),
        (None, False),
        (True, False),
    ],
)
def test_a_number_is_exact_or_refused(value: object, fits: bool) -> None:
    """ClickHouse cuts digits that a column does not have."""
    assert fits is numeric(12, 2).fits(value)


def test_types_are_values() -> None:
    """Two that say the same are the same, however often they are made: streams are compared."""
    assert numeric(12, 2).nullable() == numeric(12, 2).nullable() != numeric(12, 3).nullable()
    assert 1 == len({Field("total", numeric(12, 2)), Field("total", numeric(12, 2))})


def test_what_may_be_more_one_day_is_named() -> None:
    """Arguments beyond the first ones are given by name: a new one can stand anywhere."""
    for wrong in (
        lambda: Field("total", BIGINT, "sum"),  # type: ignore[call-arg]
        lambda: Dimension("shop.customers", "customer_id", "payer_id"),  # type: ignore[call-arg]
        lambda: Derived(max, ("total",), "total"),  # type: ignore[call-arg]
        lambda: Stream("orders", "shop.orders", GOOD.fields, (CUSTOMERS,)),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError, match="positional arguments"):
            wrong()


def test_nullable_and_low_cardinality_in_any_order() -> None:
    """ClickHouse takes one of them."""
    assert TEXT.nullable().low_cardinality().clickhouse == TEXT.low_cardinality().nullable().clickhouse
