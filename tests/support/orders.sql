-- Who wrote what in examples/orders, in commit order: from it PostgreSQL computes what every sink must have.
--
-- A transaction gets its number when it commits, alone: the lock is held until its commit is in the WAL. Two writers
-- otherwise go on beside each other. A statement's rows are noted in the order in which they are written.

ALTER TABLE shop.orders DROP CONSTRAINT orders_customer_id_fkey;  -- customers may go

CREATE SEQUENCE shop.seq;
CREATE TABLE shop.commits (number bigserial, xid xid8 PRIMARY KEY);
CREATE TABLE shop.log (
    seq bigint PRIMARY KEY DEFAULT nextval('shop.seq'),
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    order_id uuid,        -- NULL: of a customer
    customer_id bigint,
    deleted boolean NOT NULL,
    status text, total numeric, long boolean,
    name text, country text, vat_percent numeric
);
CREATE INDEX ON shop.log (order_id);

CREATE FUNCTION shop.number() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(4712);
    UPDATE shop.commits SET number = nextval('shop.commits_number_seq') WHERE xid = NEW.xid;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER number AFTER INSERT ON shop.commits DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION shop.number();
CREATE FUNCTION shop.begin() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO shop.commits (xid) VALUES (pg_current_xact_id()) ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;
CREATE TRIGGER begin AFTER INSERT ON shop.log FOR EACH STATEMENT EXECUTE FUNCTION shop.begin();

CREATE FUNCTION shop.log_order() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' OR (TG_OP = 'UPDATE' AND OLD.order_id <> NEW.order_id) THEN
        INSERT INTO shop.log (order_id, customer_id, deleted, long)
        VALUES (OLD.order_id, OLD.customer_id, true, length(OLD.lines::text) > 1000);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO shop.log (order_id, customer_id, deleted, status, total, long)
        VALUES (NEW.order_id, NEW.customer_id, false, NEW.status, NEW.total, length(NEW.lines::text) > 1000);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER log AFTER INSERT OR UPDATE OR DELETE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.log_order();

CREATE FUNCTION shop.log_customer() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        INSERT INTO shop.log (customer_id, deleted) SELECT customer_id, true FROM shop.customers;
    ELSIF TG_OP = 'DELETE' OR (TG_OP = 'UPDATE' AND OLD.customer_id <> NEW.customer_id) THEN
        INSERT INTO shop.log (customer_id, deleted) VALUES (OLD.customer_id, true);
    END IF;
    IF TG_OP IN ('INSERT', 'UPDATE') THEN
        INSERT INTO shop.log (customer_id, deleted, name, country, vat_percent)
        VALUES (NEW.customer_id, false, NEW.name, NEW.country, NEW.vat_percent);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER log AFTER INSERT OR UPDATE OR DELETE ON shop.customers
    FOR EACH ROW EXECUTE FUNCTION shop.log_customer();
CREATE TRIGGER truncated BEFORE TRUNCATE ON shop.customers FOR EACH STATEMENT EXECUTE FUNCTION shop.log_customer();

-- Every write of an order and of a customer (it has no order_id), with the customer as of that moment.
CREATE VIEW shop.history AS
WITH log AS (
    SELECT log.*, row_number() OVER (ORDER BY number, seq) AS at FROM shop.log JOIN shop.commits USING (xid)
), known AS (
    SELECT *, count(*) FILTER (WHERE order_id IS NULL) OVER (PARTITION BY customer_id ORDER BY at) AS change FROM log
)
SELECT at, order_id, customer_id, deleted, status, total, long, first_value(name) OVER same AS customer,
       first_value(country) OVER same AS country, first_value(vat_percent) OVER same AS vat_percent
FROM known WINDOW same AS (PARTITION BY customer_id, change ORDER BY at);
CREATE VIEW shop.writes AS SELECT * FROM shop.history WHERE order_id IS NOT NULL;

-- Every order that is there, as the sinks must have it.
CREATE VIEW shop.expected AS
SELECT order_id, o.customer_id,
       to_char(ordered_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS ordered_at,
       o.status, trim_scale(o.total) AS total, lines::text AS lines, note,
       to_char(shipped_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS shipped_at,
       w.customer, w.country, trim_scale(w.vat_percent) AS vat_percent,
       trim_scale(round(o.total * w.vat_percent / (100 + w.vat_percent), 2)) AS vat
FROM shop.orders o
JOIN (SELECT DISTINCT ON (order_id) * FROM shop.writes ORDER BY order_id, at DESC) w USING (order_id);

-- Each customer's orders as they were written: whether that was the order's last write, and whether it ever was long.
CREATE VIEW shop.lasts AS
SELECT customer_id, order_id, at, stays, long FROM (
    SELECT *, at = max(at) OVER of_order AS stays, bool_or(long) OVER of_order AS ever_long FROM shop.writes
    WINDOW of_order AS (PARTITION BY order_id)
) w (at, order_id, customer_id, deleted, status, total, was_long, customer, country, vat_percent, stays, long)
WHERE NOT deleted;
