"""The default site with certificates of a public CA, above the managed certificates.

Rules:
- For each key type the certificate of the CA is served if there is one that can be served, else the managed one.
- The CA certifies the managed keys, so that pins remain valid at every renewal, and the first certificate of the CA
  changes no pin. When a managed key is replaced, the old certificate of the CA is served with its copy of the old
  key until the new one is issued; its pin is announced until then.
- A failure changes nothing that is served. It is reported like that of a managed renewal.
- Certificates are loaded from their files, wherever they come from: so do the other processes of the server.

Must not know: how certificates are ordered, TLS contexts, connections, logs, the current time.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Final

from zcproto.certs import files, lifecycle, notices, rollover
from zcproto.certs.acme import schedule
from zcproto.certs.acme.orders import Visit, VisitResult, VisitThread, Wanted, carry_out
from zcproto.certs.acme.schedule import OrderRecord, RenewalWindow
from zcproto.certs.authority import Progress
from zcproto.certs.keys import family
from zcproto.certs.lifecycle import Random
from zcproto.certs.notices import Notice
from zcproto.certs.pair import CertificatePair, Site, load_pair
from zcproto.certs.rollover import NextPins
from zcproto.certs.settings import AcmeSite, ManagedSite
from zcproto.certs.sources import ManagedSource, Origin, Renewal, RenewalSchedule, SiteSource
from zcproto.common.text import extra_cure
from zcproto.common.watcher import FileWatcher
from zcproto.errors import CertificateError

BUSY_RETRY_S: Final = 30.0
"""Seconds until the next attempt if another process visits the CA."""

ASK_AGAIN_S: Final = 6 * 3600.0
"""Seconds until the CA is asked again if it gave no answer (RFC 9773 section 4.3.3)."""

MIN_ASK_AGAIN_S: Final = 60.0


@dataclass(slots=True)
class _RenewalInfo:
    """What the CA has answered about one certificate."""

    fraction: float
    """The place in the window at which it is renewed."""
    ask_at: float = 0.0
    """When to ask again; monotonic."""
    window: RenewalWindow | None = None


def require_package() -> None:
    """Raise CertificateError without the package of the extra."""
    if importlib.util.find_spec("acme") is None:
        raise CertificateError(
            f'certificates.mode = "acme": this needs the package acme; {extra_cure("acme")}'
        )


class AcmeSource(SiteSource):
    """The default site. Without `maintains`, it serves what another process orders."""

    origin = Origin.OWN

    def __init__(
        self,
        site: AcmeSite,
        random: Random,
        progress: Progress,
        rest: Callable[[], None],
        *,
        maintains: bool = True,
    ) -> None:
        self._site = site
        self._random = random
        self._maintains = maintains
        managed = ManagedSite(site.managed_directory, site.managed)
        self._managed = ManagedSource(managed, random, progress, rest, maintains=maintains)
        self._paths = {kind: rollover.pair_paths(site.directory, kind) for kind in site.managed.key_types}
        self._watcher = FileWatcher(
            [path for paths in self._paths.values() for path in paths], files.MAX_FILE_BYTES
        )
        self._pairs: dict[str, CertificatePair] = {}  # of the CA, by key type
        self._refused: dict[str, str] = {}  # why a certificate of the CA cannot be served, by key type
        self._is_incomplete = False
        self.visits = VisitThread(partial(carry_out, site, progress=progress))
        self._schedule = RenewalSchedule(site.directory, site.directory, random)
        self._record = OrderRecord()
        self._retry_at = 0.0  # monotonic: what a CA, a failure before a restart or another process demand
        self._requested: frozenset[str] = frozenset()
        self._ordered_before: datetime | None = None  # the order before this one
        self._is_order = False  # the visit that has begun last
        self._infos: dict[bytes, _RenewalInfo] = {}  # by certificate
        self._last: Renewal | None = None
        self.problem = ""
        """Why the last visit has not issued everything."""

    @property
    def is_incomplete(self) -> bool:
        return self._is_incomplete or self._managed.is_incomplete

    @property
    def site(self) -> Site:
        return Site((), tuple(self._pairs.get(one.key_type, one) for one in self._managed.site.pairs))

    def overdue(self, now: datetime) -> list[CertificatePair]:
        """Return the pairs that should have been renewed: before that, the operator has nothing to do."""
        before = self._site.renew_before
        late = [one for one in self._pairs.values() if now >= schedule.latest_renewal(one, before)]
        return late + self._managed.overdue(now)

    def start(self, now: datetime, monotonic: float) -> list[Notice]:
        happened = self._managed.start(now, monotonic)
        if self._maintains:
            require_package()
            files.make_folder(self._site.directory)
            self._record = schedule.read_record(self._site.directory)
            waits_until = self._record.waits_until(self._site.acme, now)
            if waits_until is not None:
                self._retry_at = monotonic + (waits_until - now).total_seconds()
        self._watcher.look()
        happened += self._load(now, ())
        self._is_incomplete = False
        self._update()
        return happened

    def check_start(self, now: datetime) -> None:
        self._managed.check_start(now)
        require_package()
        if self._site.directory.exists():
            files.check_folder(self._site.directory)

    def check(self, now: datetime, monotonic: float, force: bool) -> list[Notice]:
        happened = self._managed.check(now, monotonic, force)
        result = self.visits.take_result()
        has_changed = self._watcher.look()
        if has_changed or self._is_incomplete or result is not None:
            happened += self._load(now, () if result is None else result.issued)
        self._is_incomplete = has_changed and bool(self._refused)
        if result is not None:
            happened += self._visited(result, now, monotonic)
        if self._maintains and not self.visits.is_running:
            self._begin(now, monotonic)
        self._update()
        return happened

    def order_now(self, families: Collection[str]) -> None:
        """Have the next check order certificates of these key families, whatever has failed before."""
        self._requested = frozenset(kind for kind in self._paths if family(kind) in families)

    @property
    def is_ordering(self) -> bool:
        return (self.visits.is_running and self._is_order) or bool(self._requested)

    def wait(self, seconds: float) -> None:
        """Wait until the visit to the CA has ended."""
        self.visits.wait(seconds)

    def close(self) -> None:
        self.visits.stop()

    # --- what is served

    def _load(self, now: datetime, issued: Collection[str]) -> list[Notice]:
        """Load the certificates of the CA from their files. One that cannot be loaded changes nothing."""
        happened: list[Notice] = []
        self._refused = {}
        for kind, (certificate, key) in self._paths.items():
            old = self._pairs.get(kind)
            if not certificate.exists():
                self._pairs.pop(kind, None)
                continue
            try:
                one = load_pair(certificate, key, now)
            except CertificateError as error:
                self._refused[kind] = str(error)  # it may be about to be replaced
                continue
            if one == old or one.key_type != kind:
                continue
            self._pairs[kind] = one
            happened += [notices.renewed(one)] if kind in issued else notices.loaded((), [one])
            if old is not None and old.pin != one.pin:
                happened.append(notices.rotated(one))
        return happened

    def _update(self) -> None:
        """Set what follows from the pairs in use."""
        self.authorities = self._managed.authorities
        self.last_renewal = self._last or self._managed.last_renewal
        self.origin = Origin.ACME if self._pairs else Origin.OWN
        pins, times = [], []
        for one in self._managed.site.pairs:
            served = self._pairs.get(one.key_type)
            if served is not None and served.pin != one.pin:  # to be used as soon as the CA has certified it
                pins.append(one.pin)
                times.append(lifecycle.issued_at(one.not_before, one.not_after))
        announced = self._managed.next_pins
        if announced is not None:
            pins += announced.pins
            times.append(announced.use_from)
        self.next_pins = NextPins(tuple(pins), min(times)) if pins else None

    # --- visits to the CA

    def _begin(self, now: datetime, monotonic: float) -> None:
        """Begin a visit if one is due."""
        is_time = monotonic >= self._retry_at and self._schedule.is_due(now, monotonic, True)
        may_order = is_time or bool(self._requested)
        wanted = tuple(self._wanted(now)) if may_order else ()
        asked = [one for one in self._pairs.values() if monotonic >= self._info(one).ask_at]
        if not wanted and not asked:
            return
        self._requested, self._is_order = frozenset(), bool(wanted)
        for one in asked:
            self._info(one).ask_at = monotonic + ASK_AGAIN_S
        try:
            self.visits.begin(Visit(wanted, tuple(one.certificate for one in asked)), now)
        except RuntimeError:  # no thread is available; there may be one later
            self._retry_at = monotonic + BUSY_RETRY_S
            return
        if wanted:  # before the result: a process that is killed may have ordered
            self._ordered_before = self._record.ordered_at
            self._write(replace(self._record, ordered_at=now))

    def _wanted(self, now: datetime) -> list[Wanted]:
        acme = self._site.acme
        directory = self._record.directory or acme.directory
        found = []
        for one in self._managed.site.pairs:
            kind = one.key_type
            served = self._pairs.get(kind)
            due = now if served is None else self._due(served, now)
            why = schedule.reason_to_order(served, one.pin, acme, directory, due, now)
            if kind in self._requested:
                why = "a renewal was requested"
            if why:
                is_of_this_ca = served is not None and directory == acme.directory
                found.append(Wanted(kind, one.key, why, self._paths[kind][0] if is_of_this_ca else None))
        return found

    def _due(self, served: CertificatePair, now: datetime) -> datetime:
        info, ordered_at = self._info(served), self._record.ordered_at
        if ordered_at is not None and ordered_at > now:
            ordered_at = None  # written with a wrong clock
        return schedule.renewal_time(served, self._site.renew_before, info.window, info.fraction, ordered_at)

    def _info(self, one: CertificatePair) -> _RenewalInfo:
        info = self._infos.get(one.leaf_sha256)
        if info is None:
            used = {each.leaf_sha256 for each in self._pairs.values()}
            self._infos = {key: each for key, each in self._infos.items() if key in used}
            info = self._infos[one.leaf_sha256] = _RenewalInfo(self._random())
        return info

    def _visited(self, result: VisitResult, now: datetime, monotonic: float) -> list[Notice]:
        """Take the result of a visit."""
        for one in self._pairs.values():
            window = result.windows.get(one.certificate)
            if window is not None:
                info = self._info(one)
                info.window, info.ask_at = window, monotonic + max(window.ask_again_s, MIN_ASK_AGAIN_S)
        if self._is_order and not (result.issued or result.is_busy):
            self._record = replace(self._record, ordered_at=self._ordered_before)
        if result.is_busy:
            self._retry_at = monotonic + BUSY_RETRY_S
            self.problem = "another process of this server is ordering certificates; try again in a minute"
            return []
        if not result.problem and result.issued:
            # Otherwise it would be ordered again at once, until the CA refuses.
            # One whose renewal was requested meanwhile may be in use.
            kinds = {*result.issued} - self._requested
            unused = [each for each in self._wanted(now) if each.key_type in kinds]
            for each in unused:
                why = self._refused.get(each.key_type, each.why)
                result.problem = f"{self._paths[each.key_type][0]}: was issued and is not used: {why}"
        self.problem = result.problem
        if result.problem:
            return self._failed(result, now, monotonic)
        if not result.issued:
            return []
        self._last = Renewal(now, ok=True)
        self._retry_at = 0.0
        self._write(OrderRecord(self._site.acme.directory, ordered_at=self._record.ordered_at))
        return self._schedule.succeeded()

    def _failed(self, result: VisitResult, now: datetime, monotonic: float) -> list[Notice]:
        self._last = Renewal(now, ok=False)
        left = min(schedule.time_left(self._pairs.get(kind), now) for kind in self._paths)
        happened = self._schedule.failed(CertificateError(result.problem), left, now, monotonic)
        delay = max(self._schedule.retry_delay_s, result.retry_after_s)
        self._retry_at = monotonic + delay
        self._write(
            OrderRecord(
                self._site.acme.directory if result.issued else self._record.directory,
                result.problem,
                now,
                now + timedelta(seconds=delay),
                schedule.digest_of(self._site.acme),
                self._record.ordered_at,
            )
        )
        return happened

    def _write(self, record: OrderRecord) -> None:
        self._record = record
        with contextlib.suppress(CertificateError):  # the disk is full: only a restart would need it
            schedule.write_record(self._site.directory, record)
