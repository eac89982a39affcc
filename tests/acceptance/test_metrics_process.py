"""``/metrics`` of real processes, judged by promtool; gauges stay true when a process dies."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from statecache import metrics
from tests.acceptance import command
from tests.support import prometheus
from tests.support.waiting import wait_until
from tests.support.worlds import Waiting, World
from tests.unit import test_alerts_and_dashboards

CLIENT = """
import sys
from statecache import StateCache
from tests.support.worlds import Order

redis_url, database_url, namespace = sys.argv[1:]
with StateCache.connect(redis_url, database_url, namespace) as cache:
    orders = cache.machine(Order)
    orders.start("client")
    orders.transition("client", "pay")
    orders.get("client")
    print("port", cache.serve_metrics(0), flush=True)
    sys.stdin.readline()
"""


def scraped(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text: bytes = answer.read()
        return text


def values(port: int, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a metric by the values of their labels."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(scraped(port).decode())
        for sample in family.samples
        if sample.name == f"statecache_{name}"
    }


def port_of(flusher: command.Running) -> int:
    found = wait_until(lambda: re.search(r"metrics at http://127\.0\.0\.1:(\d+)/metrics", flusher.printed), "the port")
    return int(found.group(1))


@pytest.fixture
def world(redis_url: str, postgres_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, postgres_url, namespace) as made:
        yield made


@pytest.fixture
def start_flusher(world: World, tmp_path: Path) -> Iterator[Callable[[], command.Running]]:
    started: list[command.Running] = []

    def start() -> command.Running:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        places = ("--redis-url", world.redis_url, "--database-url", world.database_url, "--namespace", world.namespace)
        started.append(command.Running(folder, "flusher", *places, "--metrics-port", 0))
        return started[-1]

    yield start
    for flusher in started:
        flusher.end(signal.SIGTERM, signal.SIGKILL)


@pytest.mark.needs("promtool")
def test_promtool_is_content_with_a_flusher(world: World, start_flusher: Callable[[], command.Running]) -> None:
    port = port_of(start_flusher())
    world.start("1", ["pay", "ship"])
    wait_until(lambda: values(port, "flushed_transitions_total").get(()) == 3, "all is flushed")
    prometheus.promtool("check", "metrics", stdin=scraped(port))
    assert values(port, "ready") == {(): 1}


@pytest.mark.needs("promtool")
def test_promtool_is_content_with_a_client(world: World) -> None:
    words = [sys.executable, "-c", CLIENT, world.redis_url, world.database_url, world.namespace]
    environment = command.environment(PYTHONPATH=str(command.REPOSITORY))
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=command.REPOSITORY, env=environment
    ) as client:
        assert client.stdout is not None
        port = int(client.stdout.readline().removeprefix("port "))
        prometheus.promtool("check", "metrics", stdin=scraped(port))
        assert values(port, "transitions_total")["pay", "order", "ok"] == 1
        assert sum(values(port, "backlog_entries").values()) == 2
        client.communicate("end\n", timeout=60)
    assert client.returncode == 0


def test_gauges_stay_true_when_a_flusher_is_killed(world: World, start_flusher: Callable[[], command.Running]) -> None:
    """Two flushers; both show the store's gauges. One is killed, then the other: what the first showed is nowhere any more,
    and a third process, begun later, tells the lag of what nobody flushes."""
    first, second = start_flusher(), start_flusher()
    ports = [port_of(first), port_of(second)]
    world.start("1", ["pay"])
    for port in ports:
        wait_until(lambda port=port: values(port, "instances").get(("order", "paid")) == 1, "both see it in SQL")  # type: ignore[misc]
    first.end(signal.SIGKILL)
    world.orders.transition("1", "ship")
    wait_until(lambda: values(ports[1], "instances").get(("order", "shipped")) == 1, "the other one goes on")
    assert set(values(ports[1], "flush_lag_seconds").values()) == {0.0}
    second.end(signal.SIGKILL)
    world.orders.transition("1", "deliver")
    port = world.cache.serve_metrics(0)
    assert sum(values(port, "backlog_entries").values()) == 1
    assert max(values(port, "flush_lag_seconds").values()) > 0


@pytest.mark.needs("prometheus")
def test_every_query_runs_in_a_real_prometheus(
    world: World, start_flusher: Callable[[], command.Running], tmp_path: Path
) -> None:
    """A real Prometheus scrapes a live flusher: every query of dashboards and alerts is run, and the rules are evaluated."""
    port = port_of(start_flusher())
    world.start("1", ["pay"])
    world.cache.machine(Waiting)
    rules = test_alerts_and_dashboards.CONFIG / "alerts.yml"
    judge = prometheus.PrometheusServer(tmp_path / "prometheus", [port], rules)
    try:
        wait_until(judge.answers, "Prometheus is up", 60)
        wait_until(lambda: judge.query("statecache_stuck_instances"), "the flusher is scraped", 60)
        for _, query in test_alerts_and_dashboards.QUERIES:
            if query.startswith("label_values("):
                assert judge.ask("label/job/values", **{"match[]": "statecache_store_reachable"}) == ["statecache"]
                continue
            for name, value in (("$__rate_interval", "1m"), ("$__range", "1h"), ("$job", "statecache")):
                query = query.replace(name, value)
            judge.query(query)
        for name, family in metrics.STORE.items():
            assert family.kind != metrics.GAUGE or judge.query(name), name
        evaluated = lambda: all(  # noqa: E731
            rule["health"] == "ok" for group in judge.ask("rules")["groups"] for rule in group["rules"]
        )
        wait_until(evaluated, "all rules have been evaluated", 60)
        firing = {alert["labels"]["alertname"] for alert in judge.ask("alerts")["alerts"] if alert["state"] == "firing"}
        assert firing == set()
    finally:
        judge.end()


def test_a_taken_port_is_told(world: World, tmp_path: Path) -> None:
    port = world.cache.serve_metrics(0)
    done = command.run(
        "flusher", "--redis-url", world.redis_url, "--database-url", world.database_url, "--namespace", world.namespace,
        "--metrics-port", port,
    )  # fmt: skip
    assert done.code == 3
    assert f"metrics cannot be served at 127.0.0.1, port {port}" in done.err
