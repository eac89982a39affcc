"""The programs of docs/examples do what they say."""

from __future__ import annotations

import asyncio
import csv
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from statecache import StateCache
from tests.support import processes, servers
from tests.support.waiting import wait_until

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


STRICTLY = ("-X", "dev", "-W", "error")
"""Python's development mode: what is not closed is told, and asyncio looks at what is not awaited; any warning is an error."""


def complaints(output: str) -> list[str]:
    """Lines that tell of a warning, or of an error that nobody took. That something was slow is no complaint."""
    words = ("Warning", "Traceback", "never retrieved", "never awaited", "Exception ignored", "was destroyed")
    return [line for line in output.splitlines() if any(word in line for word in words)]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def environment(redis_url: str, sqlite_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Where the example works, told as an operator tells it."""
    told = {
        "STATECACHE_REDIS_URL": redis_url, "STATECACHE_DATABASE_URL": sqlite_url, "STATECACHE_NAMESPACE": namespace,
    }  # fmt: skip
    for name, text in told.items():
        monkeypatch.setenv(name, text)
    return told


def test_tests_of_ones_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/run"]
    done = subprocess.run(
        [*command, EXAMPLES / "test_orders.py"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_fastapi_app(environment: dict[str, str]) -> None:
    """A life over HTTP, and a status code for each kind of error; forty requests at once."""
    module = example("fastapi_app")

    async def main() -> None:
        transport = httpx.ASGITransport(app=module.app)
        async with (
            module.lifespan(module.app),
            httpx.AsyncClient(transport=transport, base_url="http://orders") as http,
        ):
            assert (await http.put("/orders/1", json={"amount": 5})).status_code == 201
            assert (await http.put("/orders/1", json={})).status_code == 409
            key, card = {"Idempotency-Key": "k1"}, {"data": {"method": "card"}}
            receipts = [(await http.post("/orders/1/pay", headers=key, json=card)).json() for _ in range(2)]
            assert [one.pop("duplicate") for one in receipts] == [False, True]
            assert receipts[0] == receipts[1] == {"id": "1", "state": "paid", "version": 2}
            for path, body, status in (
                ("1/pay", {}, 409), ("1/ship", {"expect_version": 9}, 412), ("2/pay", {}, 404),
                ("1/ship", {"data": {"no good": 1}}, 422),
            ):  # fmt: skip
                assert (await http.post(f"/orders/{path}", json=body)).status_code == status
            assert (await http.get("/orders/1")).json()["data"] == {"amount": 5, "method": "card"}
            assert (await http.get("/orders/2")).json()["error"] == "NotFoundError"
            many = await asyncio.gather(*[http.put(f"/orders/m{number}", json={}) for number in range(40)])
            assert {one.status_code for one in many} == {201}

    asyncio.run(main())


def test_fastapi_app_behind_its_server_complains_of_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    """Served by uvicorn with every warning an error: forty requests at once, then SIGTERM ends it, with nothing left open."""
    port = processes.free_port()
    command = [
        sys.executable, *STRICTLY, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "--port", str(port), "fastapi_app:app",
    ]  # fmt: skip
    log = tmp_path / "uvicorn.log"
    server = processes.Process(command, log, env={**os.environ, **environment, "PYTHONPATH": str(EXAMPLES.parents[1])})
    try:
        wait_until(lambda: b"startup complete" in log.read_bytes(), "uvicorn to start", 60.0)

        async def main() -> set[int]:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
                many = await asyncio.gather(*[http.put(f"/orders/{number}", json={}) for number in range(40)])
                return {one.status_code for one in many}

        assert asyncio.run(main()) == {201}
    finally:
        server.end(signal.SIGTERM)
    told = log.read_text()
    assert "Application shutdown complete" in told
    assert complaints(told) == []


def test_consumer_goes_on_after_it_was_killed(
    environment: dict[str, str], redis_server: servers.ValkeyServer, tmp_path: Path
) -> None:
    """It is killed when it has applied some of 2,000 scans; a second run applies the rest, a third nothing; every parcel has
    each of its scans once."""
    scans = tmp_path / "parcels.csv"
    with scans.open("w", newline="") as lines:
        csv.writer(lines).writerows(
            (f"p{number}", event) for event in ("post", "sort", "take", "deliver") for number in range(500)
        )
    command = [sys.executable, str(EXAMPLES / "consumer.py"), str(scans)]
    told = {**os.environ, **environment, "PYTHONPATH": str(EXAMPLES.parents[1])}
    first = processes.Process(command, tmp_path / "first.log", env=told)
    pattern = f"{{{environment['STATECACHE_NAMESPACE']}:*}}:i:parcel:*"
    try:
        with redis_server.client() as client:
            wait_until(lambda: len(client.keys(pattern)) > 20, "the consumer to work", 60.0, 0.001)
    finally:
        first.end(signal.SIGKILL)
    strictly = [command[0], *STRICTLY, *command[1:]]
    runs = [subprocess.run(one, env=told, capture_output=True, text=True, check=True) for one in (command, strictly)]
    outputs = [run.stdout for run in runs]
    assert complaints(runs[1].stderr) == []
    assert outputs[1] == "0 scans applied, 2000 had been applied before\n"
    now = int(outputs[0].split(" ")[0])
    assert 0 < now < 2000
    with StateCache.connect() as cache:
        parcels = cache.machine("parcel")
        assert parcels.counts() == {"delivered": 500}
        assert [row.event for row in parcels.history("p499")] == ["@start", "sort", "take", "deliver"]


def test_rq_pipeline_wants_servers_that_worker_and_jobs_share(tmp_path: Path) -> None:
    """Without settings it would begin the order in a folder's own store, and enqueue elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STATECACHE_")}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "rq_pipeline.py", "start", "1001"], cwd=tmp_path, capture_output=True, text=True,
        env={**kept, "PYTHONPATH": str(EXAMPLES.parents[1])}, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "set STATECACHE_REDIS_URL and STATECACHE_DATABASE_URL first" in done.stderr
    assert not list(tmp_path.iterdir())
