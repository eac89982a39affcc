"""The pages as their HTML: what they show, what they let people do, and to whom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from statecache.web import guard
from statecache.web.policy import Policy
from tests.support import refusing, webs, worlds

EVIL = "\"'><script>alert(1)</script>/../%2e?#{{7*7}}"


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, sqlite_url, namespace) as made:
        yield made


@pytest.fixture
def web(world: worlds.World) -> Iterator[webs.Served]:
    with webs.serving(world, webs.ACTING) as served:
        yield served


def log_in(web: webs.Served, name: str = "ann", token: str = webs.TOKEN, next: str = "/") -> Any:
    return web.post("/login", data={"name": name, "token": token, "next": next}, headers={"Origin": web.url})


def fields(page: str, action: str) -> dict[str, str]:
    """The hidden fields of a form."""
    form = re.search(rf'<form action="{action}".*?</form>', page, re.DOTALL)
    assert form, page
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form.group()))


def submit(web: webs.Served, path: str, form: dict[str, str], **headers: str) -> Any:
    return web.post(path, data=form, headers={"Origin": web.url, **headers})


def instance(web: webs.Served, id: str, **more: object) -> str:
    answer = web.get("/instance", params={"machine": "order", "id": id, **more})
    assert answer.status_code == 200
    return answer.text


# --- looking ---------------------------------------------------------------------------------------------------------


def test_search_goes_to_the_only_hit(world: worlds.World, web: webs.Served) -> None:
    world.start("1001", ["pay"])
    answer = web.get("/", params={"q": " 1001 "})
    assert (answer.status_code, answer.headers["location"]) == (303, "/instance?machine=order&id=1001")
    world.flush()
    page = web.get("/", params={"q": "100"}).text
    assert 'href="/instance?machine=order&amp;id=1001"' in page
    assert "Nothing is called" in web.get("/", params={"q": "nobody"}).text


def test_an_instance_now_and_then(world: worlds.World, web: webs.Served) -> None:
    world.orders.start("1", {"amount": 5}, actor="shop")
    world.orders.transition("1", "pay", {"method": "card"}, actor="billing", reason="webhook 7")
    page = instance(web, "1")
    for told in ("paid", "step 2 of 4", "billing", "webhook 7", "method", "card", "not in SQL yet", "version 2"):
        assert told in page
    then = instance(web, "1", version=1)
    assert "As it was at version 1" in then
    assert "step 1 of 4" in then
    assert "webhook 7" in then, "history is whole all the same"
    assert 'action="/actions/transition"' not in then
    assert web.get("/instance?machine=order&id=1&version=3").status_code == 404
    world.flush()
    assert "not in SQL yet" not in instance(web, "1")


def test_long_histories_come_in_pages(world: worlds.World, web: webs.Served) -> None:
    world.start("1", ["note"] * 120)
    page = instance(web, "1")
    assert page.count("As it was at version") == 100
    assert "before=22" in page
    assert instance(web, "1", before=22).count("As it was at version") == 21


def test_machines_and_lists(world: worlds.World, web: webs.Served) -> None:
    for number in range(3):
        world.start(f"{number}", ["pay"])
    world.flush()
    assert "<b>3</b> instances" in web.get("/").text
    page = web.get("/machines/order").text
    assert 'href="/instance?machine=order&amp;id=0"' in page
    assert "3</text>" in page
    listed = web.get("/machines/order/instances?state=paid&older_than_minutes=0").text
    assert "3 instances" in listed
    assert web.get("/machines/order/instances?state=paid&older_than_minutes=60").text.count('<th scope="row">') == 0
    assert web.get("/machines/order/instances?state=nowhere").status_code == 422


def test_health_shows_dead_letters_and_retry_moves_them(world: worlds.World, web: webs.Served) -> None:
    world.start("bad", ["pay"])
    world.flush()
    refusing.refuse(world.durable)
    world.orders.transition("bad", "note", reason=refusing.REASON)
    world.flush()
    assert "order:bad" in web.get("/health").text
    log_in(web)
    page = instance(web, "bad")
    assert "It is parked" in page
    form = fields(page, "/actions/retry")
    assert submit(web, "/actions/retry", form).status_code == 409, "SQL still refuses it"
    refusing.accept(world.durable)
    answer = submit(web, "/actions/retry", form)
    assert answer.status_code == 303, answer.text
    assert "It is parked" not in instance(web, "bad")
    assert world.versions("bad") == [1, 2, 3]


def test_errors_are_pages(world: worlds.World, web: webs.Served) -> None:
    for path, status in (
        ("/machines/nobody", 404), ("/instance?machine=order&id=x", 404), ("/instance?machine=order", 422), ("/what", 404),
        ("/static/../app.py", 404), ("/static/no.css", 404), ("/instance?machine=order&id=%00", 422), ("/?q=%00x", 422),
    ):  # fmt: skip
        answer = web.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8"), path
        assert f"{status}</p>" in answer.text


@pytest.mark.parametrize("path", ["style.css", "live.js", "icon.svg"])
def test_static_files_come_from_the_package(web: webs.Served, path: str) -> None:
    answer = web.get(f"/static/{path}")
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_hostile_text_is_only_text(world: worlds.World, web: webs.Served) -> None:
    world.orders.start(EVIL, {"note": EVIL}, actor=EVIL, reason=EVIL)
    world.flush()
    log_in(web, name=EVIL)
    for page in (
        instance(web, EVIL), web.get("/", params={"q": EVIL[:5]}).text, web.get("/", params={"q": EVIL + "x"}).text,
        web.get("/machines/order").text, web.get("/machines/order/instances").text,
        web.get("/instance", params={"machine": EVIL, "id": EVIL}).text, web.get("/login", params={"next": EVIL}).text,
    ):  # fmt: skip
        assert "<script>alert" not in page
        assert "{{7*7}}" in page or "49" not in page
        assert re.findall(r"<script(?! src=\"/static/live.js\" defer></script>)", page) == []
        assert re.findall(r"\s(?:style|on\w+)=", page) == [], "the policy forbids them"


# --- doing -----------------------------------------------------------------------------------------------------------


def test_log_in_fire_and_log_out(world: worlds.World, web: webs.Served) -> None:
    world.start("1")
    assert "Log in</a> to move it on" in instance(web, "1")
    answer = log_in(web, next="/instance?machine=order&id=1")
    assert (answer.status_code, answer.headers["location"]) == (303, "/instance?machine=order&id=1")
    cookie = answer.headers["set-cookie"].lower()
    assert all(word in cookie for word in ("httponly", "samesite=strict", "path=/"))
    assert webs.TOKEN not in cookie
    form = fields(instance(web, "1"), "/actions/transition") | {"event": "pay", "reason": "by hand"}
    assert submit(web, "/actions/transition", form).status_code == 303
    last = world.orders.history("1")[-1]
    assert (last.event, last.actor, last.reason) == ("pay", "web:ann", "by hand")
    web.post("/logout", headers={"Origin": web.url})
    assert "Log in</a> to move it on" in instance(web, "1")


def test_a_form_sent_twice_acts_once_and_an_old_one_is_refused(world: worlds.World, web: webs.Served) -> None:
    """The page is loaded; somebody else moves the instance; the form is sent. And: a form is sent, and sent again."""
    world.start("1")
    log_in(web)
    form = fields(instance(web, "1"), "/actions/transition") | {"event": "note"}
    assert submit(web, "/actions/transition", form).status_code == 303
    assert submit(web, "/actions/transition", form).status_code == 303
    assert world.orders.get("1").version == 2
    old = fields(instance(web, "1"), "/actions/transition") | {"event": "note"}
    world.orders.transition("1", "pay")
    answer = submit(web, "/actions/transition", old)
    assert answer.status_code == 412
    assert "Somebody else has moved it" in answer.text
    assert world.orders.get("1").version == 3


def test_wrong_tokens_and_names(world: worlds.World, web: webs.Served) -> None:
    for name, token in (
        ("ann", "wrong"),
        ("ann", ""),
        ("", webs.TOKEN),
        ("a\x1fb", webs.TOKEN),
        ("x" * 65, webs.TOKEN),
    ):
        answer = log_in(web, name, token)
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers
        assert 'role="alert"' in answer.text


def test_forms_need_session_origin_and_form_token(world: worlds.World, web: webs.Served) -> None:
    world.start("1")
    log_in(web)
    form = fields(instance(web, "1"), "/actions/transition") | {"event": "pay"}
    assert submit(web, "/actions/transition", form, Origin="http://evil.example").status_code == 403
    assert submit(web, "/actions/transition", form | {"form_token": "x"}).status_code == 403
    other = webs.ACTING.new_session("eve").cookie
    assert submit(web, "/actions/transition", form, Cookie=f"statecache_session={other}").status_code == 403
    assert submit(web, "/actions/transition", form, Cookie="").status_code == 401
    assert web.post("/actions/transition", json=form, headers={"Origin": web.url}).status_code == 400
    assert submit(web, "/actions/transition", form | {"version": "x"}).status_code == 400
    assert submit(web, "/actions/transition", form | {"version": "9" * 5000}).status_code == 400
    assert submit(web, "/actions/transition", form | {"event": "no_such"}).status_code == 409
    assert submit(web, "/actions/transition", {f"f{n}": "" for n in range(50)}).status_code == 400
    assert world.orders.get("1").version == 1


def test_without_actions_there_is_nothing_to_press(world: worlds.World) -> None:
    world.start("1")
    with webs.serving(world, Policy(webs.TOKEN)) as web:
        log_in(web)
        page = instance(web, "1")
        assert "/actions/" not in page + web.get("/health").text
        session = Policy(webs.TOKEN)
        form = {
            "form_token": session.form_token(session.new_session("x")),
            "machine": "order",
            "id": "1",
            "event": "pay",
        }
        assert submit(web, "/actions/transition", form).status_code == 403
    assert world.orders.get("1").version == 1


def test_dry_run_changes_nothing(world: worlds.World, web: webs.Served) -> None:
    world.start("1")
    log_in(web)
    form = fields(web.get("/health").text, "/actions/dry-run")
    before = world.hot_dump(), world.sql_dump()
    answer = submit(web, "/actions/dry-run", form)
    assert (answer.status_code, "It would make epoch" in answer.text) == (200, True)
    assert (world.hot_dump(), world.sql_dump()) == before


def test_elsewhere_pages_ask_for_the_token_first(world: worlds.World) -> None:
    world.start("1")
    with webs.serving(world, Policy(webs.TOKEN, local=False)) as web:
        answer = web.get("/instance?machine=order&id=1")
        assert answer.headers["location"] == "/login?next=%2Finstance%3Fmachine%3Dorder%26id%3D1"
        assert web.get(answer.headers["location"]).status_code == 200
        assert web.get("/static/style.css").status_code == 200
        assert web.get("/live/health").status_code == 401
        log_in(web)
        assert web.get("/instance?machine=order&id=1").status_code == 200


def test_what_nobody_expected_says_nothing_and_is_as_safe(
    world: worlds.World, web: webs.Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is none of ours is told to the log, not to the reader."""

    def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("statecache.web.site.Site.exact", broken)
    for path in ("/?q=1", "/api/v1/where?id=1"):
        answer = web.get(path)
        assert answer.status_code == 500
        assert "a secret" not in answer.text
        for name, value in guard.HEADERS.items():
            assert answer.headers[name] == value


def test_reports_of_recoveries(world: worlds.World, web: webs.Served) -> None:
    world.start("1", ["pay"])
    world.flush()
    world.wipe()
    world.cache.recover()
    page = web.get("/health").text
    assert "Report: 2 of 2 partitions" in page
    assert "wiped" in page


def test_odd_searches_and_fields(world: worlds.World, web: webs.Served) -> None:
    long = "x" * 200
    world.start(long)
    assert web.get("/", params={"q": f"order:{long}"}).status_code == 303, "an address may be longer than an id"
    for q in ("order:", ":", "x" * 1000, "nobody:1", "order:1"):
        assert "Nothing is called" in web.get("/", params={"q": q}).text
    for minutes, status in (("", 200), ("0.5", 200), ("x", 422), ("nan", 422), ("1e99", 422), ("-1", 422)):
        answer = web.get("/machines/order/instances", params={"state": "", "older_than_minutes": minutes})
        assert answer.status_code == status
