"""A private PostgreSQL with wal2json, set up for logical decoding; `process` runs it."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import psycopg
from psycopg import sql

from devstack.process import DevStackError, Service
from devstack.watchdog import Watchdog

DATABASE = "engagement"
ROLE = "app"
PASSWORD = "app"  # noqa: S105  a private server on the loopback interface, the same as the compose file's
ACCOUNT = "postgres"  # PostgreSQL refuses to run as root
ALLOWED_PLUGINS = "output_plugin_libraries"
SETTINGS = {
    "wal_level": "logical",
    "max_replication_slots": "20",
    "max_wal_senders": "20",
    "fsync": "off",  # a throw-away cluster: crashes of the machine are not tested
    "full_page_writes": "off",
    "shared_buffers": "128MB",
    "max_wal_size": "4GB",  # no checkpoint during a benchmark
    "log_line_prefix": "%m [%p] ",
}


def find_bin_dir() -> Path:
    """Directory of the newest PostgreSQL with wal2json, or the one that DEVSTACK_POSTGRES names.

    Raises an error with the Debian package if there is none.
    """
    if chosen := os.environ.get("DEVSTACK_POSTGRES"):
        return Path(chosen)
    found = list(_bin_dirs())
    if not found:
        raise DevStackError("PostgreSQL is missing: apt-get install postgresql")
    for bin_dir in found:
        if (_library_dir(bin_dir) / "wal2json.so").exists():
            return bin_dir
    major = _major(found[0]) or "NN"
    raise DevStackError(f"wal2json is missing for {found[0]}: apt-get install postgresql-{major}-wal2json")


def _bin_dirs() -> Iterator[Path]:
    installed = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    yield from sorted((program.parent for program in installed), key=_major, reverse=True)
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent


def _major(bin_dir: Path) -> int:
    digits = re.match(r"\d+", bin_dir.parent.name)
    return int(digits[0]) if digits else 0


def _library_dir(bin_dir: Path) -> Path:
    pg_config = bin_dir / "pg_config"
    if not pg_config.exists():
        return bin_dir.parent / "lib"  # Debian's layout
    return Path(subprocess.check_output([pg_config, "--pkglibdir"], text=True).strip())


class Postgres(Service):
    """PostgreSQL with database `engagement`, owned by the superuser `app`, which needs its password."""

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": clients are cut off
    crash_signal = signal.SIGQUIT  # "immediate": no checkpoint, recovery at the next start, no shared memory left

    def __init__(self, folder: Path, watchdog: Watchdog, settings: Mapping[str, str]) -> None:
        super().__init__(folder, watchdog)
        self.bin_dir = find_bin_dir()
        self.settings = {**SETTINGS, **settings}
        """Read at every start. ALTER SYSTEM overrides them."""
        self._data = self.folder / "data"
        if os.geteuid() == 0:
            self._run_as(ACCOUNT)

    @property
    def dsn(self) -> str:
        """For the superuser `app`, database `engagement`."""
        return self.dsn_for()

    @property
    def superuser_dsn(self) -> str:
        """For the same role and database `postgres`, from which others are created and dropped."""
        return self.dsn_for(database="postgres")

    def dsn_for(self, *, database: str = DATABASE, user: str = ROLE, password: str = PASSWORD) -> str:
        """For another database, role or password."""
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def command(self) -> list[str]:
        """Start the server; before the first start, make its cluster."""
        if not self._data.exists():
            self._create_cluster()
        self._write_settings()
        return [str(self.bin_dir / "postgres"), "-D", str(self._data)]

    def environment(self) -> dict[str, str]:
        """Its address."""
        return {"REPLICATOR_POSTGRES_DSN": self.dsn}

    def answers(self) -> bool:
        """Whether a client can log in. Makes the database the first time."""
        try:
            with psycopg.connect(self.superuser_dsn, autocommit=True, connect_timeout=5) as connection:
                self._create_database(connection)
        except psycopg.OperationalError:
            return False
        return True

    def _run_as(self, account: str) -> None:
        try:
            pwd.getpwnam(account)
        except KeyError:
            raise DevStackError(
                f"PostgreSQL won't run as root and there is no user {account}: adduser --system {account}"
            ) from None
        self.user = account
        shutil.chown(self.folder, account)

    def _create_cluster(self) -> None:
        password_file = self.folder / "password"
        password_file.write_text(PASSWORD, encoding="utf-8")
        initdb = [str(self.bin_dir / "initdb"), "-D", str(self._data), "--no-sync", "--encoding=UTF8", "--locale=C"]
        self.run([*initdb, f"--username={ROLE}", f"--pwfile={password_file}", "--auth=scram-sha-256"])
        with (self._data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write("include 'devstack.conf'\n")

    def _write_settings(self) -> None:
        where = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
        }
        settings = {**self._plugin_settings(), **self.settings, **where}
        lines = [f"{name} = '{value}'\n" for name, value in settings.items()]
        (self._data / "devstack.conf").write_text("".join(lines), encoding="utf-8")

    def _plugin_settings(self) -> dict[str, str]:
        """Allow wal2json by name if the server requires that (releases since August 2026, CVE-2026-6471).

        An older server would not start with the unknown setting.
        """
        known = subprocess.check_output([self.bin_dir / "postgres", "--describe-config"], text=True)
        return {ALLOWED_PLUGINS: "pgoutput, test_decoding, wal2json"} if f"{ALLOWED_PLUGINS}\t" in known else {}

    @staticmethod
    def _create_database(connection: psycopg.Connection) -> None:
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone() is None:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
