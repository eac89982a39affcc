"""Templates: everything is escaped, and what is undefined is an error rather than nothing."""

from __future__ import annotations

import time
from typing import Any

import jinja2
from fastapi import Request
from starlette.responses import HTMLResponse

from statecache.web import wording
from statecache.web.policy import Session
from statecache.web.site import Site

_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("statecache.web"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters |= {
    "count": wording.count,
    "duration": wording.duration,
    "moment": wording.moment,
    "machine_time": wording.machine_time,
    "ranges": wording.ranges,
}
_environment.tests["notable"] = lambda part: part["kind"] not in ("intact", "new") or bool(part["findings"])
_environment.globals |= {"link": wording.link, "instance_link": wording.instance_link}


def session_of(request: Request) -> Session | None:
    session: Session | None = request.scope["state"]["session"]
    return session


def text(site: Site, session: Session | None, template: str, **values: Any) -> str:
    """A template as text. ``may_act``: whether this session may change things; ``form_token``: what its forms carry."""
    policy = site.policy
    shared = {
        "session": session,
        "may_act": policy.actions and session is not None,
        "can_log_in": policy.token is not None,
        "actions": policy.actions,
        "form_token": policy.form_token(session) if session else "",
        "now_ms": time.time() * 1000,
    }
    return _environment.get_template(template).render(shared | values)


def page(request: Request, template: str, code: int = 200, **values: Any) -> HTMLResponse:
    """A whole page."""
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    body = text(request.app.state.site, session_of(request), template, here=here, **values)
    return HTMLResponse(body, code)
