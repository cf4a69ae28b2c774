"""The compose file and its images keep the contract with users, as far as that can be checked without Docker."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from replicator.contracts.settings import CoreSettings, variable

ROOT = Path(__file__).parents[2]
SERVICES = {"pg", "clickhouse", "redis", "external-api", "replicator"}
MONITORING = {"prometheus", "grafana"}
"""Services of the profile of that name."""
OF_SPARK = {"spark-master", "spark-worker", "spark"}
ON_SPARK = "replicator-spark"
"""Likewise; the driver has one of its own, as it runs a command. Of nodes there are several."""
BUILT = {
    "pg": "docker/pg/Dockerfile",
    "external-api": "docker/replicator/Dockerfile",
    "replicator": "docker/replicator/Dockerfile",
}
VERSION = re.compile(r":v?\d+\.\d+\.\d+[\w.-]*$|:\d+\.\d+-[\w.-]+$")
"""A patch release; PostgreSQL has two numbers."""
CONTRACT = """\
docker compose up -d
docker exec -it pg psql -U app -d engagement -c "INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms, device) VALUES (1, 999, 'play', 7000, 'web');"
docker exec -it clickhouse clickhouse-client -q "SELECT * FROM engagement.events_enriched ORDER BY event_id DESC LIMIT 5;"
docker exec -it redis redis-cli GET content:last:1
docker exec -it redis redis-cli ZREVRANGE top:content:10m 0 10 WITHSCORES
docker logs -f external-api
""".splitlines()  # noqa: E501  verbatim
"""What users type. docker-compose.yml has to fit these commands, not the other way round."""
SPARK_PAGE = ROOT / "docs/how-to/operate/spark.md"
SPARK_DOCKERFILE = (ROOT / "docker/spark/Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


def _service(name: str) -> dict[str, Any]:
    service: dict[str, Any] = COMPOSE["services"][name]
    return service


def _dockerfile(name: str) -> str:
    """Its instructions, one per line."""
    text = (ROOT / BUILT[name]).read_text(encoding="utf-8").replace("\\\n", "")
    return re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)


def _stage(name: str) -> str:
    """The part of the replicator's Dockerfile that makes the image of this name."""
    (stage,) = re.findall(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", _dockerfile(name), re.MULTILINE | re.DOTALL)
    return str(stage)


def _seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


def test_the_file_follows_the_specification() -> None:
    """No misspelt key, and no value that Compose would refuse, after merges."""
    PyCompose.from_yaml(yaml.safe_dump(COMPOSE)).validate()


def test_a_misspelt_key_is_found() -> None:
    """The check above does check."""
    with pytest.raises(ValueError, match="helthcheck"):
        PyCompose.from_yaml("services: {redis: {image: redis, helthcheck: {test: [CMD, 'true']}}}")


def test_compose_finds_the_file() -> None:
    """`docker compose up -d` reads docker-compose.yml, and there is no other file to merge or prefer."""
    names = {file.name for pattern in ("compose*.y*ml", "docker-compose*.y*ml") for file in ROOT.glob(pattern)}
    assert names == {"docker-compose.yml"}


def test_names_are_the_contract() -> None:
    """`docker exec -it pg ...` and `docker logs -f external-api` work as they stand in the README."""
    assert {name for name in COMPOSE["services"] if "profiles" not in _service(name)} == SERVICES
    names = {name: service.get("container_name") for name, service in COMPOSE["services"].items()}
    assert names == {name: name for name in SERVICES | MONITORING} | dict.fromkeys({*OF_SPARK, ON_SPARK})


def test_readme_has_the_commands_of_the_contract() -> None:
    """The commands are in the documents word for word."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [command for command in CONTRACT if command not in lines] == []


def test_the_database_is_the_contract() -> None:
    """`psql -U app -d engagement` in pg, and clickhouse-client without a user or a password in clickhouse."""
    postgres = _service("pg")["environment"]
    assert [postgres[f"POSTGRES_{key}"] for key in ("USER", "PASSWORD", "DB")] == ["app", "app", "engagement"]
    clickhouse = _service("clickhouse")["environment"]
    assert clickhouse == {"CLICKHOUSE_DB": "engagement", "CLICKHOUSE_SKIP_USER_SETUP": "1"}


def test_default_settings_reach_the_published_ports() -> None:
    """`python -m replicator` on the same machine needs no settings beside the compose services."""
    ports = {name: _service(name)["ports"] for name in SERVICES}
    expected = {"pg": 5432, "clickhouse": 8123, "redis": 6379, "external-api": 8000, "replicator": 8080}
    assert {name: [f"127.0.0.1:{port}:{port}"] for name, port in expected.items()} == ports


@pytest.mark.parametrize("name", sorted(OF_SPARK))
def test_spark_runs_confined_with_the_replicators_settings(name: str) -> None:
    """One image for all; nodes and driver mean the same servers; no secret on a command line, no port published."""
    service = _service(name)
    assert "docker/spark/Dockerfile" == service["build"]["dockerfile"]
    assert (True, ["ALL"]) == (service["read_only"], service["cap_drop"])
    assert "ports" not in service
    settings = {**_service("replicator")["environment"]}
    del settings["REPLICATOR_ADMIN_LISTEN"]
    assert name == "spark-master" or settings == service["environment"]
    assert not [value for value in settings.values() if value in str(service.get("entrypoint"))]


def test_the_replicator_on_spark_takes_its_place() -> None:
    """The same settings, checkpoint, port and time to stop; what is not the replicator's is how it is started."""
    plain, service = _service("replicator"), _service(ON_SPARK)
    same = ("environment", "volumes", "ports", "stop_grace_period", "restart", "read_only", "cap_drop")
    assert {name: plain[name] for name in same} == {name: service[name] for name in same}
    assert plain["depends_on"].items() <= service["depends_on"].items()
    assert f"spark.driver.host={service['hostname']}" in service["command"]


def test_a_second_slot_on_the_cluster() -> None:
    """The page's override follows the specification; driver and nodes mean the same, and both drivers have room."""
    [text] = re.findall(r"```yaml\n(services:.*?)```", SPARK_PAGE.read_text(encoding="utf-8"), re.DOTALL)
    override = yaml.safe_load(text.replace("!override ", ""))["services"]
    PyCompose.from_yaml(yaml.safe_dump({"services": override})).validate()
    first, second = _service(ON_SPARK), override["replicator-spark-two"]
    words = shlex.split(second["command"])
    assert f"spark.driver.host={second['hostname']}" in words
    assert {word for word in first["command"] if word.startswith(("spark.cores", "spark.executor"))} <= set(words)
    environment = first["environment"] | second["environment"]
    given = dict(word.partition("REPLICATOR_")[2].split("=") for word in words if "executorEnv" in word)
    assert {
        "REDIS_PREFIX": environment["REPLICATOR_REDIS_PREFIX"],
        "CLICKHOUSE_URL": "",
        "CLICKHOUSE_URL_FILE": "/run/two/clickhouse_url",
    } == given
    assert environment["REPLICATOR_CLICKHOUSE_URL"] in SPARK_PAGE.read_text(encoding="utf-8").partition("```yaml")[0]
    [mount] = override["spark-worker"]["volumes"]
    assert given["CLICKHOUSE_URL_FILE"].startswith(mount.split(":")[1])
    apart = ("SLOT", "POSTGRES_DSN", "CLICKHOUSE_URL", "CHECKPOINT_URL")
    assert not [
        name for name in apart if first["environment"].get(f"REPLICATOR_{name}") == environment[f"REPLICATOR_{name}"]
    ]
    assert set(first["ports"]).isdisjoint(second["ports"])


def test_the_spark_image_has_the_whole_program() -> None:
    """Executors find it, wherever Spark starts them; it has the lock of its own, with hashes."""
    dockerfile = SPARK_DOCKERFILE
    copied = set(re.findall(r"^COPY (?!--from)(\S+) \./", dockerfile, re.MULTILINE))
    assert {"replicator", "replicator_spark", "enrichment", "sinks", "checkpoint_store", "sql"} == copied
    assert "PYTHONPATH=/app" in dockerfile
    assert "\nUSER 10001\n" in dockerfile
    assert "--require-hashes" in dockerfile
    assert {"requirements-spark.lock", "/requirements-spark.lock"} == set(
        re.findall(r"\S*requirements\S*\.lock", dockerfile)
    )


def test_images_are_pinned() -> None:
    """Neither `latest` nor a tag that moves with the next release."""
    pulled = [_service(name)["image"] for name in COMPOSE["services"] if "image" in _service(name)]
    dockerfiles = "".join(_dockerfile(name) for name in BUILT)
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", dockerfiles, re.MULTILINE))
    bases = set(re.findall(r"^FROM (\S+)", dockerfiles, re.MULTILINE)) - stages
    assert [image for image in [*pulled, *bases] if not VERSION.search(image)] == []
    assert {name for name in SERVICES if "build" in _service(name)} == set(BUILT)
    assert {"python:3.12.13-slim-bookworm"} == set(re.findall(r"^FROM (\S+)", SPARK_DOCKERFILE, re.MULTILINE))


def test_what_the_images_copy_exists() -> None:
    """Each COPY names something that is in the repository and that .dockerignore lets through."""
    allowed = re.findall(r"^!(.*)", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    for name, dockerfile in BUILT.items():
        for line in re.findall(r"^COPY (?!--from)(.*)", _dockerfile(name), re.MULTILINE):
            for source in shlex.split(line)[:-1]:
                assert (ROOT / source).exists(), f"{dockerfile}: {source}"
                assert any(f"{source}/".startswith(f"{entry}/") for entry in allowed), f".dockerignore: {source}"


def test_the_replicator_image_has_the_whole_program() -> None:
    """Every package of the product, and backfill.py."""
    copied = set(re.findall(r"^COPY (\S+) ", _stage("replicator"), re.MULTILINE))
    packages = {"replicator", "enrichment", "sinks", "checkpoint_store", "sql"}
    assert copied == packages | {script.name for script in ROOT.glob("backfill.py")}


def test_the_images_hold_only_the_runtime_lock() -> None:
    """Hashes are checked; neither tools nor the embedded engine are in the image."""
    dockerfile = _dockerfile("replicator")
    assert "--require-hashes" in dockerfile
    assert set(re.findall(r"\S*requirements\S*\.lock", dockerfile)) == {"requirements.lock", "/requirements.lock"}


def test_commands_go_to_the_program() -> None:
    """`docker compose run replicator status`: what follows the service's name is the program's command."""
    assert 'ENTRYPOINT ["python", "-m", "replicator"]' in _stage("replicator")
    assert {"command", "entrypoint"}.isdisjoint(_service("replicator"))


def test_messages_call_the_program_from_outside() -> None:
    """What they print can be pasted on the host; the SQL that `replicator sql` prints is where its link leads."""
    stage = _stage("replicator")
    assert 'REPLICATOR_PROGRAM="docker compose run --rm replicator"' in stage
    assert Path("../sql") == (ROOT / "replicator/sql").readlink()
    assert {"COPY replicator ./replicator", "COPY sql ./sql"} <= set(stage.splitlines())


@pytest.mark.parametrize("name", sorted(SERVICES | MONITORING))
def test_every_service_has_a_health_check(name: str) -> None:
    """`docker compose up -d --wait` and the dependency below wait for something; all survive a reboot."""
    assert "healthcheck" in _service(name) or "\nHEALTHCHECK " in _stage(name)
    assert _service(name)["restart"] == "unless-stopped"


def test_the_replicator_starts_when_the_others_are_healthy() -> None:
    """It stops before them, so that it can confirm its last position."""
    expected = {name: {"condition": "service_healthy"} for name in SERVICES - {"replicator"}}
    assert expected == _service("replicator")["depends_on"]


@pytest.mark.parametrize("name", ["replicator", "external-api"])
def test_our_own_images_run_confined(name: str) -> None:
    """Not root, no capabilities, nothing writable but /tmp and the volume."""
    assert "\nUSER 10001\n" in _stage(name)
    service = _service(name)
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_state_is_on_named_volumes() -> None:
    """`docker compose down` and an upgrade lose nothing; the checkpoint belongs to the user that writes it."""
    volumes = [volume for service in COMPOSE["services"].values() for volume in service.get("volumes", [])]
    mounts = dict(volume.split(":") for volume in volumes if not volume.startswith("./"))
    assert set(mounts) == set(COMPOSE["volumes"])
    directory = mounts["checkpoint"]
    assert f"sqlite:///{directory}/checkpoint.db" == _service("replicator")["environment"]["REPLICATOR_CHECKPOINT_URL"]
    assert f"--owner=10001 --group=10001 --mode=0750 {directory}\n" in _stage("replicator")


def test_there_is_time_to_drain() -> None:
    """Docker kills only after the drain timeout and the time to save and to disconnect."""
    service = _service("replicator")
    drain = int(service["environment"][variable("drain_timeout_seconds")])
    assert drain == CoreSettings.model_fields["drain_timeout_seconds"].default
    assert _seconds(service["stop_grace_period"]) >= drain + 10


def test_postgres_decodes_and_guards_its_disk() -> None:
    """wal2json for the server's own version, logical WAL, and a bound on what a slot may retain."""
    command = _service("pg")["command"]
    settings = dict(option.split("=") for option in command if "=" in option)
    assert settings["wal_level"] == "logical"
    assert "wal2json" in settings["output_plugin_libraries"].split(",")
    assert "max_slot_wal_keep_size" in settings
    assert '"postgresql-${PG_MAJOR}-wal2json"' in _dockerfile("pg")


def test_the_replicator_logs_in_with_the_least_rights() -> None:
    """Not as the superuser app: as the role that sql/roles.sql makes when the database is new."""
    password = _service("pg")["environment"]["REPLICATOR_PASSWORD"]
    dsn = _service("replicator")["environment"]["REPLICATOR_POSTGRES_DSN"]
    assert dsn == f"postgresql://replicator:{password}@pg:5432/engagement"
    assert "roles.sql" in (ROOT / "docker/pg/20-roles.sh").read_text(encoding="utf-8")


def test_redis_never_evicts() -> None:
    """Counts are state: an evicted key would be a wrong number without an error."""
    command = _service("redis")["command"]
    assert {"--maxmemory-policy": "noeviction", "--appendonly": "yes"}.items() <= dict(
        zip(command[1::2], command[2::2], strict=True)
    ).items()


def test_the_profile_shows_the_replicator() -> None:
    """Prometheus reaches its endpoints, Grafana reaches Prometheus; only this machine reaches either."""
    assert {name for name in COMPOSE["services"] if _service(name).get("profiles") == ["monitoring"]} == MONITORING
    assert not [port for name in MONITORING for port in _service(name)["ports"] if not port.startswith("127.0.0.1:")]
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yaml").read_text(encoding="utf-8"))
    targets = [
        target for job in prometheus["scrape_configs"] for of in job["static_configs"] for target in of["targets"]
    ]
    assert ["replicator:8080"] == targets
    assert "0.0.0.0:8080" == _service("replicator")["environment"]["REPLICATOR_ADMIN_LISTEN"]
    folder = ROOT / "deploy/grafana/provisioning"
    [source] = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text(encoding="utf-8"))["datasources"]
    assert "http://prometheus:9090" == source["url"]


def test_what_the_profile_mounts_exists() -> None:
    """From this repository, read-only; the dashboard is where Grafana is told to look for it."""
    mounted = [
        volume.split(":") for name in MONITORING for volume in _service(name)["volumes"] if volume.startswith("./")
    ]
    assert mounted
    assert {"ro"} == {rights for _, _, rights in mounted}
    assert not [file for file, _, _ in mounted if not (ROOT / file).exists()]
    provider = (ROOT / "deploy/grafana/provisioning/dashboards/replicator.yaml").read_text(encoding="utf-8")
    [of_provider] = yaml.safe_load(provider)["providers"]
    home = _service("grafana")["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in [inside for _, inside, _ in mounted]
    assert str(Path(home).parent) == of_provider["options"]["path"]
