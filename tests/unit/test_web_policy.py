"""Who may do what: the rules that need no server."""

from __future__ import annotations

import base64
import json
import time

import pytest

from statecache.core import errors
from statecache.settings import Settings
from statecache.web import policy
from statecache.web.policy import Policy

TOKEN = "a token for tests only"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("LOCALHOST", True), ("::1", True), ("[::1]", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.example", False), ("example.org", False),
    ],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert policy.is_loopback(host) is loopback


def test_an_address_that_others_can_reach_needs_a_token() -> None:
    with pytest.raises(errors.ConfigurationError, match="STATECACHE_WEB_TOKEN"):
        Policy.of(Settings(web_host="0.0.0.0"))
    found = Policy.of(Settings(web_host="0.0.0.0", web_token=TOKEN))
    assert (found.local, found.actions) == (False, False)


def test_actions_need_a_token() -> None:
    with pytest.raises(errors.ConfigurationError, match="actions need a token"):
        Policy.of(Settings(web_actions=True))


def test_a_short_token_is_refused_and_no_token_is_shown() -> None:
    with pytest.raises(errors.ConfigurationError, match="web_token") as caught:
        Settings(web_token="too short")
    assert "too short" not in str(caught.value)
    assert TOKEN not in repr(Settings(web_token=TOKEN)) + str(Settings(web_token=TOKEN))


def test_tokens() -> None:
    assert Policy(TOKEN).is_token(TOKEN)
    for wrong in ("", TOKEN[:-1], TOKEN + "x", "\udcff", "é"):
        assert not Policy(TOKEN).is_token(wrong)
    assert not Policy(None).is_token("")
    assert not Policy(None).is_token("None")


def test_sessions_are_signed_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Policy(TOKEN)
    session = mine.new_session("Ann <b>")
    assert mine.session(session.cookie) == session
    assert session.actor == "web:Ann <b>"
    assert Policy(TOKEN + "2").session(session.cookie) is None, "another token ends all sessions"
    forged = base64.urlsafe_b64encode(json.dumps({"name": "eve", "until": time.time() + 9}).encode()).decode()
    signature = session.cookie.partition(".")[2]
    for cookie in ("", ".", "x", forged, f"{forged}.{signature}", f"{forged}.é", session.cookie[:-1]):
        assert mine.session(cookie) is None
    later = time.time() + policy.SESSION_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert mine.session(session.cookie) is None


def test_form_tokens_belong_to_a_session() -> None:
    mine = Policy(TOKEN)
    ann, bob = mine.new_session("ann"), mine.new_session("bob")
    assert mine.is_form_token(ann, mine.form_token(ann))
    assert not mine.is_form_token(ann, mine.form_token(bob))
    assert not mine.is_form_token(ann, "é")
    assert mine.form_token(ann) not in ann.cookie
