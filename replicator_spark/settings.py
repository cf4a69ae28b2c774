"""Spark's own settings, as far as this program has a say: what `--conf` gives, and what must not be there. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from pydantic import SecretStr

from replicator.contracts.errors import SettingsError
from replicator.contracts.settings import variable
from replicator.contracts.sink import Sink

SECRET_NAME = re.compile(
    r"(?!spark\.kubernetes\.\w+\.secret(s|KeyRef)\.)"  # they name a secret of Kubernetes, and have none
    r".*(secret|password|token|(access|account|private|secret)[._-]?key|\.REPLICATOR_\w+_(URL|DSN))",
    re.IGNORECASE,
)
"""Of a setting whose value is a secret, or an address that may have one in it."""
SECRET_VALUE = re.compile(r"://[^/@\s]*:[^/@\s]+@|(secret|password|token)=[^/\s]", re.IGNORECASE)
"""A URL with a password, or a secret among other things."""
OF_NODES = "spark.executorEnv."

CURE = "no secret: put it into a file on each node (REPLICATOR_…_FILE), and Spark's own into spark-defaults.conf"


def pairs(options: Sequence[str]) -> dict[str, str]:
    """What `--conf` says. Raises SettingsError."""
    found = {}
    for option in options:
        name, separator, value = option.partition("=")
        problem = "" if name.startswith("spark.") else f"{name!r} is no setting of Spark"
        if not separator:
            problem = problem or f"{name!r} has no value"
        if problem:
            expected = "a setting of Spark and its value, such as spark.executor.memory=1g"
            raise SettingsError(name="--conf", problem=problem, expected=expected)
        found[name] = value
    _refuse_secrets(found)
    return found


def refuse(conf: Mapping[str, str], sinks: Sequence[Sink]) -> None:
    """Raises SettingsError for what Spark would show, and for tasks that run twice where a sink sees that.

    `conf` also has what is from spark-submit and spark-defaults.conf.
    """
    of_nodes = {name: value for name, value in conf.items() if name.startswith(OF_NODES)}
    _refuse_secrets(of_nodes, {f"{OF_NODES}{variable(field)}" for sink in sinks for field in _secrets(sink)})
    if (names := _seeing(sinks)) and conf.get("spark.speculation", "").lower() == "true":
        problem = f"it is true, and a task that runs twice at once sends every event twice to {names}"
        raise SettingsError(name="spark.speculation", problem=problem, expected=f"false, or sinks without {names}")


def refuse_retries(conf: Mapping[str, str], sinks: Sequence[Sink]) -> None:
    """Raises SettingsError where Spark repeats what failed: nobody would count what a sink then sees again."""
    local = re.fullmatch(r"local\[[^,]+,\s*(\d+)\s*\]", conf.get("spark.master", ""))
    name, most = ("--master", local[1]) if local else ("spark.task.maxFailures", conf.get("spark.task.maxFailures", ""))
    if (names := _seeing(sinks)) and most != "1":
        problem = f"Spark would try a task up to {most} times, and {names} could see more repeats than its bound"
        expected = "local[N]" if local else "1"
        raise SettingsError(name=name, problem=problem, expected=f"{expected}, or sinks without {names}")


def _secrets(sink: Sink) -> list[str]:
    """Settings that it declares as secrets, whatever they are called."""
    return [field for field, value in sink.settings if isinstance(value, SecretStr)]


def _refuse_secrets(conf: Mapping[str, str], known: Collection[str] = ()) -> None:
    for name, value in conf.items():
        if value and (name in known or SECRET_NAME.fullmatch(name) or SECRET_VALUE.search(value)):
            problem = "it may have a secret in it, which command lines, Spark's pages and its logs show"
            raise SettingsError(name=name, problem=problem, expected=CURE)


def _seeing(sinks: Sequence[Sink]) -> str:
    """Sinks that see a repeat."""
    return ", ".join(sink.name for sink in sinks if sink.max_repeats is not None)
