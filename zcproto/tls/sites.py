"""Select the TLS context for a server name (SNI, RFC 6066 section 3).

Decides: the exact name first, then the wildcard of its parent, then the default. A star stands for one left-most
label, as in certificates (RFC 9525 section 6.3). Clients with an unknown name, or none, get the default certificate
and judge it themselves: an unrecognized_name alert would reveal the known names to scanners, and would lock out
clients that connect to an address, through a tunnel or by a private name.

Must not know: the content or origin of the contexts. Instances are immutable: replace the whole SiteContexts.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Final

from zcproto.errors import CertificateError

_NONE: Final[Mapping[str, ssl.SSLContext]] = {}


class SiteContexts:
    """The contexts of one server: `default`, and those of `by_name` with exact names and `*.` wildcards.

    Names are compared without case and trailing dot. Raises CertificateError for a star that is not the whole first
    label, and for a duplicate name.
    """

    def __init__(self, default: ssl.SSLContext, by_name: Mapping[str, ssl.SSLContext] = _NONE) -> None:
        self.default = default
        self._exact: dict[str, ssl.SSLContext] = {}
        self._wild: dict[str, ssl.SSLContext] = {}  # by the name after the star
        for name, context in by_name.items():
            host = name.lower().removesuffix(".")
            is_wild = host.startswith("*.")
            host = host.removeprefix("*.")
            if not all(host.split(".")) or "*" in host:
                raise CertificateError(f"invalid site name {name!r}; use a.example or *.example")
            table = self._wild if is_wild else self._exact
            if host in table:
                raise CertificateError(f"two sites have the name {name!r}; leave it in one of them")
            table[host] = context

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names with their own context."""
        return (*self._exact, *(f"*.{name}" for name in self._wild))

    def choose(self, server_name: str | None) -> ssl.SSLContext:
        """Return the context for a requested server name in lower case, or for None."""
        if server_name is None:
            return self.default
        found = self._exact.get(server_name)
        if found is None and self._wild:
            found = self._wild.get(server_name.partition(".")[2])
        return self.default if found is None else found
