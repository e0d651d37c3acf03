"""What is configured about a public CA, as values for this package."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from zcproto.certs.managed import ManagedSettings

TLS_ALPN: Final = "tls-alpn-01"
HTTP: Final = "http-01"


@dataclass(frozen=True, slots=True)
class AcmeSettings:
    """The CA, and what to order from it."""

    directory: str
    """Its URL."""
    names: tuple[str, ...]
    """DNS names and addresses of every certificate, in normal form."""
    challenge: str = TLS_ALPN
    """TLS_ALPN or HTTP."""
    contact: tuple[str, ...] = ()
    """E-mail addresses."""
    ca_file: Path | None = None
    """Verifies the directory; None for the CAs of the system."""
    eab_kid: str = ""
    """Identifies an external account; empty for none."""
    eab_key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class AcmeSite:
    """The default site has certificates of a public CA, for the keys of managed ones."""

    managed_directory: Path
    managed: ManagedSettings
    """The managed certificates: served until the first order succeeds."""
    acme: AcmeSettings

    @property
    def directory(self) -> Path:
        """The folder of the account key, the certificates and the challenges."""
        return self.managed_directory / "acme"

    @property
    def renew_before(self) -> timedelta:
        return self.managed.renew_before
