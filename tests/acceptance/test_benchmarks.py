"""Every row of the benchmarks runs, in its smallest form, and leaves JSON of its shape. Its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from benchmarks import harness, report
from tests.acceptance import command

SAMPLES = {"type": "array", "items": {"type": "number"}}
TARGET = {
    "type": "object",
    "required": ["of", "op", "limit", "value", "met"],
    "properties": {"of": {"enum": ["own", "ratio"]}, "op": {"enum": ["<=", ">="]}, "met": {"type": "boolean"}},
}
MEASURE = {
    "type": "object",
    "required": ["name", "unit", "own", "peer_name", "peer", "ratio", "targets"],
    "properties": {
        "own": {**SAMPLES, "minItems": 1}, "peer": SAMPLES, "ratio": SAMPLES,
        "targets": {"type": "array", "items": TARGET},
    },
}  # fmt: skip
RUN = {
    "type": "object",
    "required": ["format", "started", "scale", "seconds", "machine", "rows"],
    "properties": {
        "scale": {"enum": list(harness.SCALES)},
        "machine": {
            "type": "object",
            "required": ["cpu", "cores", "kernel", "python", "server", "postgresql", "packages"],
        },
        "rows": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "title", "note", "seconds", "error", "measures"],
                "properties": {
                    "note": {"type": "string", "minLength": 1},
                    "error": {"const": ""},
                    "measures": {"type": "array", "items": MEASURE, "minItems": 1},
                },
            },
        },
    },
}


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.timeout(600)
@pytest.mark.parametrize("theme", harness.THEMES)
def test_every_row_runs_in_small(theme: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    words = ["--quick", "--only", f"^{theme}[.]", "--output", str(path), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        capture_output=True, text=True, cwd=command.REPOSITORY, env=command.environment(), timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document == report.read(path)
    jsonschema.validate(document, RUN)
    assert [one["name"] for one in document["rows"]] == [one.name for one in harness.rows(f"^{theme}[.]")]
    for one in document["rows"]:
        for measure in one["measures"]:
            assert len(measure["peer"]) in (0, len(measure["own"])), (one["name"], measure["name"])
    assert report.render(document).count("| `") == len(document["rows"])
