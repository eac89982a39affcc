"""Who may do what, and the secrets' arithmetic.

On a loopback address reading is free; anywhere else, and for every change, the deployment's one token is needed: as a bearer
token by programs, or once at the login form by people, who get a signed cookie with the name that they gave. The cookie is
not the token: it ends after twelve hours, and all of them end when the token is changed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import time
from dataclasses import dataclass
from typing import NamedTuple

from statecache.core import errors
from statecache.settings import Settings

SESSION_COOKIE = "statecache_session"
SESSION_SECONDS = 12 * 3600
NAME_LENGTH_MAX = 64


class Session(NamedTuple):
    """Somebody who has logged in."""

    name: str
    cookie: str

    @property
    def actor(self) -> str:
        """What history says of who did it."""
        return f"web:{self.name}"


@dataclass(frozen=True)
class Policy:
    """``local``: served on a loopback address, under one of ``hosts``; reading needs no token then."""

    token: str | None = None
    actions: bool = False
    local: bool = True
    hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "::1"})

    def __post_init__(self) -> None:
        if not self.local and self.token is None:
            raise errors.ConfigurationError(
                "serving on an address that others can reach needs a token: set STATECACHE_WEB_TOKEN (or web_token in the "
                "config file) to a long random text, or serve on 127.0.0.1"
            )
        if self.actions and self.token is None:
            raise errors.ConfigurationError(
                "actions need a token: set STATECACHE_WEB_TOKEN (or web_token in the config file) to a long random text"
            )

    @classmethod
    def of(cls, settings: Settings) -> Policy:
        """The policy that the settings ask for. Raises ``ConfigurationError`` where they are not safe together."""
        host = settings.web_host
        return cls(settings.web_token, settings.web_actions, is_loopback(host), cls.hosts | {host.lower()})

    def is_token(self, given: str) -> bool:
        """Compare in constant time; digests, so that the length tells nothing either."""
        if self.token is None:
            return False
        return hmac.compare_digest(_digest(given), _digest(self.token))

    def new_session(self, name: str) -> Session:
        """A session that begins now."""
        claim = json.dumps({"name": name, "until": int(time.time()) + SESSION_SECONDS}).encode()
        payload = base64.urlsafe_b64encode(claim).decode()
        return Session(name, f"{payload}.{self._signature('session', payload)}")

    def session(self, cookie: str) -> Session | None:
        """The session of a cookie, if it is one of ours and has not ended."""
        payload, _, signature = cookie.partition(".")
        if self.token is None or not hmac.compare_digest(
            signature.encode(), self._signature("session", payload).encode()
        ):
            return None
        claim = json.loads(base64.urlsafe_b64decode(payload))
        return Session(claim["name"], cookie) if claim["until"] > time.time() else None

    def form_token(self, session: Session) -> str:
        """What every form of a session carries, and no other site can know."""
        return self._signature("form", session.cookie)

    def is_form_token(self, session: Session, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.form_token(session).encode())

    def _signature(self, purpose: str, text: str) -> str:
        key = hashlib.sha256(f"statecache web {purpose}\0{self.token}".encode()).digest()
        return hmac.new(key, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
