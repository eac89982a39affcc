"""The web face: pages for people, a JSON API for programs, probes for operators. ``statecache serve`` runs it.

``create_app`` makes an ASGI application of a ``StateCache``. Nothing here knows Redis or SQL; every read is one that the
package's callers have too, so the pages can show nothing that the API could not tell.
"""

from statecache.web.app import create_app
from statecache.web.policy import Policy

__all__ = ["Policy", "create_app"]
