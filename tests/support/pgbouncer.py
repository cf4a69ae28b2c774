"""PgBouncer in front of a stack's PostgreSQL, for tests of what a pooler does to sessions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from devstack import DevStack
from devstack.process import Service, find_program
from devstack.watchdog import Watchdog


@contextmanager
def pgbouncer(stack: DevStack, pool_mode: str = "transaction", **users: str) -> Iterator[PgBouncer]:
    """One that runs, and lets these `users` in with their passwords, beside the superuser."""
    folder = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
    folder.chmod(0o755)  # its account is another one
    watchdog = Watchdog(folder)
    pooler = PgBouncer(folder, watchdog, stack, pool_mode, users)
    try:
        pooler.start()
        yield pooler
    finally:
        pooler.kill()
        watchdog.close()


class PgBouncer(Service):
    """One server connection for everybody, as `pool_mode` says."""

    name = "pgbouncer"

    def __init__(
        self, folder: Path, watchdog: Watchdog, stack: DevStack, pool_mode: str, users: Mapping[str, str]
    ) -> None:
        super().__init__(folder, watchdog)
        self._program = find_program("pgbouncer", "pgbouncer")
        self._behind = stack.postgres
        self._pool_mode = pool_mode
        self._users = users
        self.user = self._behind.user  # it does not run as root

    @property
    def dsn(self) -> str:
        """Database `engagement` through it."""
        return self.dsn_for(self._behind.dsn)

    def dsn_for(self, dsn: str) -> str:
        """The same database, through it."""
        return dsn.replace(f":{self._behind.port}/", f":{self.port}/")

    def command(self) -> list[str]:
        """Write its settings; the program with them."""
        login = urlsplit(self._behind.dsn)
        users = {**self._users, str(login.username): str(login.password)}
        lines = "".join(f'"{user}" "{password}"\n' for user, password in users.items())
        (self.folder / "users.txt").write_text(lines, encoding="utf-8")
        (self.folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={self._behind.port}\n"
            f"[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={self.port}\nunix_socket_dir=\n"
            f"auth_type=plain\nauth_file={self.folder}/users.txt\npool_mode={self._pool_mode}\n"
            "default_pool_size=1\nignore_startup_parameters=extra_float_digits,options\n",
            encoding="utf-8",
        )
        return [self._program, str(self.folder / "pgbouncer.ini")]

    def environment(self) -> dict[str, str]:
        """Whoever wants it says so."""
        return {}

    def answers(self) -> bool:
        """Whether it lets somebody in."""
        try:
            with psycopg.connect(self.dsn, autocommit=True, connect_timeout=5) as connection:
                return connection.execute("SELECT 1").fetchone() == (1,)
        except psycopg.OperationalError:
            return False
