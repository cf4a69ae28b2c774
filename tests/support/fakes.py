"""A slot and a checkpoint as values, for tests without a server. The fake sink is `sinks.testing.MemorySink`."""

from __future__ import annotations

from replicator.contracts.events import Checkpoint, Position, SinkPosition
from replicator.source.server import Identity
from replicator.source.slot import SlotState

HERE = Identity(system_identifier="7", timeline=1)
STATE = SlotState(
    plugin="wal2json",
    database="engagement",
    own_database="engagement",
    active_pid=None,
    restart_lsn=50,
    confirmed_lsn=100,
    wal_status="reserved",
    safe_wal_size=None,
    two_phase=False,
    server_time=0.0,
    server_lsn=1000,
    server_version="16.4",
)
AT_200 = SinkPosition(position=Position(190, 3), end_lsn=200)
CHECKPOINT = Checkpoint(slot="s", system_identifier="7", timeline=1, end_lsn=200, sinks={"redis": AT_200})
