"""A streaming standby of the stack's PostgreSQL, as a host that can be promoted in its place."""

from __future__ import annotations

from pathlib import Path

import psycopg

from devstack.postgres import Postgres
from devstack.watchdog import Watchdog


class Standby(Postgres):
    """Copied from the primary when it starts for the first time. It has a physical slot of its name there."""

    name = "standby"

    def __init__(self, folder: Path, watchdog: Watchdog, primary: Postgres) -> None:
        super().__init__(folder, watchdog, primary.settings)
        self._primary = primary

    def answers(self) -> bool:
        """Whether a client can log in."""
        try:
            psycopg.connect(self.superuser_dsn, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _create_cluster(self) -> None:
        copy = [str(self.bin_dir / "pg_basebackup"), "-D", str(self._data), "--no-sync", "--checkpoint=fast"]
        self.run([*copy, "-R", "-C", "-S", self.name, "-d", self._primary.superuser_dsn])
