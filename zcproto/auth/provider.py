"""Fetch what an OpenID provider publishes: its metadata and its keys (OpenID Connect Discovery 1.0).

Rules:
- The metadata must be by the configured issuer. Its addresses are used over verified TLS, or without TLS only if
  the issuer is (on this machine).
- Redirects are not followed. Responses are bounded.
"""

from __future__ import annotations

import ssl
from typing import Any, Final
from urllib.parse import urlsplit

from zcproto.auth.issuer_keys import KeysFailed
from zcproto.auth.jwt import IssuerKey, read_json, read_keys
from zcproto.common.https import Endpoint, Response, Unreachable

MAX_METADATA: Final = 131_072
MAX_KEY_SET: Final = 262_144
MAX_URL: Final = 2_048

_HEADERS: Final = (("Accept", "application/json"), ("User-Agent", "zcproto-oidc/1"))
_FORM: Final = ("Content-Type", "application/x-www-form-urlencoded")


class Provider:
    """An OpenID provider. `context` verifies its certificate; `timeout` is for each request."""

    def __init__(self, issuer: str, context: ssl.SSLContext, timeout: float) -> None:
        self.issuer = issuer
        self._context = context
        self._timeout = timeout
        self._metadata: dict[str, Any] | None = None
        self.date = ""
        """When the provider has answered last, by its own clock: the header Date."""

    async def keys(self) -> list[IssuerKey]:
        """Fetch the keys. Raises KeysFailed."""
        try:
            return read_keys(await self._get(await self.address("jwks_uri"), MAX_KEY_SET))
        except ValueError as error:
            self._metadata = None  # the keys may have moved
            raise KeysFailed(f"the key set cannot be used: {error}") from None
        except KeysFailed:
            self._metadata = None
            raise

    async def address(self, name: str) -> str:
        """Return an address of the provider's metadata. Raises KeysFailed."""
        if self._metadata is None:
            self._metadata = await self._discover()
        address = self._metadata.get(name)
        if not isinstance(address, str) or not self._is_usable(address):
            raise KeysFailed(f"the metadata has no usable {name}")
        return address

    async def post(self, address: str, form: bytes) -> Response:
        """Send a form to an address of the provider. Raises KeysFailed."""
        return await self._send("POST", address, MAX_METADATA, form)

    async def _discover(self) -> dict[str, Any]:
        data = await self._get(
            f"{self.issuer.removesuffix('/')}/.well-known/openid-configuration", MAX_METADATA
        )
        try:
            metadata = read_json(data)
        except ValueError as error:
            raise KeysFailed(f"the metadata cannot be used: {error}") from None
        if metadata.get("issuer") != self.issuer:
            raise KeysFailed("the metadata is by another issuer; the issuer must be equal, to the last slash")
        return metadata

    async def _get(self, address: str, max_body: int) -> bytes:
        response = await self._send("GET", address, max_body)
        if response.status != 200:
            why = ": redirects are not followed" if 300 <= response.status < 400 else ""
            raise KeysFailed(f"{urlsplit(address).hostname} answered {response.status}{why}")
        return response.body

    async def _send(self, method: str, address: str, max_body: int, form: bytes = b"") -> Response:
        endpoint = Endpoint(address, self._context)
        headers = [*_HEADERS, _FORM] if form else _HEADERS
        try:
            response = await endpoint.send(method, headers, form, timeout=self._timeout, max_body=max_body)
        except Unreachable as error:
            raise KeysFailed(str(error)) from error
        self.date = response.headers.get("date", "")
        return response

    def _is_usable(self, address: str) -> bool:
        try:
            parts = urlsplit(address)
            parts.port  # noqa: B018 - raises ValueError
        except ValueError:
            return False
        schemes = {"https", urlsplit(self.issuer).scheme}
        is_plain = (
            len(address) <= MAX_URL and address.isascii() and address.isprintable() and " " not in address
        )
        return is_plain and parts.scheme in schemes and bool(parts.hostname) and "@" not in parts.netloc
