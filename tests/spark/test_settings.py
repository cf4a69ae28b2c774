"""What of Spark's own settings is refused, without Spark."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from pydantic import SecretStr

from replicator.contracts.errors import SettingsError
from replicator.contracts.settings import Settings
from replicator_spark.settings import pairs, refuse, refuse_retries
from sinks.testing import MemorySink

TWICE = MemorySink(name="api", max_repeats=1000)
SAME = MemorySink(name="table")


@pytest.mark.parametrize(
    "option",
    [
        "spark.executorEnv.REPLICATOR_POSTGRES_DSN=host=db user=app",
        "spark.executorEnv.REPLICATOR_CLICKHOUSE_URL=https://ch/engagement",  # also with nothing in it: others have
        "spark.executorEnv.REPLICATOR_HTTP_BEARER_TOKEN=planted",
        "spark.executorEnv.REPLICATOR_HTTP_WEBHOOK_SECRET=planted",
        "spark.executorEnv.REPLICATOR_KAFKA_PASSWORD=planted",
        "spark.executorEnv.AWS_SECRET_ACCESS_KEY=planted",
        "spark.executorEnv.PROXY=http://me:planted@proxy:3128",
        "spark.executor.extraJavaOptions=-Xss1m -Djavax.net.ssl.trustStorePassword=planted",
        "spark.kubernetes.driverEnv.DATABASE=host=db password=planted",
        "spark.authenticate.secret=planted",
        "spark.ssl.keyPassword=planted",
        "spark.hadoop.fs.s3a.access.key=planted",
        "spark.hadoop.fs.s3a.session.token=planted",
    ],
)
def test_a_secret_that_spark_would_show(option: str) -> None:
    """The setting is named, and its value is not."""
    name = option.partition("=")[0]
    with pytest.raises(SettingsError, match="it may have a secret in it") as caught:
        pairs([option])
    assert str(caught.value).startswith(name)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    "option",
    [
        "spark.executorEnv.REPLICATOR_REDIS_PREFIX=two:",
        "spark.executorEnv.REPLICATOR_CLICKHOUSE_URL_FILE=/run/secrets/two",
        "spark.executorEnv.REPLICATOR_CLICKHOUSE_URL=",
        "spark.executorEnv.REPLICATOR_HTTP_BATCH_SIZE=7",
        "spark.executorEnv.PYTHONPATH=/app",
        "spark.executorEnv.PROXY=http://proxy:3128",
        "spark.authenticate.secret.file=/run/secrets/spark",
        "spark.kubernetes.executor.secretKeyRef.REPLICATOR_HTTP_BEARER_TOKEN=api:token",
        "spark.kubernetes.executor.secrets.spark-token=/run/secrets",
        "spark.kubernetes.authenticate.oauthTokenFile=/run/secrets/token",
        "spark.eventLog.dir=hdfs://name:8020/logs",
        "spark.redaction.regex=(?i)secret|password|token",
    ],
)
def test_what_has_no_secret(option: str) -> None:
    """Paths, and names of secrets."""
    name, _, value = option.partition("=")
    assert {name: value} == pairs([option])


def test_wherever_it_is_from() -> None:
    """Of spark-defaults.conf, too, what Spark does not hide."""
    refuse({"spark.authenticate.secret": "planted"}, [SAME])  # Spark hides it
    with pytest.raises(SettingsError, match="REPLICATOR_POSTGRES_DSN is unusable"):
        refuse({"spark.executorEnv.REPLICATOR_POSTGRES_DSN": "postgresql://db/x"}, [SAME])


def test_what_a_sink_calls_a_secret() -> None:
    """One of another package may give it any name."""

    class Own(Settings):
        own_api_key: SecretStr = SecretStr("planted")

    sink = MemorySink(name="own", settings=Own())
    with pytest.raises(SettingsError, match="OWN_API_KEY is unusable") as caught:
        refuse({"spark.executorEnv.REPLICATOR_OWN_API_KEY": "planted"}, [SAME, sink])
    assert "planted" not in str(caught.value)
    refuse({"spark.executorEnv.REPLICATOR_OWN_API_KEY_FILE": "/run/own"}, [SAME, sink])


@pytest.mark.parametrize(
    ("conf", "name"),
    [
        ({"spark.task.maxFailures": "4"}, "spark.task.maxFailures"),
        ({"spark.task.maxFailures": "1", "spark.master": "local[2, 4]"}, "--master"),
        ({"spark.task.maxFailures": "1", "spark.master": "local[2,1]"}, ""),
        ({"spark.task.maxFailures": "1", "spark.master": "local-cluster[2,1,512]"}, ""),
    ],
)
def test_tasks_that_spark_repeats(conf: Mapping[str, str], name: str) -> None:
    """Where a sink sees it. What bears repeats does not care."""
    refuse_retries(conf, [SAME])
    if not name:
        refuse_retries(conf, [SAME, TWICE])
        return
    with pytest.raises(SettingsError, match="api could see more repeats than its bound") as caught:
        refuse_retries(conf, [SAME, TWICE])
    assert name == caught.value.name


def test_tasks_that_run_twice_at_once() -> None:
    """Likewise."""
    refuse({"spark.speculation": "true"}, [SAME])
    with pytest.raises(SettingsError, match="sends every event twice to api"):
        refuse({"spark.speculation": "True"}, [SAME, TWICE])
