"""``docker-compose.yml``, ``Dockerfile`` and what they mount: checked as files, and run as plain processes.

No container engine is needed. The processes get the command and the environment of their service in the compose file, with
the addresses of servers that run here in the place of the services' names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from statecache import Move, StateCache, StateMachine
from statecache.settings import Settings
from tests.acceptance.command import REPOSITORY, environment, run
from tests.support import compose, processes, secured, servers
from tests.support.secured import SecuredServer
from tests.support.waiting import wait_until

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
OURS = ("migrate", "flusher", "worker", "web")
SERVICES = {*OURS, "redis", "postgres", "prometheus", "grafana"}


def _new_secrets() -> dict[str, str]:
    """What a person's .env holds: the output of the script that the page tells them to run."""
    made = secured.shell(REPOSITORY / "config" / "compose-env.sh", "-")
    assert made.returncode == 0, made.stderr
    return _secrets_in(made.stdout)


def _secrets_in(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if not line.startswith("#"))


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    return _new_secrets()


@pytest.fixture(scope="module")
def services(variables: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = compose.configured(variables)["services"]
    return found


# --- the compose file --------------------------------------------------------------------------------------------------


def test_all_services_are_there(services: dict[str, Any]) -> None:
    assert set(services) == SERVICES
    assert services["flusher"]["deploy"]["replicas"] == 2


def test_compose_reads_it_as_we_do(variables: dict[str, str], services: dict[str, Any]) -> None:
    """With the compose plugin its own reading is compared; without it ours is all there is, and the rest of this file."""
    found = compose.configured_by_compose(variables)["services"] if compose.has_compose() else services
    assert set(found) == set(services)
    for name, service in services.items():
        assert found[name].get("environment", {}) == service.get("environment", {})
        assert found[name]["healthcheck"].get("test") == service["healthcheck"].get("test")


def test_the_secrets_are_in_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    """Whatever the umask is. It is made beside the compose file, wherever the script is called from, and never again over one
    that is there; another name may be given."""
    script = tmp_path / "config" / "compose-env.sh"
    script.parent.mkdir()
    shutil.copy(REPOSITORY / "config" / "compose-env.sh", script)
    for arguments, file in (((), tmp_path / ".env"), ((str(tmp_path / "other"),), tmp_path / "other")):
        before = os.umask(0)
        try:
            made = secured.shell(script, *arguments)
        finally:
            os.umask(before)
        assert (made.returncode, made.stdout) == (0, ""), made.stderr
        assert file.stat().st_mode & 0o777 == 0o600
        text = file.read_text()
        found = _secrets_in(text)
        assert (found.keys(), len({*found.values()})) == (_new_secrets().keys(), len(found))
        again = secured.shell(script, *arguments)
        assert again.returncode == 1
        assert f"{file.name} is there already, and is left as it is" in again.stderr
        assert file.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", "config", "other"]
    assert secured.shell(script, str(tmp_path / "nowhere" / ".env")).returncode != 0


@pytest.mark.parametrize("name", sorted(_new_secrets()))
def test_without_a_secret_nothing_starts(variables: dict[str, str], name: str) -> None:
    """Each is needed, and who has none is told what to run."""
    for given in ({}, {name: ""}):
        left = {**{key: value for key, value in variables.items() if key != name}, **given}
        with pytest.raises(compose.MissingError, match=re.escape(f"{name}: make it with sh config/compose-env.sh")):
            compose.configured(left)


def test_no_secret_is_in_the_files() -> None:
    """No password in a URL, no value for what is called password, secret or token, no hash of one."""
    files = [
        path for path in (*REPOSITORY.glob("config/**/*"), compose.FILE, REPOSITORY / "Dockerfile") if path.is_file()
    ]
    assert len(files) > 10
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"://[^/\s:@$]*:(?!\$\{)[^/\s@]+@", text), path
        assert not re.search(r"#[0-9a-f]{64}|user .* >", text), path
        assert not re.search(r"""(?im)^[^#\n]*(password|secret|token)["']?\s*[:=]\s*["']?[A-Za-z0-9]""", text), path


def test_new_secrets_are_long_and_different() -> None:
    one, other = _new_secrets(), _new_secrets()
    values = [*one.values(), *other.values()]
    assert len(set(values)) == len(values)
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in values)  # nothing that a URL would want escaped


def test_every_variable_of_ours_is_a_setting(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by name, and accepted with that value."""
    for name in OURS:
        given = services[name]["environment"]
        assert all(variable.startswith("STATECACHE_") for variable in given)
        with monkeypatch.context() as patch:
            for variable, value in given.items():
                patch.setenv(variable, value)
            Settings()


def test_what_is_mounted_exists(services: dict[str, Any]) -> None:
    named = compose.raw()["volumes"]
    for service in services.values():
        for mount in service.get("volumes", []):
            source, *rest = mount.split(":")
            if source.startswith("."):
                assert (REPOSITORY / source).exists(), mount
                assert rest[-1] == "ro", mount
            else:
                assert source in named, mount


def test_only_loopback_is_published(services: dict[str, Any]) -> None:
    published = {port for service in services.values() for port in service.get("ports", [])}
    assert {port.split(":")[0] for port in published} == {"127.0.0.1"}
    assert not {"ports"} & (services["redis"].keys() | services["postgres"].keys())
    networks = compose.raw()["networks"]
    assert networks["store"] == {"internal": True}
    for name in ("redis", "postgres"):
        assert services[name]["networks"] == ["store"]


def test_what_waits_for_what(services: dict[str, Any]) -> None:
    """The tables are made once, before any of ours starts; a store by a flusher, before anybody reads it."""
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in ("flusher", "worker", "web"):
        waits = services[name]["depends_on"]
        assert waits["migrate"] == {"condition": "service_completed_successfully"}
        assert waits["redis"] == {"condition": "service_healthy"}
    assert services["web"]["depends_on"]["flusher"] == {"condition": "service_healthy"}


def test_each_goes_on_and_is_looked_after(services: dict[str, Any]) -> None:
    for name, service in services.items():
        once = name == "migrate"
        assert service["restart"] == ("no" if once else "unless-stopped"), name
        assert service["healthcheck"].get("disable", False) is once, name
        assert service["deploy"]["resources"]["limits"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "build" in service or re.fullmatch(r"[a-z/-]+:v?[0-9]+[0-9.]*(-[a-z]+)?", service["image"]), name
    drain = Settings.model_fields["drain_timeout_seconds"].default
    assert int(services["flusher"]["stop_grace_period"].removesuffix("s")) > drain


def test_prometheus_finds_the_processes(services: dict[str, Any]) -> None:
    """Its targets are services of the compose file, at the port where these serve their metrics, and in a network with it."""
    text = (REPOSITORY / "config" / "prometheus" / "compose.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert job["job_name"] == "statecache"  # as the alerts and the dashboard expect
    assert "--config.file=/etc/prometheus/compose.yml" in services["prometheus"]["command"]
    for name in found["names"]:
        service = services[name]
        assert service["environment"]["STATECACHE_METRICS_PORT"] == str(found["port"])
        assert service["environment"]["STATECACHE_METRICS_ADDRESS"] == "0.0.0.0"
        assert service["expose"] == [str(found["port"])]
        assert {*service["networks"]} & {*services["prometheus"]["networks"]}


def test_grafana_finds_its_dashboards(services: dict[str, Any]) -> None:
    grafana = services["grafana"]
    places = {mount.split(":")[1]: mount.split(":")[0] for mount in grafana["volumes"]}
    provisioning = REPOSITORY / places["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "statecache.yaml").read_text())["providers"]
    assert list((REPOSITORY / places[provider["options"]["path"]]).glob("*.json"))
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "${PROMETHEUS_URL}"
    assert grafana["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
    assert {*grafana["networks"]} & {*services["prometheus"]["networks"]}


# --- the image ---------------------------------------------------------------------------------------------------------


def _instructions() -> list[tuple[str, str]]:
    lines = re.sub(r"(?m)^#.*\n", "", DOCKERFILE).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def test_the_image_runs_as_nobody_in_particular() -> None:
    instructions = _instructions()
    names = [word for word, _ in instructions]
    last_stage = instructions[len(names) - 1 - names[::-1].index("FROM") :]
    user = [rest for word, rest in last_stage if word == "USER"]
    assert user == ["10001:10001"]
    after_user = last_stage[[word for word, _ in last_stage].index("USER") :]
    assert not [rest for word, rest in after_user if word in ("RUN", "COPY", "ADD")]
    assert {word for word, _ in last_stage} >= {"ENTRYPOINT", "CMD", "HEALTHCHECK"}


def test_the_image_is_built_from_named_versions_and_holds_no_tools() -> None:
    instructions = _instructions()
    bases = [rest.split()[0] for word, rest in instructions if word == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:[0-9]+\.[0-9]+-slim-[a-z]+", base) for base in bases)
    assert not [rest for word, rest in instructions if word == "ADD" or "apt-get" in rest]
    copied = [rest for word, rest in instructions if word == "COPY"]
    assert copied[-1] == "--from=build /opt/statecache /opt/statecache"


def test_all_that_the_wheel_is_made_of_is_copied_and_nothing_else() -> None:
    """Also past ``.dockerignore``, which lets nothing through that is not named there."""
    copied = {
        source
        for word, rest in _instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {
        "pyproject.toml", project["project"]["readme"], *project["project"]["license-files"],
        *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],
    }  # fmt: skip
    assert copied == needed
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert next(line for line in ignored if not line.startswith("#")) == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == needed
    assert ".env" in (REPOSITORY / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_the_source_distribution_has_what_is_deployed_with() -> None:
    """And what these tests read: they are in it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"/Dockerfile", "/docker-compose.yml", "/.dockerignore", "/config"} <= set(included)


# --- the same as plain processes ---------------------------------------------------------------------------------------


class Deployment:
    """The services of the compose file on servers that run here."""

    def __init__(self, redis: SecuredServer, database_url: str, services: dict[str, Any], folder: Path) -> None:
        self.redis, self.database_url, self.services, self.folder = redis, database_url, services, folder
        self.running: list[processes.Process] = []

    def environment(self, name: str) -> dict[str, str]:
        """A service's environment with addresses of this machine, and free ports."""
        given: dict[str, str] = dict(self.services[name]["environment"])
        for variable, value in given.items():
            given[variable] = value.replace("@redis:6379/", f"@127.0.0.1:{self.redis.port}/")
            if value.startswith("postgresql"):
                given[variable] = self.database_url
            if variable.endswith("_ADDRESS"):  # the web keeps its address: on any but loopback it asks for the token
                given[variable] = "127.0.0.1"
            elif variable.endswith("_PORT"):
                given[variable] = str(processes.free_port())
        return environment(PYTHONUNBUFFERED="1", **given)

    def start(self, name: str) -> Service:
        service = Service(self, name, f"{name}-{len(self.running)}")
        self.running.append(service)
        return service

    def close(self) -> None:
        for process in self.running:
            if process.alive:
                process.end(signal.SIGTERM, signal.SIGKILL, timeout_seconds=40)


class Service(processes.Process):
    """One of ours, with its service's command."""

    def __init__(self, deployment: Deployment, name: str, log: str) -> None:
        self.environment = deployment.environment(name)
        self.log = deployment.folder / f"{log}.log"
        command = [sys.executable, "-m", "statecache", *deployment.services[name]["command"]]
        self._test = deployment.services[name]["healthcheck"]["test"]
        super().__init__(command, self.log, cwd=REPOSITORY, env=self.environment)

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")

    @property
    def url(self) -> str:
        port = self.environment.get("STATECACHE_WEB_PORT") or self.environment["STATECACHE_METRICS_PORT"]
        return f"http://127.0.0.1:{port}"

    def is_healthy(self) -> bool:
        """Run the service's own health check, with the port that it has here."""
        assert self.alive, self.printed
        word, program, option, code = self._test
        assert (word, program, option) == ("CMD", "python", "-c")
        here = re.sub(r"http://127\.0\.0\.1:[0-9]+", self.url, code)
        return subprocess.run([sys.executable, "-c", here], capture_output=True, check=False).returncode == 0


@pytest.fixture
def deployment(
    redis_binary: Path, private_postgres: servers.PostgresServer, variables: dict[str, str], tmp_path: Path,
    services: dict[str, Any],
) -> Iterator[Deployment]:  # fmt: skip
    passwords = {secured.variable(role): variables[secured.variable(role)] for role in secured.ROLES}
    with SecuredServer(redis_binary, tmp_path / "redis", passwords) as redis:
        made = Deployment(redis, private_postgres.url(private_postgres.create_database()), services, tmp_path)
        yield made
        made.close()


@pytest.mark.postgres
def test_the_deployment_as_plain_processes(deployment: Deployment) -> None:
    """The tables, two flushers, a worker and the web, each as its user; a client writes; Redis is killed and comes back."""
    migrated = run(*deployment.services["migrate"]["command"], env=deployment.environment("migrate"))
    assert migrated.code == 0, migrated.err
    flushers = [deployment.start("flusher"), deployment.start("flusher")]
    for flusher in flushers:
        wait_until(flusher.is_healthy, "a flusher is healthy", 90, 0.5)
    worker, web = deployment.start("worker"), deployment.start("web")
    for service in (worker, web):
        wait_until(service.is_healthy, "the worker and the web are healthy", 90, 0.5)

    with StateCache.connect(deployment.redis.url_of("client"), deployment.database_url) as client:
        orders = client.machine(StateMachine.load(REPOSITORY / "config" / "machines" / "order.yaml"))
        orders.start_many([f"o{number}" for number in range(100)])
        orders.transition_many([Move(f"o{number}", "pay") for number in range(100)])
        assert orders.transition("o1", "ship", durability="durable", timeout=30).version == 3
        deployment.redis.kill()
        deployment.redis.start()
        orders.transition("o2", "ship", durability="durable", timeout=60)

    _is_seen(deployment, flushers[0], worker, web)
    for service in deployment.running[::-1]:
        service.end(signal.SIGTERM, timeout_seconds=60)
    place = ["--redis-url", deployment.redis.url_of("ops"), "--database-url", deployment.database_url]
    verified = run("verify", "--json", *place)
    assert (verified.code, verified.document["transitions"]) == (0, 202), verified.out
    assert not deployment.redis.refusals()


def _is_seen(deployment: Deployment, flusher: Service, worker: Service, web: Service) -> None:
    for one in (flusher, worker):  # the first look after a restart finds its connection closed
        wait_until(
            lambda one=one: (
                'statecache_store_reachable{store="redis"} 1.0'  # type: ignore[misc]
                in httpx.get(f"{one.url}/metrics", timeout=30).text
            ),
            "the gauges of the store",
            60,
            0.5,
        )
    logged = [json.loads(line) for line in flusher.printed.splitlines()]
    assert "flushing as" in " ".join(line["message"] for line in logged)
    bearer = {"Authorization": f"Bearer {web.environment['STATECACHE_WEB_TOKEN']}"}
    assert httpx.get(f"{web.url}/api/v1/where?id=o1", timeout=30).status_code == 401
    found = httpx.get(f"{web.url}/api/v1/where?id=o1", headers=bearer, timeout=30)
    assert "shipped" in found.text, found.text
    assert httpx.get(f"{web.url}/readyz", headers=bearer, timeout=30).status_code == 200
    jobs = ["--database-url", deployment.database_url, "--redis-url", deployment.redis.url_of("ops")]
    asked = run(
        "jobs", "run", "verify", "--wait", "60", "--json", *jobs,
        env={"STATECACHE_RQ_REDIS_URL": deployment.redis.url_of("jobs", 1)},
    )  # fmt: skip
    assert (asked.code, asked.document["status"]) == (0, "finished"), asked.out


def test_the_start_script_makes_the_users_and_becomes_the_server(
    variables: dict[str, str], services: dict[str, Any], tmp_path: Path, redis_binary: Path
) -> None:
    """The container's command line, with a program in the place of the server that says what it was given."""
    redis = services["redis"]
    assert redis["entrypoint"] == ["sh", "/etc/statecache/start.sh"]
    folder = tmp_path / "config"
    folder.mkdir()
    for name in ("start.sh", "users.sh", "users.acl", "redis.conf"):
        text = (REPOSITORY / "config" / "redis" / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("/run/statecache", str(tmp_path)), encoding="utf-8")
    (tmp_path / "bin").mkdir()
    server = tmp_path / "bin" / "valkey-server"
    server.write_text(f'#!/bin/sh\necho "$@"\nexec {shlex.quote(str(redis_binary))} --version\n')
    server.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.defpath}"
    done = secured.shell(folder / "start.sh", *redis["command"], **{"PATH": path, **redis["environment"]})
    assert done.returncode == 0, done.stderr
    given = done.stdout.splitlines()[0]
    assert given == f"{folder}/redis.conf --bind * --dir /data --aclfile {tmp_path}/users.acl --maxmemory 1gb"
    written = tmp_path / "users.acl"
    assert written.stat().st_mode & 0o077 == 0
    assert written.read_text() == secured.users(redis["environment"]).stdout
