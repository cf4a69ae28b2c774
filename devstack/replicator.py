"""The real replicator as a child process that reads from and writes to a stack."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from devstack.control import fetch
from devstack.process import ROOT, Service, python
from devstack.watchdog import Watchdog

PREFIX = "REPLICATOR_"


class Replicator(Service):
    """`python -m replicator` with these settings only; settings in the caller's environment are not passed on."""

    name = "replicator"

    def __init__(self, folder: Path, watchdog: Watchdog, settings: Mapping[str, str]) -> None:
        super().__init__(folder, watchdog)
        checkpoint = {"REPLICATOR_CHECKPOINT_URL": f"sqlite:///{self.folder}/checkpoint.db"}
        self.settings = {**checkpoint, **settings, "REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{self.port}"}
        """Read at every start."""
        self.code = ROOT
        """The checkout that it runs."""
        self.program = python("replicator")
        """Its command line."""

    @property
    def url(self) -> str:
        """Base URL of its admin endpoints."""
        return f"http://127.0.0.1:{self.port}"

    def status(self) -> dict[str, Any]:
        """What `/status` says."""
        return dict(msgspec.json.decode(fetch(f"{self.url}/status")))

    def history(self) -> bytes:
        """What `/history` says."""
        return fetch(f"{self.url}/history")

    def command(self) -> list[str]:
        """The program."""
        path = [] if self.code == ROOT else ["env", f"PYTHONPATH={self.code}"]
        return [*path, *self.program]

    def variables(self) -> dict[str, str]:
        """The environment of its process."""
        return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | self.settings

    def environment(self) -> dict[str, str]:
        """No settings: nothing connects to it."""
        return {}

    def answers(self) -> bool:
        """Whether it reads its slot."""
        try:
            status = self.status()
            return bool(status.get("replicator", status)["connected"])  # `--compare`: an older one has it at the top
        except OSError:
            return False
