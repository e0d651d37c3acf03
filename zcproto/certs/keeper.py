"""Keeps what is served good while the server runs: the asyncio edge of certs/maintainer.py and tls/proof.py.

    in a thread, once in `certificates.watch_interval`:  Maintainer.check -> new contexts, which prove themselves
    then in one turn of the loop:                        acceptor.contexts = the new ones; log; announce next pins

What it decides: nothing about certificates. Only contexts that have proved themselves are handed out; as long as
new ones cannot, the old ones serve on and it is tried again.

The loop hears of a look only if there is something to take or to tell. A look that finds something new takes some
20 ms of processor; the thread stops for a moment between its parts, so that a loop that shares a processor with it
waits for one part at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, NamedTuple

from zcproto.certs.certificates import CertificateSet, NextPins, Site
from zcproto.certs.foreign import ForeignSite, PassphraseSource
from zcproto.certs.maintainer import (
    CertificateStatus,
    ClientTrust,
    Maintainer,
    MaintainerSettings,
    Notice,
    NoticeKind,
    OwnSource,
    Renewal,
)
from zcproto.certs.own import OwnSettings
from zcproto.certs.revoked import Issue, revoked_in
from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.config import Config, SiteConfig
from zcproto.config.model import CertificatesConfig
from zcproto.errors import CertificateError
from zcproto.observe.log import get_logger
from zcproto.tls.context import ClientAuth, ServerContext
from zcproto.tls.proof import proven_sites
from zcproto.tls.sites import SiteContexts

_WARNINGS: Final = frozenset({NoticeKind.RENEWAL_FAILED, NoticeKind.FILES_BAD, NoticeKind.EXPIRY})
log = get_logger("zcproto.server")

THREAD: Final = "zcproto-certificates"

LONGEST_WAIT: Final = 0.5
"""Seconds for which a program that ends without its server's end may have to wait for the thread."""

REST: Final = 0.002
"""Seconds for which the thread stops between what takes some milliseconds."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_WALL: Final = 253_370_764_800_000  # the year 9999, beyond which Python has no dates


@dataclass(frozen=True, slots=True)
class Kept:
    """What is to be served from now on."""

    certificates: CertificateSet
    contexts: SiteContexts
    revoked: frozenset[Issue]
    """The clients' certificates that are good no more."""


class _Found(NamedTuple):
    kept: Kept | None
    notices: tuple[Notice, ...]
    next_pins: NextPins | None
    last_renewal: Renewal | None


class _Handed(NamedTuple):
    """What the loop was handed last, as far as it goes without saying as long as it is the same."""

    next_pins: NextPins | None
    last_renewal: Renewal | None
    is_good: bool
    """Whether there was no error."""


Report = Callable[[], None]
"""What is to be done in the loop about a look."""


class CertificateKeeper:
    """Looks after a server's certificates.

    `on_kept` is called in the loop with what is to be served from now on, `on_next_pins` with what is announced
    whenever that changes. `on_notice` hears of all that happens, `on_problem` why new certificates did not prove
    themselves, and "" when others did. `notices` counts what happened, by kind.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        protocols: Collection[str],
        *,
        on_kept: Callable[[Kept], None] = lambda kept: None,
        on_next_pins: Callable[[NextPins | None], None] = lambda next_pins: None,
        on_notice: Callable[[Notice], None] = lambda notice: None,
        on_problem: Callable[[str], None] = lambda problem: None,
        progress: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """Raises CertificateError if the configured sites contradict one another."""
        self._progress = progress
        self._settings = maintainer_settings(config)
        self._maintainer = self._maintainer_for(self._settings)
        self._client_auth: ClientAuth = config.tls.client_auth  # type: ignore[assignment]  # the rule has checked it
        self._protocols = list(protocols)
        self._suites = config.tls.suites
        self._interval = config.certificates.watch_interval
        self._clock = clock
        self._kept: Kept | None = None
        self.next_pins: NextPins | None = None
        self.on_kept = on_kept
        self.on_next_pins = on_next_pins
        self._on_notice = on_notice
        self._on_problem = on_problem
        self._looking = threading.Lock()
        self._handed = _Handed(None, None, is_good=True)
        self._unproven = True
        self._proven: dict[Site, ServerContext] = {}
        self._untold: tuple[Notice, ...] = ()
        self._problem = ""
        self.notices: dict[NoticeKind, int] = dict.fromkeys(NoticeKind, 0)
        self.last_renewal: Renewal | None = None

    def _maintainer_for(self, settings: MaintainerSettings) -> Maintainer:
        return Maintainer(
            settings, random=random.random, environ=os.environ, progress=self._progress, rest=_rest
        )

    async def start(self) -> None:
        """Have something to serve. Raises CertificateError if there is nothing good."""
        self._take(await asyncio.to_thread(self._look))

    async def run(self) -> None:
        """Look again and again in a thread, until cancelled; a look under way then is the last."""
        loop = asyncio.get_running_loop()
        ended = threading.Event()
        try:
            while True:
                if self._start_thread(loop, ended):
                    await loop.create_future()  # nothing ends it but its being cancelled
                await asyncio.sleep(self._interval)
        finally:
            ended.set()

    def _start_thread(self, loop: asyncio.AbstractEventLoop, ended: threading.Event) -> bool:
        # No daemon: at the interpreter's end it might be in the midst of OpenSSL, which is taken down then.
        thread = threading.Thread(target=self._watch, args=(loop, ended), name=THREAD)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread left; it may have one later
            log.error("certificate.look_failed", exc_info=error)
            return False
        return True

    async def look(self) -> None:
        """Look once, and take what is new. Whatever happens, what is served stays."""
        # What is new is handed over before the thread has ended, and so it is taken before this goes on.
        await asyncio.to_thread(self._look_for, asyncio.get_running_loop().call_soon_threadsafe)

    async def reconfigure(self, config: Config, apply: Callable[[], None]) -> bool:
        """Go by another configuration, if there is something good to serve by it. Whether certificates were looked
        at anew for that.

        `apply` is called in the loop, in the same turn in which that is handed out. Raises CertificateError; then
        it is not called, and all is as it was.
        """
        settings = maintainer_settings(config)
        if settings == self._settings:
            self._interval = config.certificates.watch_interval
            apply()
            return False
        loop = asyncio.get_running_loop()
        failed: list[Exception] = []

        def take(found: _Found) -> None:
            self._interval = config.certificates.watch_interval
            try:
                apply()
            except Exception as error:  # it is for who asked for this
                failed.append(error)
            else:
                self._take(found)

        await asyncio.to_thread(self._look_by, settings, lambda found: loop.call_soon_threadsafe(take, found))
        if failed:
            raise failed[0]
        return True

    @property
    def kept(self) -> Kept:
        """What is served now."""
        assert self._kept is not None, "the keeper has not been started"
        return self._kept

    def status(self) -> tuple[CertificateStatus, ...]:
        """Every certificate in use, with the seconds that it has left."""
        return self._maintainer.status(self.now())

    def figures(self) -> dict[str, Any]:
        """For `server.stats`: times in seconds."""
        last = self.last_renewal
        return {
            "certificates": [
                {
                    "file": one.path.name,
                    "source": one.source.value,
                    "site": list(one.site),
                    "key_type": one.key_type,
                    "pin": one.pin,
                    "seconds_left": round(one.seconds_left),
                }
                for one in self.status()
            ],
            "certificate_notices": {kind.value: count for kind, count in self.notices.items() if count},
            "last_renewal": None if last is None else {"at": round(last.at.timestamp()), "ok": last.ok},
        }

    # --- in the thread -----------------------------------------------------------------------------

    def _watch(self, loop: asyncio.AbstractEventLoop, ended: threading.Event) -> None:
        def hand(report: Report) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody to serve any more
                loop.call_soon_threadsafe(lambda: None if ended.is_set() else report())

        while self._waited(ended) and not loop.is_closed():
            self._look_for(hand)

    def _waited(self, ended: threading.Event) -> bool:
        """Wait until the next look; False if there is to be none, as the watch ends, or the program does."""
        waited = 0.0
        while True:
            part = min(max(self._interval - waited, 0.0), LONGEST_WAIT)  # the interval may change meanwhile
            if ended.wait(part) or not threading.main_thread().is_alive():
                return False
            waited += part
            if waited >= self._interval:
                return True

    def _look_for(self, hand: Callable[[Report], object]) -> None:
        """Look, and hand the loop what is new. One look at a time, so that it gets them in their order."""
        with self._looking:
            report: Report
            try:
                found = self._look()
            except CertificateError as error:  # the new contexts did not prove themselves
                self._handed = self._handed._replace(is_good=False)
                report = partial(self._refuse, str(error))
            except Exception as error:  # a fault of ours must not end the watch over what is served
                report = partial(log.error, "certificate.look_failed", exc_info=error)
            else:
                before, self._handed = (
                    self._handed,
                    _Handed(found.next_pins, found.last_renewal, is_good=True),
                )
                if found.kept is None and not found.notices and self._handed == before:
                    return
                report = partial(self._take, found)
            hand(report)

    def _look_by(self, settings: MaintainerSettings, hand: Callable[[_Found], object]) -> None:
        """Look by other settings, and go by them from now on unless nothing good is found."""
        with self._looking:
            before = self._maintainer, self._settings, self._proven, self._unproven, self._untold
            try:
                self._maintainer = self._maintainer_for(settings)
                self._settings, self._proven, self._untold = settings, {}, ()
                found = self._look()
            except BaseException:
                self._maintainer, self._settings, self._proven, self._unproven, self._untold = before
                raise
            self._handed = _Handed(found.next_pins, found.last_renewal, is_good=True)
            hand(found)

    def _look(self) -> _Found:
        outcome = self._maintainer.check(self.now(), self._clock.now())
        self._untold += outcome.notices  # what cannot be used yet is told when it is used
        if outcome.client_trust_changed:
            self._proven.clear()  # each context has in it whose certificates it believes
        if outcome.certificates is not None or outcome.client_trust_changed:
            self._unproven = True
        kept = None
        if self._unproven:
            _rest()
            kept = self._prove(self._maintainer.certificates)
        self._unproven = False
        untold, self._untold = self._untold, ()
        return _Found(kept, untold, outcome.next_pins, outcome.last_renewal)

    def _prove(self, certificates: CertificateSet) -> Kept:
        clients = self._settings.clients
        contexts = proven_sites(
            certificates.sites,
            self._protocols,
            self._suites,
            client_auth=self._client_auth,
            client_ca=None if clients is None else clients.ca,
            client_crl=None if clients is None else clients.crl,
            proven=self._proven,
            rest=_rest,
        )
        revoked = frozenset() if clients is None or clients.crl is None else revoked_in(clients.crl)
        return Kept(certificates, contexts, revoked)

    def now(self) -> datetime:
        """The wall time, aware, within what dates can say."""
        wall = min(max(self._clock.wall(), 0), _LAST_WALL)
        return _EPOCH + timedelta(milliseconds=wall)

    # --- in the loop -------------------------------------------------------------------------------

    def _refuse(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            log.warning("certificate.not_used", message=problem)
            self._on_problem(problem)

    def _take(self, found: _Found) -> None:
        if self._problem:
            self._problem = ""
            self._on_problem("")
        if found.last_renewal is not None:
            self.last_renewal = found.last_renewal
        if found.kept is not None:
            self._kept = found.kept
            self.on_kept(found.kept)
        for notice in found.notices:
            self._tell(notice)
        if found.next_pins != self.next_pins:
            self.next_pins = found.next_pins
            self.on_next_pins(found.next_pins)

    def _tell(self, notice: Notice) -> None:
        self.notices[notice.kind] += 1
        values: dict[str, Any] = {"file": notice.what, "message": notice.message}
        if notice.pins:
            values["pins"] = list(notice.pins)
        if notice.left is not None:
            values["days_left"] = notice.left // timedelta(days=1)
        if notice.days is not None:
            values["threshold_days"] = notice.days
        write = log.warning if notice.kind in _WARNINGS else log.info
        write(f"certificate.{notice.kind.value}", **values)
        self._on_notice(notice)


def _rest() -> None:
    time.sleep(REST)


def unix_ms(moment: datetime) -> int:
    return round(moment.timestamp() * MS_PER_SECOND)


def maintainer_settings(config: Config) -> MaintainerSettings:
    """What is configured of certificates, for the one who looks after them."""
    certificates = config.certificates
    return MaintainerSettings(
        default=_own(certificates) if certificates.mode == "own" else _default_files(certificates),
        sites=tuple(_site(site) for site in certificates.site),
        alert_days=certificates.alert_days,
        clients=_client_trust(config),
    )


def _own(certificates: CertificatesConfig) -> OwnSource:
    settings = OwnSettings(
        names=certificates.names,
        key_types=certificates.key_types,
        lifetime=timedelta(seconds=certificates.lifetime),
        renew_before=timedelta(seconds=certificates.renew_before),
        renew_key=certificates.renew_key,
        announce_key=timedelta(seconds=certificates.announce_key),
    )
    return OwnSource(certificates.directory, settings)


def _default_files(certificates: CertificatesConfig) -> ForeignSite:
    passphrase = PassphraseSource(
        certificates.key_passphrase_file, certificates.key_passphrase_variable or ""
    )
    return ForeignSite((), certificates.certificate, certificates.key, passphrase)


def _site(site: SiteConfig) -> ForeignSite:
    passphrase = PassphraseSource(site.key_passphrase_file, site.key_passphrase_variable or "")
    return ForeignSite(site.names, site.certificate, site.key, passphrase)


def _client_trust(config: Config) -> ClientTrust | None:
    tls = config.tls
    if tls.client_auth == "off":
        return None
    if tls.client_ca_file is not None:
        return ClientTrust(tls.client_ca_file, tls.client_crl_file)
    folder = config.certificates.directory
    return ClientTrust(folder / "client-ca.crt", tls.client_crl_file or folder / "client-ca.crl", folder)
