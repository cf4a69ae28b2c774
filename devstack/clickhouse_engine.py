"""Runs ClickHouse statements on the embedded engine (chdb): settings, parameters, INSERT data, ClickHouse's errors.

`clickhouse_server` speaks HTTP and calls this. Only one process at a time can open a directory.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import chdb
from chdb import ChdbError

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108  in memory, never on disk
HEAD_BYTES = 1 << 16  # where the statement of an INSERT must end; its data may be far longer

INSERT_WITH_DATA = re.compile(rb"\s*(INSERT\s+INTO\b.*?)\s+FORMAT\s+(\w+)[ \t]*(?:\r?\n)?", re.IGNORECASE | re.DOTALL)
OTHER_SOURCE = re.compile(rb"\b(VALUES|SELECT|INFILE)\b", re.IGNORECASE)
WITH_RESULT = re.compile(rb"\s*(SELECT|WITH|SHOW|DESC|DESCRIBE|EXISTS|EXPLAIN|CHECK)\b", re.IGNORECASE)
FORMAT_AT_END = re.compile(rb"\bFORMAT\s+(\w+)\s*(?:SETTINGS\b[^;]*)?;?\s*$", re.IGNORECASE)
EXCEPTION = re.compile(r"Code: (\d+)\. DB::Exception: .*?\((\w+)\)(?: \(version [\d.]+\))?$", re.DOTALL)
SETTING_NAME = re.compile(r"\w+")


class EngineError(Exception):
    """A statement failed; the text is ClickHouse's."""

    def __init__(self, code: int, name: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.name = name


class Statement(NamedTuple):
    """What a request asks for."""

    sql: bytes
    """Includes the data of an INSERT, unless that came apart from it."""
    data: bytes
    """What follows it in the next line."""
    database: str
    settings: Mapping[str, str]
    parameters: Mapping[str, str]
    default_format: str
    read_only: bool


class Result(NamedTuple):
    """The result."""

    body: bytes
    format: str | None
    """None if the statement has no result."""
    summary: Mapping[str, int]


class Engine:
    """Owns the directory. Statements may run concurrently: each has its own connection, and so its own settings."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder)
        self._owner = _connect(self._path)  # keeps the engine open: it lives as long as one connection does
        self.version = self._owner.query("SELECT version()", "TabSeparatedRaw").bytes().decode().strip()

    def create_database(self, name: str) -> None:
        """Create the database if it is missing."""
        self._owner.query(f"CREATE DATABASE IF NOT EXISTS {quoted(name)}")

    def close(self) -> None:
        """Release the directory."""
        self._owner.close()

    def run(self, statement: Statement) -> Result:
        """Run a statement. Blocks. Raises EngineError."""
        try:
            with closing(_connect(self._path)) as connection:
                _prepare(connection, statement)
                return _run(connection, statement)
        except (ChdbError, RuntimeError) as exc:
            raise _error(str(exc)) from exc


def failure(code: int, name: str, text: str) -> EngineError:
    """An error of this module in ClickHouse's wording."""
    return EngineError(code, name, f"Code: {code}. DB::Exception: {text} ({name})")


def quoted(name: str) -> str:
    """An identifier in SQL."""
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def _connect(path: str) -> Any:
    return chdb.connect(path)  # type: ignore[no-untyped-call]  # it has no annotations


def _literal(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _prepare(connection: Any, statement: Statement) -> None:
    connection.query(f"USE {quoted(statement.database)}")
    for name, value in statement.settings.items():
        if not SETTING_NAME.fullmatch(name):
            raise failure(115, "UNKNOWN_SETTING", f"Unknown setting {name!r}.")
        connection.query(f"SET {name} = {_literal(value)}")
    if statement.read_only:
        connection.query("SET readonly = 2")  # last: it forbids changing settings


def _run(connection: Any, statement: Statement) -> Result:
    insert = INSERT_WITH_DATA.match(statement.sql, 0, HEAD_BYTES)
    if insert and not OTHER_SOURCE.search(insert[1]):
        return _insert(connection, insert, memoryview(statement.sql)[insert.end() :], statement.data)
    sql = b"\n".join(filter(None, [statement.sql, statement.data]))
    result = connection.query(sql, statement.default_format, params=dict(statement.parameters))
    summary = {
        "read_rows": result.rows_read(),
        "read_bytes": result.bytes_read(),
        "elapsed_ns": int(result.elapsed() * 1e9),
    }
    return Result(result.bytes(), _format(statement), summary)


def _insert(connection: Any, insert: re.Match[bytes], *data: bytes | memoryview) -> Result:
    """Insert from a file: twice as fast as one string with the data in it, and it returns the number of rows.

    chdb's own streaming insert is as fast, but reports success even if rows could not be written (full disk,
    constraint).
    """
    with tempfile.NamedTemporaryFile(dir=MEMORY, prefix="insert-") as file:
        file.writelines(data)
        file.flush()
        source = f" FROM INFILE {_literal(file.name)} FORMAT ".encode()
        result = connection.query(insert[1] + source + insert[2])
    summary = {
        "written_rows": result.rows_read(),
        "written_bytes": result.bytes_read(),
        "elapsed_ns": int(result.elapsed() * 1e9),
    }
    return Result(b"", None, summary)


def _format(statement: Statement) -> str | None:
    if not WITH_RESULT.match(statement.sql):
        return None
    own = FORMAT_AT_END.search(statement.sql)
    return own[1].decode() if own else statement.default_format


def _error(text: str) -> EngineError:
    """The embedded engine's error in the server's wording, without what the bindings add."""
    text = text[max(text.find("Code: "), 0) :]
    found = EXCEPTION.match(text)
    if found is None:
        return EngineError(1001, "STD_EXCEPTION", text)
    return EngineError(int(found[1]), found[2], re.sub(r" \(version [\d.]+\)$", "", text))
