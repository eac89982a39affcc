"""The OpenAPI document against the real thing: schemathesis makes up requests from it, good ones and bad ones.

No request may be answered with 500, with a status that the document does not name, or with a body of another shape.
"""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support import webs, worlds


@pytest.fixture(scope="module")
def web(redis_server: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webs.Served]:
    database = tmp_path_factory.mktemp("openapi") / "statecache.db"
    url: str = redis_server.url  # type: ignore[attr-defined]
    with worlds.World(url, f"sqlite:///{database}", "openapi", call_timeout_seconds=0.3) as world:
        world.start("0", ["pay"], amount=1)
        world.flush()
        with webs.serving(world, webs.ACTING) as served:
            yield served


OPERATIONS = [
    "GET /api/v1/where", "GET /api/v1/instances/{machine}", "GET /api/v1/history/{machine}",
    "POST /api/v1/instances/{machine}", "POST /api/v1/transitions/{machine}", "GET /api/v1/machines",
    "GET /api/v1/machines/{machine}", "GET /api/v1/counts/{machine}", "GET /api/v1/find/{machine}", "GET /api/v1/health",
    "GET /healthz", "GET /readyz", "GET /metrics",
]  # fmt: skip


def test_every_operation_is_tried(web: webs.Served) -> None:
    paths = web.get("/api/v1/openapi.json").json()["paths"]
    named = {f"{method.upper()} {path}" for path, operations in paths.items() for method in operations}
    assert named == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_500_and_nothing_undocumented(web: webs.Served, operation: str) -> None:
    schema = schemathesis.openapi.from_url(f"{web.url}/api/v1/openapi.json")
    method, path = operation.split(" ")
    one = schema[path][method]

    @hypothesis.settings(
        max_examples=40, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=one.as_strategy())
    def tried(case: schemathesis.Case) -> None:
        if "machine" in (case.path_parameters or {}) and len(str(case.body)) % 3:
            case.path_parameters["machine"] = "order"  # most that is made up is no machine: see behind the door too
        answer = case.call(headers=web.bearer)
        assert answer.status_code != 500, answer.text
        case.validate_response(
            answer,
            checks=[status_code_conformance, content_type_conformance, response_schema_conformance],
        )

    tried()
