"""From REPLICATOR_CHECKPOINT_URL to an engine whose commits are durable, and from drivers' errors to ours.

`store` says what is written, `schema` into which tables.
"""

from __future__ import annotations

import os
import re
import sqlite3
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from psycopg import pq
from sqlalchemy import Connection, Dialect, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, NoSuchModuleError, ProgrammingError, SAWarning
from sqlalchemy.pool import ConnectionPoolEntry

from replicator.contracts import errors
from replicator.contracts.errors import cited, command

URL_SETTING = "REPLICATOR_CHECKPOINT_URL"
URL_TAKES = (
    "any SQLAlchemy URL, its driver installed: sqlite:////var/lib/replicator/checkpoint.db,"
    " postgresql://user:password@host:5432/database, ..."
)

WAL_TRIES = 20  # each fails only because another program won; there are hardly ever two
LOCK_SECONDS = 5  # less than the feedback interval, more than a backup of SQLite's file holds it
LIMITS: dict[str, dict[str, Any]] = {
    "pysqlite": {"timeout": float(LOCK_SECONDS)},  # becomes busy_timeout
    # A server that has gone silent is an error after this time, not a thread that hangs.
    "psycopg": {"connect_timeout": "10", "tcp_user_timeout": "30000"},
}
"""Connection arguments by driver; those in the URL win."""
FORCED: dict[str, dict[str, Any]] = {
    "pysqlite": {"check_same_thread": False},  # calls come from any thread, one at a time
    "psycopg": {"prepare_threshold": None},  # a pooler's next transaction may be on another server connection
}
"""These win over the URL."""
FOR_EVER = re.compile("22...|3F000|42501|42703|42804|42P01")
"""SQLSTATEs that only an operator can end: the data do not fit, no schema, no right, no such column or table."""

TABLES_CURE = (
    f"Check that {URL_SETTING} names the right database, that its user may read and write the tables replicator_*,"
    f" and that they are as {command('init')} made them"
)

SQLITE_UNUSABLE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
"""Primary result codes of a file that only an operator can help."""


def open_engine(url: str, current: Callable[[], str]) -> Engine:
    """An engine with one connection, which is made on first use. Raises SettingsError for an unusable URL.

    Each connection is made with the password that is in the `current` URL.
    """
    parsed = _parse(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    engine = _engine(parsed, pre_ping=not sqlite)
    if engine.dialect.is_async:
        raise _unusable(f"{parsed.drivername} is an asynchronous driver")
    if sqlite:
        event.listen(engine, "connect", _set_pragmas)
        event.listen(engine, "begin", _begin)
    if engine.dialect.name == "postgresql":
        event.listen(engine, "begin", _begin_postgres)
    event.listen(engine, "do_connect", partial(_connect, current))
    return engine


def _engine(url: URL, *, pre_ping: bool) -> Engine:
    try:
        with warnings.catch_warnings(action="error", category=SAWarning):
            return create_engine(
                url,
                connect_args=_arguments(url),
                hide_parameters=True,  # payloads and reasons stay out of tracebacks
                max_overflow=0,
                pool_pre_ping=pre_ping,  # a server's restart costs a reconnect, not the program
                pool_size=1,  # calls come one at a time
            )
    # The originals could quote the URL.
    except ImportError as exc:
        raise _unusable(f"the driver {exc.name} is not installed") from None
    except (ArgumentError, NoSuchModuleError):
        raise _unusable(f"SQLAlchemy has no driver {url.drivername}") from None
    except SAWarning:
        raise _unusable("it has an option that the driver ignores") from None
    except (TypeError, ValueError):
        raise _unusable("the value of an option in it is of the wrong kind") from None


def _arguments(url: URL) -> dict[str, Any]:
    driver = url.get_driver_name()
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    if driver == "psycopg" and (unknown := sorted({*url.query} - known)):
        raise _unusable(f"libpq has no option {', '.join(unknown)}")
    limits = LIMITS.get(driver, {})
    return {name: value for name, value in limits.items() if name not in url.query} | FORCED.get(driver, {})


def _connect(
    current: Callable[[], str], dialect: Dialect, _record: object, arguments: list[Any], options: dict[str, Any]
) -> DBAPIConnection:
    _, now = dialect.create_connect_args(_parse(current()))
    try:
        return dialect.connect(*arguments, **options | {key: now[key] for key in _LOGIN & now.keys()})
    except (TypeError, ValueError) as exc:
        raise _unusable(f"the driver does not take its options ({type(exc).__name__})") from None


_LOGIN = {"user", "password"}
"""What may be rotated, by the names that drivers have for it."""


def require_file(url: URL) -> None:
    """Read-only commands never create the file: a relative path may be meant for another working directory."""
    path = Path(url.database or "")
    if url.get_backend_name() != "sqlite" or url.query.get("uri"):  # SQLite's own URIs are not looked into
        return
    if path.absolute().parent.is_dir() and not path.exists():
        problem = f"there is no file {path.absolute()}"
        cure = f"Run {command('init')}, or check that {URL_SETTING} is the path that `run` writes to"
        raise errors.CheckpointAbsent(problem=problem, cure=cure)


def files(url: URL) -> list[Path]:
    """SQLite's, whether they are there or not."""
    return [Path(f"{url.database}{end}") for end in ("", "-wal", "-shm")] if url.get_backend_name() == "sqlite" else []


def explain(exc: Exception, dialect: Dialect, url: URL) -> errors.CheckpointError:
    """Our error for a driver's: what happened, without the password and without values."""
    orig = exc.orig if isinstance(exc, DBAPIError) and exc.orig is not None else exc
    if isinstance(orig, sqlite3.Error):
        return _explain_sqlite(orig, Path(url.database or ""))
    diagnosis = getattr(orig, "diag", None)  # psycopg's: the server's message without the detail, which has values
    message = getattr(diagnosis, "message_primary", None) or str(orig)
    first_line = cited(message.partition("\n")[0], [str(url.password or "")])
    problem = f"{dialect.name}: {type(orig).__name__}: {first_line}"
    sqlstate = getattr(orig, "sqlstate", None)
    lasts = FOR_EVER.fullmatch(sqlstate) if sqlstate else isinstance(exc, (ProgrammingError, DataError))
    if lasts:
        return errors.CheckpointUnusable(problem=problem, cure=TABLES_CURE)
    return errors.CheckpointUnavailable(detail=problem)


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        raise _unusable("it can't be parsed") from None
    if parsed.get_backend_name() != "sqlite" and "@" in f"{parsed.host}{parsed.database}":
        # The password ended too early, and errors would name its rest as a host or database.
        raise _unusable("it has an @ too many; in user and password write it as %40, and / as %2F")
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")  # SQLAlchemy 2.0 would look for psycopg2
    in_memory = parsed.database in (None, "", ":memory:") or parsed.query.get("mode") == "memory"
    if parsed.get_backend_name() == "sqlite" and in_memory:
        raise _unusable("a database in memory forgets its checkpoints when the program ends")
    return parsed


def _unusable(problem: str) -> errors.SettingsError:
    return errors.SettingsError(name=URL_SETTING, problem=problem, expected=URL_TAKES)


def _set_pragmas(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # sqlite3 would begin transactions by itself, and too late; see _begin
    cursor = connection.cursor()
    _switch_to_wal(cursor)
    cursor.execute("PRAGMA synchronous = FULL")  # in WAL mode anything less loses commits in a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA secure_delete = ON")  # a dead letter that was dropped is gone from the file, too
    [(_, _, path)] = cursor.execute("PRAGMA database_list")
    cursor.close()
    record.info.update(path=path, file=_identity(path))


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _switch_to_wal(cursor: DBAPICursor) -> None:
    # With WAL, `status` reads while `run` writes. When programs switch a new file at the same moment, SQLite fails all
    # but one at once, without its busy timeout: the others wait for the file with a statement that respects it.
    for _ in range(WAL_TRIES):
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as exc:
            if _primary_code(exc) != sqlite3.SQLITE_BUSY:
                raise
            cursor.execute("BEGIN EXCLUSIVE")
            cursor.execute("COMMIT")
        else:
            return
    raise sqlite3.OperationalError("other programs keep the file from being switched to WAL")


def _begin(connection: Connection) -> None:
    # SQLite goes on writing to a file that was removed: what is confirmed then, and dead letters, would be gone.
    if _identity(connection.info["path"]) != connection.info["file"]:
        raise errors.CheckpointUnavailable(
            detail=f"{connection.info['path']} was removed or replaced while it was in use: put it back, or stop this"
            " program and start it again"
        )
    # A writer takes the write lock before it reads, so that what it compares with can't move; readers take none.
    mode = "IMMEDIATE" if connection.get_execution_options().get("writes") else "DEFERRED"
    connection.exec_driver_sql(f"BEGIN {mode}")


_OF_TRANSACTION = f"""
SELECT set_config('synchronous_commit', 'local', true),
    CASE current_setting('lock_timeout') WHEN '0' THEN set_config('lock_timeout', '{LOCK_SECONDS}s', true) END
"""


def _begin_postgres(connection: Connection) -> None:
    # For the transaction: a pooler does not keep a session. `local` is durable on the server's own disk, which `off`
    # is not: a checkpoint lost in a crash would be behind what was confirmed to PostgreSQL. Anything more waits for a
    # standby; if that is our own slot, it waits for the confirmation that comes after this commit. And a thread that
    # waits for a lock would keep the program from ending: a stricter lock_timeout stays.
    connection.exec_driver_sql(_OF_TRANSACTION)


def _explain_sqlite(error: sqlite3.Error, path: Path) -> errors.CheckpointError:
    code = _primary_code(error)
    directory = path.absolute().parent
    if code == sqlite3.SQLITE_CANTOPEN and not directory.is_dir():
        cure = f"Make it (mkdir -p {directory}) or name another file in {URL_SETTING}"
        return errors.CheckpointUnusable(problem=f"directory {directory} does not exist", cure=cure)
    problem = f"{path}: {error}"
    if code in SQLITE_UNUSABLE and not (code == sqlite3.SQLITE_CANTOPEN and _may_open(path)):
        cure = (
            f"Check that this user may read and write it and the directory {directory}, or name another file in"
            f" {URL_SETTING} and run {command('init')}"
        )
        return errors.CheckpointUnusable(problem=problem, cure=cure)
    if code == sqlite3.SQLITE_ERROR:  # a statement that can't be run: a table is missing or has another shape
        return errors.CheckpointUnusable(problem=problem, cure=TABLES_CURE)
    return errors.CheckpointUnavailable(detail=problem)


def _may_open(path: Path) -> bool:
    """Nothing is wrong with the file: the process has no descriptor left, for instance."""
    return path.is_file() and os.access(path, os.R_OK | os.W_OK) and os.access(path.parent, os.W_OK)


def _primary_code(error: sqlite3.Error) -> int:
    # The low byte of an extended code. Errors of the Python module itself have none.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
