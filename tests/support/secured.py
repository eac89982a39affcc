"""A server with the configuration files of the deployment: ``config/redis/redis.conf`` and the users of ``users.acl``.

``url("client")`` is the store's address for a role. Tests look at it as a user of their own, ``judge``, who may do anything.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from pathlib import Path
from typing import Any

import redis

from tests.support import servers

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "config" / "redis"
ROLES = ("client", "flusher", "worker", "reader", "ops", "metrics", "jobs")


def variable(role: str) -> str:
    """The environment variable with a role's password, as ``users.acl`` names it."""
    return f"REDIS_{role.upper()}_PASSWORD"


def passwords() -> dict[str, str]:
    """New passwords, by environment variable."""
    return {variable(role): secrets.token_hex(24) for role in ROLES}


def shell(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one of our shell scripts with these variables and the system's commands, whatever this process' PATH holds."""
    environment = {"PATH": os.defpath, **variables}
    command = ["/bin/sh", str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)


def users(variables: dict[str, str], template: Path = CONFIG / "users.acl") -> subprocess.CompletedProcess[str]:
    """Run ``users.sh``."""
    return shell(CONFIG / "users.sh", str(template), **variables)


class SecuredServer(servers.ValkeyServer):
    """The server as it is deployed, on loopback."""

    def __init__(self, binary: Path, folder: Path, variables: dict[str, str], namespace: str = "statecache") -> None:
        self.variables = variables
        self._judge = secrets.token_hex(24)
        made = users({**variables, "STATECACHE_NAMESPACE": namespace})
        assert made.returncode == 0, made.stderr
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "users.acl"
        file.write_text(f"{made.stdout}user judge on >{self._judge} ~* &* +@all\n")
        super().__init__(binary, folder, {"include": str(CONFIG / "redis.conf"), "aclfile": str(file)})

    def client(self, **options: Any) -> redis.Redis:
        return super().client(**{"username": "judge", "password": self._judge, **options})

    def role(self, role: str) -> redis.Redis:
        """A bare client with a role's rights."""
        return self.client(username=role, password=self.variables[variable(role)])

    def url_of(self, role: str, database: int = 0) -> str:
        return f"redis://{role}:{self.variables[variable(role)]}@127.0.0.1:{self.port}/{database}"

    def refusals(self) -> list[str]:
        """What the server has refused since the last call, and to whom."""
        with self.client() as judge:
            found: Any = judge.acl_log()
            judge.acl_log_reset()
        return [f"{one['username']}: {one['reason']} {one['object']} ({one['context']})" for one in found]
