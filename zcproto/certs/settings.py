"""What is configured about certificates, as values for this package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Final

from zcproto.certs import client_ca
from zcproto.certs.external import ExternalSite, PassphraseSource
from zcproto.certs.managed import ManagedSettings
from zcproto.certs.names import check_names
from zcproto.config.model import CertificatesConfig, Config, SiteConfig
from zcproto.tls.context import ClientTrust


@dataclass(frozen=True, slots=True)
class ManagedSite:
    """The default site has managed certificates."""

    directory: Path
    settings: ManagedSettings


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


@dataclass(frozen=True, slots=True)
class CertificateSettings:
    """What to serve, and when to report an approaching expiry."""

    default: ManagedSite | AcmeSite | ExternalSite
    sites: tuple[ExternalSite, ...] = ()
    """Beside the default one."""
    alert_days: tuple[int, ...] = (30, 14, 7, 3, 1)
    clients: ClientTrust | None = None
    """None if clients show no certificates. The files must exist, unless they are in `client_directory`."""
    client_directory: Path | None = None
    """The folder of the managed client authority, if this is it: it is created, and its list is kept up to date."""


def certificate_settings(config: Config) -> CertificateSettings:
    """Return the certificate settings of a configuration."""
    certificates = config.certificates
    return CertificateSettings(
        default=acme_site(config)
        or managed_site(config)
        or replace(_external_site((), certificates), required=check_names(certificates.names)),
        sites=tuple(_external_site(site.names, site) for site in certificates.site),
        alert_days=certificates.alert_days,
        clients=_client_trust(config),
        client_directory=None if config.tls.client_ca_file else certificates.directory,
    )


def managed_site(config: Config) -> ManagedSite | None:
    """Return the managed certificates of a configuration; None if other programs provide the certificates.

    With those of a public CA there are managed ones too: for their keys, and to be served until there are others.
    """
    certificates = config.certificates
    if certificates.mode == "files":
        return None
    settings = ManagedSettings(
        names=certificates.names,
        key_types=certificates.key_types,
        lifetime=timedelta(seconds=certificates.lifetime),
        renew_before=timedelta(seconds=certificates.renew_before),
        renew_key=certificates.renew_key,
        announce_key=timedelta(seconds=certificates.announce_key),
        repair=certificates.repair,
    )
    return ManagedSite(certificates.directory, settings)


def acme_site(config: Config) -> AcmeSite | None:
    """Return the certificates of a public CA; None if they come from elsewhere. Raises CertificateError."""
    managed, acme = managed_site(config), config.acme
    if managed is None or config.certificates.mode != "acme":
        return None
    settings = AcmeSettings(
        directory=acme.directory,
        names=check_names(config.certificates.names),
        challenge=acme.challenge,
        contact=acme.contact,
        ca_file=acme.ca_file,
        eab_kid=acme.eab_kid,
        eab_key_file=acme.eab_key_file,
    )
    return AcmeSite(managed.directory, managed.settings, settings)


def _external_site(names: tuple[str, ...], config: CertificatesConfig | SiteConfig) -> ExternalSite:
    passphrase = PassphraseSource(config.key_passphrase_file, config.key_passphrase_variable or "")
    return ExternalSite(names, config.certificate, config.key, passphrase)


def _client_trust(config: Config) -> ClientTrust | None:
    tls = config.tls
    if tls.client_auth == "off":
        return None
    is_required = tls.client_auth == "required"
    if tls.client_ca_file is not None:
        return ClientTrust(tls.client_ca_file, tls.client_crl_file, is_required)
    ca, crl = client_ca.paths(config.certificates.directory)
    return ClientTrust(ca, tls.client_crl_file or crl, is_required)
