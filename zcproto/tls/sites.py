"""Which context serves which server name (SNI, RFC 6066 section 3).

What it decides: the exact name comes first, then the wildcard of the name's parent, then the default. A star
stands for one left-most label, as in the certificates themselves (RFC 9525 section 6.3). A client that asks for
a name which no site has gets the default's certificate and decides for itself, and so does one that asks for none:
an alert (unrecognized_name) would tell scanners which names there are, and would lock out those who connect to
an address, through a tunnel or by a name that only they use.

Must not know: what is in the contexts, or where they come from. Nothing here changes: other sites are another
SiteContexts, put in the place of this one.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Final

from zcproto.errors import CertificateError

_NONE: Final[Mapping[str, ssl.SSLContext]] = {}


class SiteContexts:
    """The contexts of one server: `default`, and those of `by_name` under exact names and `*.` wildcards.

    Names are compared without case and without a dot at their end. Raises CertificateError for a star anywhere
    but as the whole first label, and for a name that is there twice.
    """

    __slots__ = ("_exact", "_wild", "default")

    def __init__(self, default: ssl.SSLContext, by_name: Mapping[str, ssl.SSLContext] = _NONE) -> None:
        self.default = default
        self._exact: dict[str, ssl.SSLContext] = {}
        self._wild: dict[str, ssl.SSLContext] = {}  # by what follows the star
        for name, context in by_name.items():
            host = name.lower().removesuffix(".")
            is_wild = host.startswith("*.")
            host = host.removeprefix("*.")
            if not all(host.split(".")) or "*" in host:
                raise CertificateError(f"{name!r} is no name of a site; use a.example or *.example")
            table = self._wild if is_wild else self._exact
            if host in table:
                raise CertificateError(f"{name!r} is a name of two sites; leave it to one of them")
            table[host] = context

    @property
    def names(self) -> tuple[str, ...]:
        """The names that have a context of their own."""
        return (*self._exact, *(f"*.{name}" for name in self._wild))

    def choose(self, server_name: str | None) -> ssl.SSLContext:
        """The context for a client that asks for a server by this name, which is in lower case, or for none."""
        if server_name is None:
            return self.default
        found = self._exact.get(server_name)
        if found is None and self._wild:
            found = self._wild.get(server_name.partition(".")[2])
        return self.default if found is None else found
