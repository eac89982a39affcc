"""Where a Redis is, as text that may be kept and shown: never a user or a password."""

from __future__ import annotations

import ipaddress
from typing import Any


def of(pool: Any) -> str | None:
    """``host:port/db``, or ``/path/of/socket?db=n``, of a pool of redis-py's; None where it tells neither."""
    told = pool.connection_kwargs
    database = told.get("db") or 0
    if told.get("path"):
        return f"{told['path']}?db={database}"
    host = str(told.get("host") or "localhost").lower()
    return f"{f'[{host}]' if ':' in host else host}:{told.get('port') or 6379}/{database}"


def is_local(text: str) -> bool:
    """Whether it means another server on another machine: a socket, or an address of the loopback interface."""
    if text.startswith("/"):
        return True
    host = text.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
