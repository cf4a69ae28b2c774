"""The connection to the cluster. The only module that imports PySpark."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import TIMEOUT_MAX, Event, Thread, Timer
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from replicator.contracts.errors import ClusterFailed, SettingsError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DEFAULTS = {
    "spark.log.level": "ERROR",  # a failed task is told by us
    "spark.ui.showConsoleProgress": "false",  # our own line is
    "spark.ui.enabled": "false",  # it listens on every address, without authentication
    "spark.task.reaper.enabled": "true",  # ends an executor that can't end a task which was given up
    "spark.task.reaper.killTimeout": "60s",
}
"""What `--conf` may change. Everything else is spark-defaults.conf's."""

SETTLED_SECONDS = 3.0
"""Executors of one application start within a second of each other."""
DIED = {
    "ExecutorLostFailure": "its executor was lost",
    "Python worker exited unexpectedly": "its Python process died",
}
"""Words of Spark's, and what they mean for a task."""
DIED_CURE = "The logs of the executors have the reason"
PATIENCE_SECONDS = 120.0
"""Spark waits as long for an executor (spark.network.timeout): a process may begin, or be swapped out."""
SILENT_SECONDS = 60.0
"""Spark's own process answers in milliseconds; one that does not for so long is as good as dead."""
CLOSE_SECONDS = 5.0
"""Spark ends within a second. What supervises the replicator gives it some seconds more than the drain takes."""
DISK_CURE = (
    "Check that spark.local.dir exists on the driver and its disk has room. If that does not help, start it again"
)
TASK_CURE = (
    "Every node needs this program, installed or on PYTHONPATH, and the driver's version of Python. The logs of the"
    " executors have the reason"
)

ENDED_CURE = "Start the replicator again, as its supervisor does. Its log, or the Master's, has Spark's reason"

log = logging.getLogger("replicator.spark")

A = TypeVar("A")
T = TypeVar("T")


class State(NamedTuple):
    """What a cluster has at a moment."""

    executors: int
    cores: int
    """How many tasks run at once."""


def _ended(exc: Exception) -> ClusterFailed:
    """What PySpark raises then is of many kinds, some of them its own bugs."""
    return ClusterFailed(f"Spark's process on the driver has ended ({type(exc).__name__})", ENDED_CURE)


@contextmanager
def _said() -> Iterator[None]:
    """What a question to Spark's process raises, as that."""
    try:
        yield
    except ClusterFailed:
        raise
    except Exception as exc:
        raise _ended(exc) from exc


class Cluster:
    """A Spark application. It calls functions on the nodes."""

    def __init__(self, name: str, master: str | None, options: Mapping[str, str]) -> None:
        """Raises SettingsError, ClusterFailed. Blocks for ten seconds or more."""
        self._spark = _start(name, master, {**DEFAULTS, **options})
        self._context = self._spark.sparkContext
        self.master = str(self._context.master)
        self.conf = dict(self._context.getConf().getAll())
        """Spark's settings, wherever they are from."""

    @property
    @_said()
    def cores(self) -> int:
        """How many tasks run at once, at this moment. Raises ClusterFailed once Spark has ended.

        Not `defaultParallelism`: that is spark.default.parallelism where somebody has set it, and 2 at least.
        """
        spark = self._context._jsc.sc()  # noqa: SLF001  PySpark itself does not tell
        return max(1, int(spark.maxNumConcurrentTasks(spark.resourceProfileManager().defaultResourceProfile())))

    def settled(self) -> int:
        """The same, once no more nodes come. Blocks for some seconds. Raises ClusterFailed."""
        self.call(bool, 0)  # waits for the first one
        cores, since = self.cores, time.monotonic()
        while time.monotonic() - since < SETTLED_SECONDS:
            time.sleep(0.1)
            if cores != self.cores:
                cores, since = self.cores, time.monotonic()
        return cores

    def call(self, function: Callable[[A], T], argument: A, patience_seconds: float = TIMEOUT_MAX) -> T:
        """The result of one task. Blocks; calls from several threads run side by side.

        Where a node dies, Spark calls again, up to spark.task.maxFailures times. A task that takes longer than so many
        seconds is given up, and its process killed. Raises ClusterFailed.
        """
        hung = Event()
        try:
            with self._ended_after(patience_seconds, hung):
                [result] = self._context.parallelize([argument], 1).map(function).collect()
        except Exception as exc:
            log.debug("a task failed", exc_info=True)
            raise _failed(exc, patience_seconds if hung.is_set() else 0.0) from exc
        return cast("T", result)

    @contextmanager
    def _ended_after(self, seconds: float, hung: Event) -> Iterator[None]:
        """Cancel this thread's job if it is not over by then, and set `hung`.

        Spark's own spark.python.worker.killOnIdleTimeout sends SIGTERM, which a process that is stopped does not get.
        Of a job that is cancelled it kills the process with SIGKILL, some seconds later.
        """
        from py4j.protocol import Py4JError

        group = uuid.uuid4().hex

        def end() -> None:
            hung.set()
            with suppress(Py4JError, OSError):  # Spark has ended
                self._context.cancelJobGroup(group)

        self._context.setJobGroup(group, "")
        timer = Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @_said()
    def state(self) -> State:
        """What it has now. Raises ClusterFailed once Spark has ended: its own process, or the application."""
        spark = self._context._jsc.sc()  # noqa: SLF001  PySpark itself does not tell
        if spark.isStopped():
            raise ClusterFailed("Spark has ended the application", ENDED_CURE)
        executors = int(spark.getExecutorMemoryStatus().size())
        local = self.master.startswith("local") and "cluster" not in self.master
        return State(executors if local else executors - 1, self.cores)  # the driver counts as one

    def cancel(self) -> None:
        """Give up every call that is under way."""
        from py4j.protocol import Py4JError

        with suppress(Py4JError, OSError):  # `state` says it
            self._context.cancelAllJobs()

    def close(self) -> None:
        """End the application. A process of Spark's that does not answer is killed: it would keep the cores."""
        stopping = Thread(target=self._stop, daemon=True)
        stopping.start()
        stopping.join(CLOSE_SECONDS)
        process = getattr(self._context._gateway, "proc", None)  # noqa: SLF001  spark-submit's is not ours
        if stopping.is_alive() and process is not None:
            process.kill()

    def _stop(self) -> None:
        from py4j.protocol import Py4JError

        with suppress(Py4JError, OSError):  # it has ended by itself
            self._spark.stop()


async def look(cluster: Cluster) -> State:
    """What it has now. Raises ClusterFailed once Spark has ended, or does not answer."""
    try:
        async with asyncio.timeout(SILENT_SECONDS):
            return await asyncio.to_thread(cluster.state)
    except TimeoutError:
        problem, cure = "Spark's process on the driver does not answer", "Start the replicator again"
        raise ClusterFailed(problem, cure) from None


def _failed(exc: Exception, silent_seconds: float) -> ClusterFailed:
    """What PySpark raised of a task, as ours."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    if isinstance(exc, (Py4JJavaError, PySparkException)):
        silent = f"its process on the node did not answer for {silent_seconds:g} s" if silent_seconds else ""
        died = silent or next((meaning for words, meaning in DIED.items() if words in str(exc)), "")
        return ClusterFailed(f"Spark gave a task up ({died or _reason(exc)})", DIED_CURE if died else TASK_CURE)
    if isinstance(exc, OSError) and not isinstance(exc, ConnectionError):
        problem = f"Spark's process on the driver was not given a task ({exc.strerror or type(exc).__name__})"
        return ClusterFailed(problem, DISK_CURE)
    return _ended(exc)


def _reason(exc: Exception) -> str:
    """The kind of the error on the node. Its words may hold anything."""
    kinds = re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception|Failure))\b", str(exc), re.MULTILINE)
    return kinds[-1] if kinds else type(exc).__name__


def _start(name: str, master: str | None, options: Mapping[str, str]) -> SparkSession:
    try:
        import pyspark
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException
    except ImportError as exc:
        expected = "an environment with `pip install 'engagement-replicator[spark]'`, or that of `make spark-setup`"
        raise SettingsError(name="PySpark", problem=f"it can't be imported ({exc})", expected=expected) from exc
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # a pip installation finds none by itself
    builder = pyspark.sql.SparkSession.builder.appName(name)
    if master or "PYSPARK_GATEWAY_PORT" not in os.environ:  # which spark-submit sets, and it has a master of its own
        builder = builder.master(master or "local[*]")
    if (master or "local").startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")  # nobody else has to reach it
    for key, value in options.items():
        builder = builder.config(key, value)
    log.info("starting Spark %s", pyspark.__version__)
    try:
        return builder.getOrCreate()
    except (Py4JError, PySparkException, OSError) as exc:
        log.debug("Spark does not start", exc_info=True)
        cure = "Check --master, --conf, and that Java 17 or later is there (`java -version`). Spark's output is above"
        raise ClusterFailed(f"Spark does not start ({type(exc).__name__})", cure) from exc
