"""`check`, `status`, `config` and `sql`: commands that look and change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from replicator.cli.arguments import Json, load_app
from replicator.operations.logs import printable

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from replicator.contracts.settings import Settings

NOT_READY = 3
UNUSABLE = 2
UNITS = {"seconds": "s", "mb": "MB"}
"""By the last word of a setting's name."""


async def check(as_json: Json = False) -> int:
    """Check that everything is in order, and print cures.

    It looks at PostgreSQL, the slot, the checkpoint, the tables and the sinks, and changes nothing. Each finding is a
    line: ok, note (it passes, with an advice) or FAIL.
    """
    from replicator.contracts.events import counted
    from replicator.operations import check as preflight

    app = load_app()
    found: list[dict[str, Any]] = []
    async with app.closing():
        async for finding in preflight.findings(app.settings, app.enricher, app.sinks, app.store):
            found.append({"ok": finding.ok, "what": finding.what, "cure": finding.cure})
            if not as_json:
                verdict = "FAIL" if not finding.ok else "note" if finding.cure and not finding.made_by_init else "ok"
                print(f"{verdict:4}  {printable(finding.what)}")
                if finding.cure:
                    print(f"      → {printable(finding.cure)}")
    failed = sum(not finding["ok"] for finding in found)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": found}))
    else:
        print(f"{counted(failed, 'check')} failed" if failed else "all checks passed")
    return int(bool(failed))


async def status(as_json: Json = False) -> int:
    """Show where slot, checkpoint and sinks are.

    It is not ready while the replicator is not, the slot is missing, lost or unread, or the checkpoint is unknown.
    """
    from replicator.operations.status import collect, text

    app = load_app()
    async with app.closing():
        found = await collect.collect(app.settings, [sink.name for sink in app.sinks], app.store)
        print(text.as_json(found) if as_json else text.as_text(found))
    return 0 if found.ready else NOT_READY


SqlFile: TypeAlias = Annotated[
    Literal["roles", "source-schema", "slot-lag", "clickhouse"],
    typer.Argument(metavar="NAME", help="roles, source-schema, slot-lag or clickhouse", show_default=False),
]


def sql(name: SqlFile) -> None:
    """Print the SQL that people run themselves.

    roles: the role in PostgreSQL, with the least rights. source-schema: the source tables. slot-lag: the lag of each
    slot, with a verdict. clickhouse: the table of each stream, as `init` creates it.
    """
    if name == "clickhouse":
        from enrichment import EnrichmentSettings, tables_of
        from replicator.contracts.settings import load
        from sinks.clickhouse.table import ddl

        print("\n".join(ddl(tables.stream) for tables in tables_of(load(EnrichmentSettings))), end="")
    else:
        print((files("replicator") / "sql" / f"{name.replace('-', '_')}.sql").read_text(encoding="utf-8"), end="")


# -- config ------------------------------------------------------------------------------------------------------


def config_show(as_json: Json = False) -> int:
    """Show every setting, its source and its default.

    The value comes from the environment, from .env, or from the file that NAME_FILE names. Secrets are masked.
    """
    from replicator.app.environment import all_settings, unknown_settings

    shown = shown_settings(all_settings())
    unknown = list(unknown_settings())
    if as_json:
        print(json.dumps({"settings": shown, "unknown": unknown}))
        return 0
    for setting in shown:
        unit = f" {setting['unit']}" if setting["unit"] and setting["value"] else ""
        is_default = setting["source"] == "default" or setting["default"] is None
        default = "" if is_default else f"; default: {setting['default']}"
        print(f"{setting['name']} = {setting['value'] or ''}{unit}  ({setting['source']}{default})")
    print("".join(f"{message}\n" for message in unknown), end="")
    return 0


def config_check() -> int:
    """Name every mistake in the settings at once.

    Nothing is connected to. A variable that begins with REPLICATOR_ and is not a setting is a mistake, too.
    """
    from pydantic.fields import FieldInfo

    from replicator.app.environment import all_settings, named_sinks, unknown_settings, unusable_parts
    from replicator.contracts.settings import examine

    # A sink that needs settings is looked at where it is named (`unusable_parts`): others may lack theirs.
    named = named_sinks()
    complete = (
        found for found in all_settings(named) if not any(map(FieldInfo.is_required, found.model_fields.values()))
    )
    found = [error for settings_class in complete for error in examine(settings_class)[1]]
    mistakes = [*dict.fromkeys([*map(str, [*found, *unusable_parts()]), *unknown_settings(named)])]
    print("\n".join(mistakes) if mistakes else "all settings are usable")
    return UNUSABLE if mistakes else 0


def shown_settings(classes: Iterable[type[Settings]]) -> list[dict[str, Any]]:
    """Their settings, as `config show --json` has them: secrets are masked."""
    return [setting for settings_class in classes for setting in _settings(settings_class)]


def _settings(settings_class: type[Settings]) -> Iterator[dict[str, Any]]:
    """The form of `--json`."""
    from replicator.app.environment import is_address, masked
    from replicator.contracts.settings import given, variable

    for name, field in settings_class.model_fields.items():
        default = _default(field)
        value, source = given(name) or (default, "missing" if field.is_required() else "default")
        is_secret = "SecretStr" in str(field.annotation) and value != default
        yield {
            "name": variable(name),
            "value": (masked(value) if is_address(name) else "***") if is_secret and value else value,
            "source": source,
            "unit": UNITS.get(name.rpartition("_")[2], ""),
            "default": default,
            "takes": field.description,
        }


def _default(field: FieldInfo) -> str | None:
    """As it would be written in the environment."""
    from pydantic import SecretStr

    value = None if field.is_required() else field.get_default(call_default_factory=True)
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple | dict):
        return ",".join(map(str, value))  # the one dict is empty
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value)
