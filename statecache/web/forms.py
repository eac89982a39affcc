"""What a form has sent: small, url-encoded, and from a page of this very session."""

from __future__ import annotations

from urllib.parse import parse_qsl

from fastapi import Request

from statecache.web import problems
from statecache.web.policy import Session
from statecache.web.rendering import session_of
from statecache.web.site import Site

_FIELDS_MAX = 20


async def read(request: Request) -> dict[str, str]:
    """The fields of a form; the guard has bounded its length and looked where it comes from."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise problems.Told(400, "this wants a form: application/x-www-form-urlencoded")
    body = await request.body()
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=_FIELDS_MAX)
    except ValueError:
        raise problems.Told(400, "this form cannot be read") from None
    return dict(pairs)


def who(request: Request, form: dict[str, str]) -> Session:
    """Who acts. Raises ``Told`` if nobody has logged in, or the form is not one of this session's."""
    site: Site = request.app.state.site
    session = session_of(request)
    if not site.policy.actions:
        raise problems.Told(403, "this deployment is read-only: changes need 'statecache serve --actions' and a token")
    if session is None:
        raise problems.Told(401, "log in first: your session has ended, or there was none")
    if not site.policy.is_form_token(session, form.get("form_token", "")):
        raise problems.Told(403, "this form belongs to another session: load the page again")
    return session


def local_path(text: str) -> str:
    """Where to go after a form; anything but a path of this site becomes the start page."""
    if not text.startswith("/") or text.startswith("//") or "\\" in text or not text.isprintable():
        return "/"
    return text
