"""What people may do: log in, fire an event, retry a dead letter, try a recovery on paper.

The guard has seen that a form comes from our own pages; ``forms.who`` sees that it belongs to the session. A form that fires
an event carries the version that its page showed and a transition id of its own: sent twice, it is applied once, and if
somebody else was faster it is refused.
"""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import RedirectResponse, Response

from statecache.core import codec, errors
from statecache.engine import letters
from statecache.web import forms, problems, rendering, wording
from statecache.web.policy import NAME_LENGTH_MAX, SESSION_COOKIE, SESSION_SECONDS
from statecache.web.site import Site

_log = logging.getLogger(__name__)
router = APIRouter(include_in_schema=False)
_VERSION_DIGITS_MAX = 19
Form = Annotated[dict[str, str], Depends(forms.read)]


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


@router.get("/login")
def login_page(request: Request, next: str = "/") -> Response:
    """The form that asks for name and token."""
    return rendering.page(request, "login.html", next=forms.local_path(next), problem=None, name="")


@router.post("/login")
def login(request: Request, form: Form) -> Response:
    """Compare the token; a right one gets a session."""
    policy = _site(request).policy
    name, next = form.get("name", "").strip(), forms.local_path(form.get("next", "/"))
    problem = None
    try:
        codec.check_text("name", name, NAME_LENGTH_MAX)
    except errors.InvalidDataError as error:
        problem = str(error)
    if not policy.is_token(form.get("token", "")):
        problem = "That is not the token."
        _log.warning("a wrong token was given at the login form")
    if problem:
        return rendering.page(request, "login.html", 403, next=next, problem=problem, name=name[:NAME_LENGTH_MAX])
    answer = RedirectResponse(next, 303)
    answer.set_cookie(
        SESSION_COOKIE, policy.new_session(name).cookie, max_age=SESSION_SECONDS, path="/", httponly=True,
        samesite="strict", secure=request.url.scheme == "https",
    )  # fmt: skip
    return answer


@router.post("/logout")
def logout(request: Request) -> Response:
    """Forget the session. No form token: whoever has none has nothing to log out of."""
    answer = RedirectResponse("/", 303)
    answer.delete_cookie(SESSION_COOKIE, path="/", httponly=True, samesite="strict")
    return answer


@router.post("/actions/transition")
def transition(request: Request, form: Form) -> Response:
    """Fire an event in the name of who has logged in."""
    session = forms.who(request, form)
    machine, id, event = (form.get(name, "") for name in ("machine", "id", "event"))
    request.state.back = wording.instance_link(machine, id)  # where the error page leads back to
    version = form.get("version", "")
    if not (version.isdecimal() and len(version) < _VERSION_DIGITS_MAX and form.get("transition_id", "")):
        raise problems.Told(400, "this form lacks its version: load the page again")
    receipt = _site(request).handle(machine).transition(
        id, event, actor=session.actor, reason=form.get("reason", "").strip() or None,
        expect_version=int(version), transition_id=form["transition_id"],
    )  # fmt: skip
    _log.info("%s fired %s", session.actor, receipt.event, extra={"machine": machine, "version": receipt.version})
    return RedirectResponse(wording.link("/instance", machine=machine, id=id, done=1), 303)


@router.post("/actions/retry")
def retry(request: Request, form: Form) -> Response:
    """Move an instance's dead letters into history, once the reason for their refusal is gone."""
    session = forms.who(request, form)
    machine, id = form.get("machine", ""), form.get("id", "")
    request.state.back = wording.instance_link(machine, id)
    _site(request).handle(machine)
    count = letters.retry(_site(request).cache, machine, id)
    _log.info("%s retried %d dead letters", session.actor, count, extra={"machine": machine})
    return RedirectResponse(wording.link("/instance", machine=machine, id=id, done=1), 303)


@router.post("/actions/dry-run")
def dry_run(request: Request, form: Form) -> Response:
    """What a recovery would find and do now. Changes nothing."""
    session = forms.who(request, form)
    _log.info("%s asks for a dry run of recovery", session.actor)
    report = _site(request).cache.recover(dry_run=True)
    return rendering.page(request, "report.html", report=report)
