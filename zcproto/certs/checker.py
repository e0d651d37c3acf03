"""Decides what a server serves now: the certificates of all its sources, in contexts that were proven to work.

Rules:
- The first check provides a complete set of certificates or raises CertificateError: without one the server does
  not start.
- Only contexts that completed a handshake in memory are served. As long as new ones fail it, the old ones remain in
  use, each check raises CertificateError and tries again, and notices are deferred until the certificates are used.

Must not know: asyncio, connections, logs, the current time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from zcproto.certs import lifecycle, pair
from zcproto.certs.acme.source import AcmeSource
from zcproto.certs.authority import Progress
from zcproto.certs.client_user import CertificateId
from zcproto.certs.lifecycle import Expiring, ExpiryAlerts, Random
from zcproto.certs.notices import Notice, NoticeKind
from zcproto.certs.pair import CertificatePair, Site
from zcproto.certs.proof import proven_sites
from zcproto.certs.rollover import NextPins
from zcproto.certs.settings import AcmeSite, CertificateSettings, ManagedSite
from zcproto.certs.sources import (
    ClientTrustSource,
    ExternalSource,
    ManagedSource,
    Origin,
    Renewal,
    SiteSource,
    Source,
)
from zcproto.errors import CertificateError
from zcproto.tls.context import ServerContext, SiteContexts


@dataclass(frozen=True, slots=True)
class ServingCertificates:
    """What a server serves."""

    sites: tuple[Site, ...]
    """The first is the default, for clients that request no name or a name that no other site has."""
    contexts: SiteContexts
    revoked: frozenset[CertificateId]

    @property
    def pairs(self) -> tuple[CertificatePair, ...]:
        """The pairs of every site."""
        return tuple(pair for site in self.sites for pair in site.pairs)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check found."""

    serving: ServingCertificates | None
    """What to serve from now on; None if it has not changed."""
    notices: tuple[Notice, ...]
    next_pins: NextPins | None
    last_renewal: Renewal | None
    """None if there was none since the start."""


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """One certificate in use, for metrics and for people. The last four fields are empty for authorities."""

    source: Origin
    path: Path
    names: tuple[str, ...]
    """The names in the certificate; for an authority its subject."""
    sha256: bytes
    not_after: datetime
    seconds_left: float
    """Negative if it has expired."""
    site: tuple[str, ...] = ()
    """The names for which it is served; empty for the default site."""
    key_type: str = ""
    pin: str = ""
    lifetime_s: float = 0.0


class CertificateChecker:
    """All certificates of a server. Only one thread at a time may call `check`; others may call `status`."""

    def __init__(
        self,
        settings: CertificateSettings,
        protocols: Sequence[str],
        *,
        random: Random,
        environ: Mapping[str, str],
        progress: Progress = lambda sentence: None,
        rest: Callable[[], None] = lambda: None,
        maintains: bool = True,
    ) -> None:
        """`random` jitters the delays of retries; `environ` may contain passphrases.

        `progress` receives sentences before slow steps. `rest` is called between steps of some milliseconds, to
        yield the processor. Without `maintains`, another process issues the managed files and reports expiries.
        """
        default = settings.default
        self.acme: AcmeSource | None = None
        """The default site, if its certificates are ordered from a public CA."""
        self._default: SiteSource
        if isinstance(default, AcmeSite):
            self._default = self.acme = AcmeSource(default, random, progress, rest, maintains=maintains)
        elif isinstance(default, ManagedSite):
            self._default = ManagedSource(default, random, progress, rest, maintains=maintains)
        else:
            self._default = ExternalSource(default, environ)
        self._site_sources: list[SiteSource] = [
            self._default,
            *(ExternalSource(spec, environ) for spec in settings.sites),
        ]
        self._clients = (
            None
            if settings.clients is None
            else ClientTrustSource(settings, random, progress, maintains=maintains)
        )
        self._sources: list[Source] = [
            *self._site_sources,
            *([] if self._clients is None else [self._clients]),
        ]
        self._protocols = protocols
        self._settings = settings
        self._rest = rest
        self._alerts = ExpiryAlerts(settings.alert_days)
        self._maintains = maintains
        self.sites: tuple[Site, ...] = ()
        """The valid certificates; empty before the first check."""
        self._clock = (datetime.min, 0.0)
        self._is_proven = False
        self._proven: dict[Site, ServerContext] = {}
        self._deferred: tuple[Notice, ...] = ()

    def check(self, now: datetime, monotonic: float) -> CheckResult:
        """Check everything. `now` is an aware time, `monotonic` seconds that only increase.

        Raises CertificateError if there is nothing to serve yet, or if new contexts do not work.
        """
        moment = pair.utc(now)
        self._deferred += tuple(self._check_sources(moment, monotonic))
        serving = None
        if not self._is_proven:
            self._rest()
            serving = self._prove()
            self._is_proven = True
        happened, self._deferred = self._deferred, ()
        return CheckResult(serving, happened, self._default.next_pins, self._default.last_renewal)

    def faults(self, now: datetime) -> list[str]:
        """Return why the first check would fail. Changes nothing."""
        found = []
        for source in self._sources:
            try:
                source.check_start(pair.utc(now))
            except CertificateError as error:
                found.append(str(error))
        return found

    def close(self) -> None:
        """Stop work in other threads. Idempotent."""
        if self.acme is not None:
            self.acme.close()

    @property
    def is_incomplete(self) -> bool:
        """Return True if files have just changed and are not valid together yet: check again soon."""
        return any(source.is_incomplete for source in self._sources)

    def status(self, now: datetime) -> tuple[CertificateStatus, ...]:
        """Return all certificates in use: those served, then the authorities. Empty before the first check."""
        moment = pair.utc(now)
        if not self.sites:
            return ()
        served = [
            CertificateStatus(
                source=source.origin,
                path=one.certificate,
                names=one.names,
                sha256=one.leaf_sha256,
                not_after=one.not_after,
                seconds_left=(one.not_after - moment).total_seconds(),
                site=site.names,
                key_type=one.key_type,
                pin=one.pin,
                lifetime_s=(one.not_after - one.not_before).total_seconds(),
            )
            for source, site in zip(self._site_sources, self.sites, strict=True)
            for one in site.pairs
        ]
        of_clients = () if self._clients is None else self._clients.authorities
        authorities = [
            CertificateStatus(
                source=origin,
                path=Path(one.path),
                names=(one.subject,),
                sha256=one.sha256,
                not_after=one.not_after,
                seconds_left=(one.not_after - moment).total_seconds(),
            )
            for origin, found in (
                (Origin.AUTHORITY, self._default.authorities),
                (Origin.CLIENT_AUTHORITY, of_clients),
            )
            for one in found
        ]
        return (*served, *authorities)

    def _check_sources(self, now: datetime, monotonic: float) -> list[Notice]:
        happened: list[Notice] = []
        if not self.sites:
            self._clock = (now, monotonic)
            for source in self._sources:
                happened += source.start(now, monotonic)
        else:
            force = self._clock_was_changed(now, monotonic)
            for source in self._sources:
                happened += source.check(now, monotonic, force)
        if any(notice.kind is NoticeKind.CLIENT_TRUST_LOADED for notice in happened):
            self._proven.clear()  # each context contains the authorities for clients
            self._is_proven = False
        sites = tuple(source.site for source in self._site_sources)
        if sites != self.sites:
            self.sites = sites
            self._is_proven = False
        if self._maintains:
            happened += self._alerts.due(self._expiring(now), now)
        return happened

    def _clock_was_changed(self, now: datetime, monotonic: float) -> bool:
        """Return True if the clock was changed, or the machine suspended, since this last returned True."""
        wall, then = self._clock
        if abs((now - wall).total_seconds() - (monotonic - then)) <= lifecycle.CLOCK_JUMP_S:
            return False
        self._clock = (now, monotonic)
        return True

    def _expiring(self, now: datetime) -> list[Expiring]:
        items = [
            Expiring(one.leaf_sha256, str(one.certificate), one.not_after)
            for source in self._site_sources
            for one in source.overdue(now)
        ]
        return items + [one for source in self._sources for one in (*source.authorities, *source.lists)]

    def _prove(self) -> ServingCertificates:
        contexts = proven_sites(
            self.sites,
            self._protocols,
            self._settings.clients,
            proven=self._proven,
            rest=self._rest,
        )
        revoked = frozenset() if self._clients is None else self._clients.revoked
        return ServingCertificates(self.sites, contexts, revoked)
