-- The tables of the example.

CREATE SCHEMA shop;

CREATE TYPE shop.status AS ENUM ('new', 'paid', 'shipped', 'cancelled');

CREATE TABLE shop.customers (
    customer_id bigint PRIMARY KEY,
    name text NOT NULL,
    country char(2),
    vat_percent numeric(4, 2)
);

CREATE TABLE shop.orders (
    order_id uuid NOT NULL DEFAULT gen_random_uuid(),
    customer_id bigint NOT NULL REFERENCES shop.customers,
    ordered_at timestamptz NOT NULL DEFAULT now(),
    status shop.status NOT NULL DEFAULT 'new',
    total numeric(12, 2) NOT NULL,
    lines jsonb NOT NULL,
    note text,
    shipped_at timestamptz,
    PRIMARY KEY (order_id, ordered_at)
) PARTITION BY RANGE (ordered_at);

CREATE TABLE shop.orders_2026_01 PARTITION OF shop.orders FOR VALUES FROM ('2026-01-01Z') TO ('2026-02-01Z');
CREATE TABLE shop.orders_2026_02 PARTITION OF shop.orders FOR VALUES FROM ('2026-02-01Z') TO ('2026-03-01Z');
CREATE TABLE shop.orders_later PARTITION OF shop.orders DEFAULT;
