"""Our packages that stand beside this one. Their names are plain words, and somebody's own folder may have one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from replicator.contracts.errors import PackageHidden

BESIDE = ("checkpoint_store", "enrichment", "sinks")
"""Python looks in the working directory first (`python -m`), or in that of the script, or in PYTHONPATH."""


def require_own() -> None:
    """Raise PackageHidden if Python would import another one under such a name."""
    for package in BESIDE:
        ours = Path(__file__).parents[2] / package / "__init__.py"
        found = find_spec(package)
        path = Path(found.origin) if found and found.origin else ours
        if ours.exists() and path.exists() and not ours.samefile(path):
            raise PackageHidden(path=str(path.parent if path.name == ours.name else path), package=package)
