"""What is configured about certificates, as values for this package."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from zcproto.certs import client_ca
from zcproto.certs.external import ExternalSite, PassphraseSource
from zcproto.certs.managed import ManagedSettings
from zcproto.config.model import CertificatesConfig, Config, SiteConfig


@dataclass(frozen=True, slots=True)
class ManagedSite:
    """The default site has managed certificates."""

    directory: Path
    settings: ManagedSettings


@dataclass(frozen=True, slots=True)
class ClientTrust:
    """The files with which clients' certificates are verified."""

    ca: Path
    crl: Path | None = None
    """PEM, with one or several lists; the file must exist."""
    directory: Path | None = None
    """The folder of the managed client authority, if this is it: it is created, and its list is kept up to date."""


@dataclass(frozen=True, slots=True)
class CertificateSettings:
    """What to serve, and when to report an approaching expiry."""

    default: ManagedSite | ExternalSite
    sites: tuple[ExternalSite, ...] = ()
    """Beside the default one."""
    alert_days: tuple[int, ...] = (30, 14, 7, 3, 1)
    clients: ClientTrust | None = None
    """None if clients show no certificates."""


def certificate_settings(config: Config) -> CertificateSettings:
    """Return the certificate settings of a configuration."""
    certificates = config.certificates
    return CertificateSettings(
        default=managed_site(config) or _external_site((), certificates),
        sites=tuple(_external_site(site.names, site) for site in certificates.site),
        alert_days=certificates.alert_days,
        clients=_client_trust(config),
    )


def managed_site(config: Config) -> ManagedSite | None:
    """Return the managed certificates of a configuration; None if other programs provide the certificates."""
    certificates = config.certificates
    if certificates.mode != "own":
        return None
    settings = ManagedSettings(
        names=certificates.names,
        key_types=certificates.key_types,
        lifetime=timedelta(seconds=certificates.lifetime),
        renew_before=timedelta(seconds=certificates.renew_before),
        renew_key=certificates.renew_key,
        announce_key=timedelta(seconds=certificates.announce_key),
    )
    return ManagedSite(certificates.directory, settings)


def _external_site(names: tuple[str, ...], config: CertificatesConfig | SiteConfig) -> ExternalSite:
    passphrase = PassphraseSource(config.key_passphrase_file, config.key_passphrase_variable or "")
    return ExternalSite(names, config.certificate, config.key, passphrase)


def _client_trust(config: Config) -> ClientTrust | None:
    tls = config.tls
    if tls.client_auth == "off":
        return None
    if tls.client_ca_file is not None:
        return ClientTrust(tls.client_ca_file, tls.client_crl_file)
    folder = config.certificates.directory
    ca, crl = client_ca.paths(folder)
    return ClientTrust(ca, tls.client_crl_file or crl, folder)
