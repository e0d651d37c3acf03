"""Keeps the certificates of a running server valid: the asyncio edge of checker.py.

    in a thread, once per `certificates.watch_interval`:  CertificateChecker.check -> CheckResult
    then in one turn of the loop:                         serve the new contexts, log notices, announce next pins

Rules: the loop is called only if a check found something new. A check that finds something takes about 20 ms of
processor time. The thread sleeps briefly between its steps, so that a loop on the same processor waits for one step
at most. Whatever happens in the thread, the certificates in use remain in use.

Must not know: how certificates are issued, loaded or proven.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, NamedTuple

from zcproto.certs.acme.orders import VISIT_S
from zcproto.certs.acme.source import AcmeSource
from zcproto.certs.checker import (
    CertificateChecker,
    CertificateStatus,
    CheckResult,
    ServingCertificates,
)
from zcproto.certs.notices import Notice, NoticeKind
from zcproto.certs.rollover import NextPins
from zcproto.certs.settings import CertificateSettings, certificate_settings
from zcproto.certs.sources import Renewal
from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.config import Config
from zcproto.errors import CertificateError
from zcproto.observe.log import get_logger

log = get_logger("zcproto.server")

THREAD: Final = "zcproto-certificates"

LONGEST_WAIT: Final = 0.5
"""Seconds for which a program that ends without stopping its server may have to wait for the thread."""

SOON: Final = 0.1
"""Seconds until the next check if one fell between the writing of a certificate and of its key."""

RARE_S: Final = 2.0
"""Seconds between checks, at least, in a process that also checks when another one has found changes."""

REST: Final = 0.002
"""Seconds for which the thread sleeps between steps of some milliseconds."""

_WARNINGS: Final = frozenset(
    {NoticeKind.RENEWAL_FAILED, NoticeKind.FILES_BAD, NoticeKind.KEY_REPLACED, NoticeKind.EXPIRY}
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_WALL: Final = 253_370_764_800_000  # the year 9999, the last that a datetime can express


class _Reported(NamedTuple):
    """What the loop received last. If a check finds the same, it is not called."""

    next_pins: NextPins | None = None
    last_renewal: Renewal | None = None
    has_failed: bool = False


Report = Callable[[], None]
"""What to do in the loop about a check."""


class CertificateManager:
    """The certificates of a server.

    In the loop, `on_serving` is called with what to serve from now on, `on_next_pins` with what is announced
    whenever that changes, `on_notice` with everything that happens, and `on_problem` with the reason why new
    certificates do not work, or "" when they work again. `notices` counts what happened, by kind. Without
    `maintains`, another process issues and renews the managed certificates, which appear in their files. It checks
    all files, and the caller is to call `check` when it has found changes.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        protocols: Sequence[str],
        *,
        on_serving: Callable[[ServingCertificates], None] = lambda serving: None,
        on_next_pins: Callable[[NextPins | None], None] = lambda next_pins: None,
        on_notice: Callable[[Notice], None] = lambda notice: None,
        on_problem: Callable[[str], None] = lambda problem: None,
        progress: Callable[[str], None] = lambda sentence: None,
        maintains: bool = True,
    ) -> None:
        self._clock = clock
        self._checker_for = partial(
            CertificateChecker,
            protocols=protocols,
            random=random.random,
            environ=os.environ,
            progress=progress,
            rest=partial(time.sleep, REST),
            maintains=maintains,
        )
        self._maintains = maintains
        self._settings = certificate_settings(config)
        self.checker = self._checker_for(self._settings)
        self.interval = config.certificates.watch_interval
        self.on_serving = on_serving
        self.on_next_pins = on_next_pins
        self._on_notice = on_notice
        self._on_problem = on_problem
        self._checking = threading.Lock()
        self._reported = _Reported()
        self._problem = ""
        self._serving: ServingCertificates | None = None
        self.next_pins: NextPins | None = None
        self.notices: dict[NoticeKind, int] = dict.fromkeys(NoticeKind, 0)
        self.last_renewal: Renewal | None = None

    async def start(self) -> None:
        """Provide certificates to serve. Raises CertificateError if there are no valid ones."""
        self._apply(await asyncio.to_thread(self._check))

    async def run(self) -> None:
        """Check periodically in a thread until cancelled; a check in progress then is the last."""
        while not self._maintains:  # too rarely to keep a thread
            await asyncio.sleep(SOON if self.checker.is_incomplete else max(self.interval, RARE_S))
            await self.check()
        loop = asyncio.get_running_loop()
        ended = threading.Event()
        try:
            while True:
                if self._start_thread(loop, ended):
                    await loop.create_future()  # wait for the cancellation
                await asyncio.sleep(self.interval)
        finally:
            ended.set()
            self.checker.close()

    async def order(self, families: Collection[str]) -> None:
        """Order certificates of these key families from the public CA, and start serving them before returning.

        Raises CertificateError if that fails, or if the certificates are not those of a public CA.
        """
        source = await asyncio.to_thread(self._order_now, families)
        await self.check()
        while source.is_ordering:
            await asyncio.to_thread(source.wait, VISIT_S)
            await self.check()
        if source.problem:
            raise CertificateError(source.problem)

    def _order_now(self, families: Collection[str]) -> AcmeSource:
        with self._checking:
            source = self.checker.acme
            if source is None:
                raise CertificateError('certificates.mode must be "acme" to order certificates; set it')
            source.order_now(families)
            return source

    def _start_thread(self, loop: asyncio.AbstractEventLoop, ended: threading.Event) -> bool:
        # Not a daemon: at the interpreter's exit it might be inside OpenSSL while that is torn down.
        thread = threading.Thread(target=self._watch, args=(loop, ended), name=THREAD)
        try:
            thread.start()
        except RuntimeError as error:  # no thread is available; there may be one later
            log.error("certificate.look_failed", exc_info=error)
            return False
        return True

    async def check(self) -> None:
        """Check once, and apply what is new before returning. Never raises because of certificates."""
        # The report is queued before the thread ends, and so it runs before this coroutine continues.
        await asyncio.to_thread(self._check_and_report, asyncio.get_running_loop().call_soon_threadsafe)

    async def reconfigure(self, config: Config, apply: Callable[[], None]) -> bool:
        """Check with a new configuration and adopt it if its certificates are valid.

        Return True if the settings of certificates have changed. `apply` is called in the same turn of the loop in
        which the new certificates are served. Raises CertificateError, without a call of `apply`, or what `apply`
        raises; then nothing changes.
        """
        settings, interval = certificate_settings(config), config.certificates.watch_interval
        if settings == self._settings:
            apply()
            self.interval = interval
            return False
        loop, adopted = asyncio.get_running_loop(), Future[None]()

        def adopt(checker: CertificateChecker, result: CheckResult) -> None:
            before = self.checker, self._settings, self.interval, self._reported
            self.checker, self._settings, self.interval = checker, settings, interval
            self._reported = _Reported(result.next_pins, result.last_renewal)
            try:
                apply()
            except Exception as error:  # raised in the thread, and from there to the caller
                self.checker, self._settings, self.interval, self._reported = before
                adopted.set_exception(error)
                return
            adopted.set_result(None)
            self._apply(result)

        def adopt_in_loop(checker: CertificateChecker, result: CheckResult) -> None:
            loop.call_soon_threadsafe(adopt, checker, result)
            while not wait([adopted], LONGEST_WAIT).done:
                if loop.is_closed():
                    raise RuntimeError("the event loop was closed before the certificates were adopted")
            adopted.result()

        await asyncio.to_thread(self._check_with, settings, adopt_in_loop)
        return True

    @property
    def serving(self) -> ServingCertificates:
        """What is served now; there is something once `start` has returned."""
        assert self._serving is not None, "the manager has not been started"
        return self._serving

    def status(self) -> tuple[CertificateStatus, ...]:
        """Return every certificate in use, with the seconds that it has left."""
        return self.checker.status(self.now())

    def now(self) -> datetime:
        """Return the wall time, aware, limited to what a datetime can express."""
        wall = min(max(self._clock.wall(), 0), _LAST_WALL)
        return _EPOCH + timedelta(milliseconds=wall)

    # --- in the thread -------------------------------------------------------------------------------------

    def _watch(self, loop: asyncio.AbstractEventLoop, ended: threading.Event) -> None:
        def report(action: Report) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nothing is served any more
                loop.call_soon_threadsafe(lambda: None if ended.is_set() else action())

        while self._waited(ended) and not loop.is_closed():
            self._check_and_report(report)

    def _waited(self, ended: threading.Event) -> bool:
        """Wait until the next check. Return False if the watch or the program ends before."""
        waited = 0.0
        while True:
            # The interval may change meanwhile.
            interval = min(self.interval, SOON) if self.checker.is_incomplete else self.interval
            part = min(max(interval - waited, 0.0), LONGEST_WAIT)
            if ended.wait(part) or not threading.main_thread().is_alive():
                return False
            waited += part
            if waited >= interval:
                return True

    def _check_and_report(self, report: Callable[[Report], object]) -> None:
        """Check, and report to the loop what is new. The lock keeps reports in the order of their checks."""
        with self._checking:
            try:
                result = self._check()
            except CertificateError as error:  # the new contexts do not work
                self._reported = self._reported._replace(has_failed=True)
                report(partial(self._refuse, str(error)))
            except Exception as error:  # a bug must not end the watch over what is served
                report(partial(log.error, "certificate.look_failed", exc_info=error))
            else:
                before = self._reported
                self._reported = _Reported(result.next_pins, result.last_renewal)
                if result.serving is not None or result.notices or self._reported != before:
                    report(partial(self._apply, result))

    def _check_with(
        self, settings: CertificateSettings, adopt: Callable[[CertificateChecker, CheckResult], None]
    ) -> None:
        """Check with other settings. `adopt` replaces the checker and waits for the loop, or changes nothing and
        raises.
        """
        with self._checking:
            before, checker = self.checker, self._checker_for(settings)
            try:
                adopt(checker, checker.check(self.now(), self._clock.now()))
            except BaseException:
                checker.close()
                raise
            before.close()

    def _check(self) -> CheckResult:
        return self.checker.check(self.now(), self._clock.now())

    # --- in the loop ---------------------------------------------------------------------------------------

    def _refuse(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            log.warning("certificate.not_used", message=problem)
            self._on_problem(problem)

    def _apply(self, result: CheckResult) -> None:
        if self._problem:
            self._problem = ""
            self._on_problem("")
        if result.last_renewal is not None:
            self.last_renewal = result.last_renewal
        if result.serving is not None:
            self._serving = result.serving
            self.on_serving(result.serving)
        for notice in result.notices:
            self._report_notice(notice)
        if result.next_pins != self.next_pins:
            self.next_pins = result.next_pins
            self.on_next_pins(result.next_pins)

    def _report_notice(self, notice: Notice) -> None:
        self.notices[notice.kind] += 1
        values: dict[str, Any] = {"file": notice.path, "message": notice.message}
        if notice.pins:
            values["pins"] = list(notice.pins)
        if notice.left is not None:
            values["days_left"] = notice.left // timedelta(days=1)
        if notice.days is not None:
            values["threshold_days"] = notice.days
        write = log.warning if notice.kind in _WARNINGS else log.info
        write(f"certificate.{notice.kind.value}", **values)
        self._on_notice(notice)


def unix_ms(moment: datetime) -> int:
    return round(moment.timestamp() * MS_PER_SECOND)
