"""The Lua scripts: loading, stamping, and the contract in their headers.

A script's text is stamped with an epoch and its owner, so its SHA belongs to that epoch: a client of an older epoch calls
scripts that refuse (promise P6), and a server that restarted, was promoted or wiped its script cache knows none of them. That
``NOSCRIPT`` is the signal that the server is not the one that was found true (promise P8), which is why nothing here ever
loads a script by itself: ``hot/store.py`` does, after the identity was compared on the same connection.

``--@include name`` lines are replaced by ``lua/include/name.lua``, each once. Every script starts with ``#!lua``: a real server
then refuses keys of another slot, and refuses the call before its first write when memory is full. An emulated Redis
(fakeredis) knows neither that line nor INFO nor MessagePack.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

import msgspec

from statecache.hot import resp

NAMES = (
    "admit", "apply", "claim", "drop", "due", "evict", "fence", "find", "flushed", "hydrate", "park", "probe", "read", "ready",
    "remind",
)  # fmt: skip
CLIENT_NAMES = ("due", "remind", "evict", "park", "find", "read", "flushed", "claim", "hydrate", "apply")
"""Those that admission loads, in this order: last, what a caller most likely waits for. The others are a recovery's."""
NEEDS_MEMORY = ("apply", "claim", "hydrate")
"""Refused when memory is full. The others read or relieve (flush, evict, recover): refused, they would block the relief."""
READERS = ("admit", "due", "find", "probe", "read")
"""They write nothing, and say so: the server runs them also while it refuses writes (its disk is full, replicas are missing),
when it matters most that the flusher saves what was acknowledged. A replica would too: ``lua/include/identity.lua`` refuses."""
EMULATED = ("identity", "unpacked")
"""Includes with another form for an emulated Redis."""
_INCLUDE = re.compile(r"^--@include (\w+)$", re.MULTILINE)
_CODE = re.compile(r"^-- {1,5}([A-Z]{2,}(?: \| [A-Z]{2,})*)\b", re.MULTILINE)


@cache
def source(name: str) -> str:
    """The text of a script as it stands in the package."""
    return (resources.files("statecache.hot") / "lua" / f"{name}.lua").read_text(encoding="utf-8")


def header(name: str) -> str:
    """The comment at the head of a script."""
    lines = source(name).splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("--") or line.startswith("--@"))
    return "\n".join(lines[:end])


def reply_codes(name: str) -> frozenset[str]:
    """The reply codes that a script's header declares."""
    reply = header(name).partition("Reply")[2]
    reply = "-- " + reply.lstrip()
    return frozenset(code for found in _CODE.findall(reply) for code in found.split(" | "))


@cache
def _expanded(name: str, emulated: bool) -> str:
    seen: set[str] = set()

    def include(found: re.Match[str]) -> str:
        part = found.group(1)
        if part in seen:
            return ""
        seen.add(part)
        if part in EMULATED and emulated:
            part += "_emulated"
        return _INCLUDE.sub(include, source(f"include/{part}"))

    return _INCLUDE.sub(include, source(name))


@dataclass(frozen=True, slots=True)
class Script:
    """One stamped script. ``call`` is the packed beginning of its EVALSHA, to be followed by the number of keys."""

    name: str
    text: str
    sha: str
    call: bytes


class Stamp(msgspec.Struct, frozen=True):
    """The epoch and owner that a client believes in. (Not a dataclass: each script call looks its script up by it, and such a
    one is hashed and compared in Python.)"""

    epoch: int
    owner: str


NEVER = Stamp(0, "")


@cache
def stamped(name: str, stamp: Stamp, emulated: bool, reads: bool | None = None) -> Script:
    """Return the script as it reads under a stamp. ``reads`` tells whether it only reads, where that is not by its name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]*", stamp.owner):
        raise ValueError(f"an owner token is letters, digits, '_' and '-', not {stamp.owner!r}")
    flags = "" if name in NEEDS_MEMORY else " flags=allow-oom"
    if name in READERS if reads is None else reads:
        flags = " flags=no-writes"  # which allows a full memory too
    shebang = "" if emulated else f"#!lua{flags}\n"
    text = f"{shebang}local EPOCH, OWNER = '{stamp.epoch}', '{stamp.owner}'\n{_expanded(name, emulated)}"
    sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return Script(name, text, sha, resp.bulk("EVALSHA") + resp.bulk(sha))
