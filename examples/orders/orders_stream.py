"""Orders, each joined with its customer as of the commit. REPLICATOR_STREAM=orders_stream:STREAM."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

from replicator import BIGINT, JSONB, TEXT, TIMESTAMPTZ, UUID, Derived, Dimension, Field, Role, Stream, numeric


def vat(total: Decimal, percent: Decimal) -> Decimal:
    """What of the total is value added tax, to the cent, half away from zero as PostgreSQL rounds."""
    return (total * percent / (100 + percent)).quantize(Decimal("0.01"), ROUND_HALF_UP)


STREAM = Stream(
    "orders",
    table="shop.orders",
    dimensions=(Dimension("shop.customers", key="customer_id"),),
    updates="upsert",
    deletes="delete",
    fields=(
        Field("order_id", UUID, role=Role.IDENTITY),
        Field("customer_id", BIGINT, role=Role.KEY),
        Field("ordered_at", TIMESTAMPTZ, role=Role.TIME),
        Field("status", TEXT.low_cardinality()),
        Field("total", numeric(12, 2)),
        Field("lines", JSONB),
        Field("note", TEXT.nullable()),
        Field("shipped_at", TIMESTAMPTZ.nullable()),
        Field("customer", TEXT.nullable(), joined="name"),
        Field("country", TEXT.nullable().low_cardinality(), joined="country"),
        Field("vat_percent", numeric(4, 2).nullable(), joined="vat_percent"),
        Field(
            "vat",
            numeric(12, 2).nullable(),
            derived=Derived(
                vat,
                of=("total", "vat_percent"),
                postgres="round({total} * {vat_percent} / (100 + {vat_percent}), 2)",
            ),
        ),
    ),
)
