"""A real Prometheus that scrapes one program every second, and has our alerts."""

from __future__ import annotations

import json
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from devstack.process import Service, find_program
from devstack.watchdog import Watchdog

ROOT = Path(__file__).parents[2]
SCRAPE_SECONDS = 1


@contextmanager
def prometheus(target: str) -> Iterator[Prometheus]:
    """One that runs."""
    folder = Path(tempfile.mkdtemp(prefix="prometheus-"))
    watchdog = Watchdog(folder)
    server = Prometheus(folder, watchdog, target)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        watchdog.close()


class Prometheus(Service):
    """Debian's."""

    name = "prometheus"

    def __init__(self, folder: Path, watchdog: Watchdog, target: str) -> None:
        super().__init__(folder, watchdog)
        self._program = find_program("prometheus", "prometheus")
        self._target = target

    def command(self) -> list[str]:
        """Write its settings; the program with them."""
        settings = {
            "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
            "rule_files": [str(ROOT / "deploy/prometheus/alerts.yaml")],
            "scrape_configs": [{"job_name": "replicator", "static_configs": [{"targets": [self._target]}]}],
        }
        file = self.folder / "prometheus.yaml"
        file.write_text(json.dumps(settings), encoding="utf-8")  # which is YAML
        address, data = f"127.0.0.1:{self.port}", str(self.folder / "data")
        return [
            self._program,
            f"--config.file={file}",
            f"--web.listen-address={address}",
            f"--storage.tsdb.path={data}",
        ]

    def environment(self) -> dict[str, str]:
        """The replicator knows nothing of it."""
        return {}

    def answers(self) -> bool:
        """Whether it may be asked."""
        try:
            return bool(self._get("/-/ready"))
        except OSError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Every series that the expression gives now."""
        return list(self._data("/api/v1/query", query=expression)["result"])

    def rules(self) -> list[dict[str, Any]]:
        """Every alert with its health and its state."""
        return [rule for group in self._data("/api/v1/rules")["groups"] for rule in group["rules"]]

    def _data(self, path: str, **parameters: str) -> dict[str, Any]:
        answer = json.loads(self._get(f"{path}?{urllib.parse.urlencode(parameters)}"))
        return dict(answer["data"])

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
            return bytes(response.read())
