"""Makes an example of `examples/sinks` findable as if it were installed: its module and metadata in a folder."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples/sinks"
LINES, WAREHOUSE = EXAMPLES / "lines_sink", EXAMPLES / "postgres_sink"


def install(
    folder: Path,
    name: str = "replicator-lines",
    entry_points: dict[str, str] | None = None,
    *,
    example: Path = LINES,
) -> None:
    """What `pip install --target folder` would leave there; other `entry_points` than the example's are for faults."""
    project = tomllib.loads((example / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = project["entry-points"]["replicator.sinks"] if entry_points is None else entry_points
    for module in example.glob("replicator_*.py"):
        shutil.copy(module, folder)
    metadata = folder / f"{name.replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = ["[replicator.sinks]", *(f"{key} = {value}" for key, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
