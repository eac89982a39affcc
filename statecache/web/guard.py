"""The door, before any route: host, length, token, origin; and the headers that every answer carries.

Plain ASGI: it passes streams through as they are. What it decides:

- on a loopback address the Host header must be a name of this machine, or a page of another site whose name was bound to
  127.0.0.1 (DNS rebinding) could read everything;
- elsewhere everything but ``/healthz``, the login form and its style needs the token;
- a change through the API needs actions enabled and the bearer token: a cookie, which browsers send by themselves, is not
  enough there;
- HEAD is answered as GET is, by its headers alone (the server sends no body); not a stream, which would never end;
- a form must come from our own pages: the Origin header says so, the cookie is SameSite=Strict, and the form itself carries
  a token of its session (``forms``).
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request, cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from statecache.web import problems
from statecache.web.policy import SESSION_COOKIE, Policy, Session

BODY_BYTES_MAX = 1024 * 1024
_API = ("/api/", "/metrics", "/readyz", "/healthz", "/live/")
_PUBLIC = ("/healthz", "/login")

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not "no-referrer": under that browsers send forms with "Origin: null", and we could not tell whose they are.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
HEADERS = {**SECURITY_HEADERS, "Cache-Control": "no-store"}


def is_for_programs(path: str) -> bool:
    """Whether errors there are told in JSON."""
    return path.startswith(_API)


class Guard:
    """The middleware. It puts the session, or None, into ``scope["state"]["session"]``.

    ``answer`` makes the answer to an error that nothing inside expected.
    """

    def __init__(self, app: ASGIApp, policy: Policy, answer: Callable[[Request, Exception], Response]) -> None:
        self._app = app
        self._policy = policy
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]

        started = False

        async def secured(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if path.startswith("/static/"):
                    headers["Cache-Control"] = "no-cache"  # to be asked for, and mostly answered with 304
            await send(message)

        headers = Headers(scope=scope)
        session = self._session(headers)
        scope.setdefault("state", {})["session"] = session
        refusal = self._refusal(scope["method"], path, scope.get("query_string", b""), headers, session)
        if refusal is not None:
            await refusal(scope, receive, secured)
            return
        inner = scope
        if scope["method"] == "HEAD" and not path.startswith("/live/"):
            inner = {**scope, "method": "GET"}
        try:
            await self._app(inner, receive, secured)
        except Exception as error:
            if started:
                raise
            await self._answer(Request(scope), error)(scope, receive, secured)

    def _session(self, headers: Headers) -> Session | None:
        cookie = cookie_parser(headers.get("cookie", "")).get(SESSION_COOKIE)
        return self._policy.session(cookie) if cookie else None

    def _bearer(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._policy.is_token(given.strip())

    def _refusal(
        self, method: str, path: str, query: bytes, headers: Headers, session: Session | None
    ) -> Response | None:
        try:
            if path != "/healthz":
                self._check_host(headers)
            reading = method in ("GET", "HEAD", "OPTIONS")
            if not reading:
                _check_length(headers)
            bearer = self._bearer(headers)
            if path.startswith("/api/") and not reading:
                self._check_change(bearer)
            elif not reading:
                _check_origin(headers)
            open_to_all = self._policy.local or path in _PUBLIC or path.startswith("/static/")
            if not (open_to_all or bearer or session):
                raise problems.Told(401, "give the token: Authorization: Bearer ...", {"WWW-Authenticate": "Bearer"})
        except problems.Told as told:
            if told.status == 401 and reading and not is_for_programs(path):
                here = quote(path) + (f"?{query.decode('latin-1')}" if query else "")
                return RedirectResponse(f"/login?next={quote(here, safe='')}", 303)
            return problems.response(told)
        return None

    def _check_host(self, headers: Headers) -> None:
        """Any port: whoever forwards a port to us may have another one."""
        if not self._policy.local:
            return
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if name not in self._policy.hosts:
            known = ", ".join(sorted(self._policy.hosts))
            raise problems.Told(421, f"this is served as {known} only; to serve it under another name give it a token")

    def _check_change(self, bearer: bool) -> None:
        if not self._policy.actions:
            raise problems.Told(
                403, "this deployment is read-only: changes need 'statecache serve --actions' and a token"
            )
        if not bearer:
            raise problems.Told(
                401, "changes need the token: Authorization: Bearer ...", {"WWW-Authenticate": "Bearer"}
            )


def _check_length(headers: Headers) -> None:
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        raise problems.Told(411, "say the length of the body: Content-Length")
    if int(length) > BODY_BYTES_MAX:
        raise problems.Told(413, f"the body has {length} bytes, {BODY_BYTES_MAX} are allowed")


def _check_origin(headers: Headers) -> None:
    """A form's sender: all browsers of today send Origin with a POST; what sends none is no browser of a person."""
    origin = headers.get("origin", "")
    try:
        sender = urlsplit(origin).netloc
    except ValueError:
        sender = ""
    if not sender or sender.lower() != headers.get("host", "").lower():
        raise problems.Told(
            403, "this form was sent from another site, or without an Origin header; programs use /api/v1"
        )
