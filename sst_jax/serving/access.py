"""Who may call the server: with a key in the Authorization header, and from web pages of which origins (CORS)."""

from __future__ import annotations

import dataclasses
import hmac
import os

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sst_jax.errors import InputError
from sst_jax.serving.protocol import Refused

KEY_VARIABLE = "SST_JAX_API_KEY"  # of the environment, which other users of a machine do not see
OPEN = ("/health",)  # routes that ask for no key


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may call.

    key      that every call needs, "Authorization: Bearer KEY"; None: none. It is in no message and in no log.
    origins  web pages that may call from a browser, such as "http://localhost:3000", or "*" for all

    Raises: InputError for a key that no header can carry, or an origin that is none.
    """

    key: str | None = dataclasses.field(default=None, repr=False)
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.key is not None and not (self.key and all("!" <= character <= "~" for character in self.key)):
            raise InputError(f"--api-key (or {KEY_VARIABLE}) must be printable ASCII without spaces, and not empty")
        for origin in self.origins:
            scheme, _, host = origin.partition("://")
            if origin != "*" and (scheme not in ("http", "https") or not host or "/" in host):
                raise InputError(f"--cors {origin} is no origin: write http://localhost:3000, or * for all")

    def middleware(self) -> list[Middleware]:
        """Return what stands before the routes; a browser's question whether it may call needs no key."""
        found = []
        if self.origins:
            found.append(
                Middleware(
                    CORSMiddleware, allow_origins=self.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
                )
            )
        if self.key is not None:
            found.append(Middleware(KeyCheck, key=self.key))
        return found


def access(key: str | None, origins: list[str]) -> Access:
    """Return the access that flags and the environment ask for; a key of --api-key goes before KEY_VARIABLE's."""
    return Access(os.environ.get(KEY_VARIABLE) if key is None else key, tuple(origins))


class KeyCheck:
    """Refuses calls without the key (401)."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._wanted = app, b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            # In a time that tells nothing of how much of the key was right.
            if len(given) != 1 or not hmac.compare_digest(given[0], self._wanted):
                refused = Refused(401, "the API key is missing or wrong", code="invalid_api_key")
                response = JSONResponse(refused.body(), 401, headers={"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
