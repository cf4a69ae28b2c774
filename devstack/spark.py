"""A Spark cluster of the stack: a Master and Workers as processes of their own, from the environment in .venv-spark."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from devstack.process import ROOT, DevStackError, Service, free_port
from devstack.replicator import PREFIX
from devstack.watchdog import Watchdog

PYTHON = ROOT / ".venv-spark/bin/python"
EXECUTORS = ("spark.driver.host=127.0.0.1", "spark.executor.memory=512m", "spark.executor.cores=2", "spark.cores.max=4")
"""What a driver has to ask for, so that it has an executor on each of two Workers, and another driver, too."""


def spark_class() -> str:
    """The program that starts a part of Spark. Raises DevStackError."""
    found = next((ROOT / ".venv-spark/lib").glob("python*/site-packages/pyspark/bin/spark-class"), None)
    if found is None:
        raise DevStackError("Spark is missing: make spark-setup")
    return str(found)


class SparkPart(Service):
    """One process of Spark."""

    def __init__(self, folder: Path, watchdog: Watchdog, settings: Mapping[str, str]) -> None:
        super().__init__(folder, watchdog)
        self.settings = settings

    def variables(self) -> dict[str, str]:
        """The replicator's settings, as a node has them."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        return {**outside, **self.settings, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": str(PYTHON)}

    def environment(self) -> dict[str, str]:
        """No settings: the replicator does not connect to it."""
        return {}

    def answers(self) -> bool:
        """Whether it listens."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class SparkMaster(SparkPart):
    """The one that a driver is given the address of."""

    name = "spark-master"

    def __init__(self, folder: Path, watchdog: Watchdog, settings: Mapping[str, str]) -> None:
        super().__init__(folder, watchdog, settings)
        self.ui = free_port()
        """The port of its web pages."""

    @property
    def url(self) -> str:
        """For `--master`."""
        return f"spark://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """The Master."""
        listen = ["--host", "127.0.0.1", "--port", str(self.port), "--webui-port", str(self.ui)]
        return [spark_class(), "org.apache.spark.deploy.master.Master", *listen]


class SparkWorker(SparkPart):
    """A node with room for two drivers' executors."""

    name = "spark-worker"

    def __init__(self, folder: Path, watchdog: Watchdog, settings: Mapping[str, str], master: SparkMaster) -> None:
        super().__init__(folder, watchdog, settings)
        self._master = master

    def command(self) -> list[str]:
        """The Worker."""
        listen = ["--host", "127.0.0.1", "--port", str(self.port), "--webui-port", str(free_port())]
        room = ["--cores", "4", "--memory", "1g", "--work-dir", str(self.folder / "work")]
        return [spark_class(), "org.apache.spark.deploy.worker.Worker", *listen, *room, self._master.url]


class SparkCluster(NamedTuple):
    """What runs."""

    master: SparkMaster
    workers: list[SparkWorker]


@contextmanager
def cluster(folder: Path, watchdog: Watchdog, settings: Mapping[str, str], workers: int = 2) -> Iterator[SparkCluster]:
    """A Master and some Workers, until the block ends."""
    folder.mkdir(exist_ok=True)  # an earlier one's logs may be there
    folder = Path(tempfile.mkdtemp(dir=folder))
    made = SparkCluster(SparkMaster(folder, watchdog, settings), [])
    for number in range(workers):
        place = folder / f"node-{number}"
        place.mkdir()
        made.workers.append(SparkWorker(place, watchdog, settings, made.master))
    try:
        for part in (made.master, *made.workers):
            part.start()
        yield made
    finally:
        for part in (*made.workers, made.master):
            part.stop()
