"""``docker-compose.yml`` as compose reads it: anchors, merges and variables resolved, checked against a schema.

The schema is ours: of the Compose Specification what the file uses, and nothing beside it, so a misspelt key is found without
compose. Where the compose plugin is installed it is asked as well (``configured_by_compose``), and must say the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

REPOSITORY = Path(__file__).parents[2]
FILE = REPOSITORY / "docker-compose.yml"
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>[A-Z_]+)(?:(?P<kind>:-|:\?)(?P<text>[^}]*))?\})")


class MissingError(Exception):
    """A variable that compose would refuse to do without; the message is the file's."""


def _interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _interpolated(one, variables) for key, one in value.items()}
    if isinstance(value, list):
        return [_interpolated(one, variables) for one in value]
    if not isinstance(value, str):
        return value

    def text_of(match: re.Match[str]) -> str:
        name, kind, text = match.group("name", "kind", "text")
        if name is None:
            return "$"
        if given := variables.get(name):
            return given
        if kind == ":-":
            return str(text)
        raise MissingError(f"{name}: {text}")

    return _VARIABLE.sub(text_of, value)


def raw() -> dict[str, Any]:
    """The file with its anchors resolved, variables as they stand there."""
    document: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {key: value for key, value in document.items() if not key.startswith("x-")}


def configured(variables: Mapping[str, str]) -> dict[str, Any]:
    """The file as it is in force with these variables. Raises ``MissingError``, ``jsonschema.ValidationError``."""
    document: dict[str, Any] = _interpolated(raw(), variables)
    jsonschema.validate(document, SCHEMA)
    return document


def has_compose() -> bool:
    """Whether this machine's docker client knows compose; no engine is needed."""
    try:
        return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def configured_by_compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """The services as compose itself reads them."""
    done = subprocess.run(
        ["docker", "compose", "--file", str(FILE), "config", "--format", "json"],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **variables},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if done.returncode:
        raise MissingError(done.stderr)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


_TEXT, _TEXTS, _FLAG = {"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "boolean"}
_SECONDS = {"type": "string", "pattern": r"^[0-9]+s$"}


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(required), "additionalProperties": False,
    }  # fmt: skip


def _named(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": of}


_SERVICE = _closed(
    {
        "image": _TEXT, "build": _TEXT, "user": _TEXT, "entrypoint": _TEXTS, "command": _TEXTS, "init": _FLAG,
        "environment": _named(_TEXT), "expose": _TEXTS, "read_only": _FLAG, "cap_drop": _TEXTS,
        "tmpfs": _TEXTS, "networks": _TEXTS, "security_opt": _TEXTS, "shm_size": _TEXT, "stop_grace_period": _SECONDS,
        "volumes": {"type": "array", "items": {"type": "string", "pattern": "^[^:]+:/[^:]*(:ro)?$"}},
        "ports": {"type": "array", "items": {"type": "string", "pattern": r"^[0-9.]+:[0-9]+:[0-9]+$"}},
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "logging": _closed({"driver": _TEXT, "options": _named(_TEXT)}, "driver"),
        "depends_on": _named(
            _closed({"condition": {"enum": ["service_healthy", "service_started", "service_completed_successfully"]}})
        ),
        "healthcheck": {
            "oneOf": [
                _closed({"disable": {"const": True}}, "disable"),
                _closed(
                    {
                        "test": {**_TEXTS, "contains": {"enum": ["CMD", "CMD-SHELL"]}}, "interval": _SECONDS,
                        "timeout": _SECONDS, "retries": {"type": "integer"}, "start_period": _SECONDS,
                    },
                    "test", "interval", "timeout", "retries",
                ),
            ]
        },
        "deploy": _closed(
            {
                "replicas": {"type": "integer"},
                "resources": _closed({"limits": _closed({"cpus": _TEXT, "memory": _TEXT}, "cpus", "memory")}, "limits"),
            },
            "resources",
        ),
    },
    "image", "networks", "healthcheck", "deploy", "restart", "security_opt",
)  # fmt: skip
SCHEMA = _closed(
    {
        "name": _TEXT,
        "services": _named(_SERVICE),
        "volumes": _named({"type": "null"}),
        "networks": _named({"oneOf": [{"type": "null"}, _closed({"internal": _FLAG})]}),
    },
    "name", "services", "volumes", "networks",
)  # fmt: skip
