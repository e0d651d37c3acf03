"""What is served at one time, as values: sites, the set of them, and pins that will be served later.

Must not know: files and how the certificates came to be here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from zcproto.certs.pair import CertificatePair


@dataclass(frozen=True, slots=True)
class Site:
    """What is served for some names."""

    names: tuple[str, ...]
    """Exact (`a.example`) or wildcard (`*.example`), in lower case; empty for the default site."""
    pairs: tuple[CertificatePair, ...]
    """At least one, and one at most of each key family."""


@dataclass(frozen=True, slots=True)
class CertificateSet:
    """All that is served at one time."""

    sites: tuple[Site, ...]
    """The first is the default, which serves whoever asks for no name or for one that no other site has."""

    def __post_init__(self) -> None:
        assert self.sites, "a set of certificates has a default site"

    @property
    def default(self) -> Site:
        return self.sites[0]

    @property
    def pairs(self) -> tuple[CertificatePair, ...]:
        """Those of every site."""
        return tuple(pair for site in self.sites for pair in site.pairs)

    @property
    def pins(self) -> tuple[str, ...]:
        """The pins of the default site's keys."""
        return tuple(pair.pin for pair in self.default.pairs)


@dataclass(frozen=True, slots=True)
class NextPins:
    """Pins of keys that are announced, and not used yet."""

    pins: tuple[str, ...]
    use_from: datetime
    """When the first of them may be used; aware, in UTC."""
