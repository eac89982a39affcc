"""Prometheus' own programs, as judges: ``promtool`` and a real server (the Debian package ``prometheus``)."""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support import processes, programs

TIMEOUT_SECONDS = 60.0


def promtool(*arguments: object, stdin: bytes | None = None, cwd: Path | None = None) -> None:
    """Run promtool; fail with what it says unless it is content."""
    done = subprocess.run(
        [programs.path("promtool"), *map(str, arguments)],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()


class PrometheusServer:
    """A real Prometheus that scrapes some ports every second, as the job ``statecache``, and evaluates rules."""

    def __init__(self, folder: Path, ports: Sequence[int], rules: Path) -> None:
        self.port = processes.free_port()
        targets = [f"127.0.0.1:{port}" for port in ports]
        settings = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [
                {"job_name": "statecache", "static_configs": [{"targets": targets, "labels": {"role": "flusher"}}]}
            ],
        }
        folder.mkdir()
        config = folder / "prometheus.yml"
        config.write_text(yaml.safe_dump(settings))
        words = [
            programs.path("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn",
        ]  # fmt: skip
        self._log = folder / "prometheus.log"
        self._process = processes.Process(words, self._log)

    def ask(self, path: str, **parameters: str) -> Any:
        """A question to its API: the ``data`` of the answer. Fails with what it says is wrong."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        assert found["status"] == "success", (parameters, found)
        assert not found.get("warnings"), (parameters, found)
        return found["data"]

    def query(self, expression: str) -> list[Any]:
        """The series that an expression yields now."""
        found: list[Any] = self.ask("query", query=expression)["result"]
        return found

    def answers(self) -> bool:
        """Whether it is up."""
        assert self._process.alive, self._log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=30):
                return True
        except OSError:
            return False

    def end(self) -> None:
        self._process.end(signal.SIGTERM, signal.SIGKILL)
