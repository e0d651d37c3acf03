"""Visits a CA in a thread of its own: asks when to renew, orders, and installs what it has issued.

Decides: what is in the folder of a CA after a visit, and that a visit ends.

    account.key                  the key of the account, mode 0600
    server.crt, server.key, ...  the certificates, with copies of the managed keys
    orders.json                  the record of orders (schedule.py)
    challenges/                  the answers to challenges (challenges.py)

Rules:
- The thread has an event loop of its own, so that a visit can be ended at any time, and neither the loop of the
  server nor its checks of other certificates wait for the network.
- One visit at a time, among all processes that use the folder: during an upgrade there are two servers.
- A chain is installed only if it would be served with the key, and is valid for all names.

Must not know: when to visit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from zcproto.certs import files, keys, pair, rollover
from zcproto.certs.acme.challenges import ChallengeFolder
from zcproto.certs.acme.schedule import RenewalWindow
from zcproto.certs.authority import Progress
from zcproto.certs.names import covers, general_names
from zcproto.certs.settings import AcmeSite
from zcproto.common.clock import Clock, system_clock
from zcproto.common.files import file_errors, try_lock
from zcproto.common.https import Endpoint, Response, verifying_context
from zcproto.errors import CertificateError, ZcprotoError

if TYPE_CHECKING:
    from zcproto.certs.acme.client import AcmeClient, Fetch

THREAD: Final = "zcproto-acme"
VISIT_S: Final = 600.0
"""Seconds for a visit. A CA may check names several times from several places, and issue minutes later."""


REQUEST_S: Final = 30.0
"""Seconds for one request and its response."""

MAX_REPLY: Final = 1_048_576
"""Bytes of a response; a chain of certificates has some thousand."""

MAX_AHEAD_S: Final = 60.0
"""Seconds by which the clock of a CA that does not backdate its certificates may be ahead."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A certificate to order."""

    key_type: str
    key: Path
    """The managed key."""
    why: str
    replaced: Path | None = None
    """The certificate before it, if this CA has issued it."""


@dataclass(frozen=True, slots=True)
class Visit:
    """What to do at the CA."""

    wanted: tuple[Wanted, ...] = ()
    ask_about: tuple[Path, ...] = ()
    """Certificates whose renewal time is asked."""


@dataclass(slots=True)
class VisitResult:
    """What has happened at the CA."""

    issued: list[str] = field(default_factory=list)
    """The key types of the certificates that were installed."""
    windows: dict[Path, RenewalWindow | None] = field(default_factory=dict)
    """By certificate; without those about which the CA could not be asked."""
    problem: str = ""
    """Why not everything was issued: a sentence with the cure."""
    retry_after_s: float = 0.0
    """What the CA wants to wait."""
    is_busy: bool = False
    """Whether another process visits the CA: nothing was done."""


Work = Callable[[Visit, datetime], Awaitable[VisitResult]]


class VisitThread:
    """Carries out visits, one at a time. Only one thread may call its methods, except `stop`."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._result: VisitResult | None = None
        self._cancel: Callable[[], object] = lambda: None
        self.is_stopped = False

    @property
    def is_running(self) -> bool:
        return self._thread is not None

    def begin(self, visit: Visit, now: datetime) -> None:
        """Begin a visit; none is in progress. Raises RuntimeError if no thread is available."""
        # Not a daemon: at the interpreter's exit it might be inside OpenSSL while that is torn down.
        thread = threading.Thread(target=self._run, args=(visit, now), name=THREAD)
        thread.start()
        self._thread = thread

    def take_result(self) -> VisitResult | None:
        """Return the result of a visit that has ended, once; otherwise None."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread.join()
        self._thread, result = None, self._result
        self._result = None
        return result

    def wait(self, seconds: float) -> None:
        """Wait until the visit has ended."""
        if self._thread is not None:
            self._thread.join(seconds)

    def stop(self) -> None:
        """End the visit now, and begin no other one."""
        with self._lock:
            self.is_stopped = True
            self._cancel()

    def _run(self, visit: Visit, now: datetime) -> None:
        try:
            self._result = asyncio.run(self._visit(visit, now))
        except asyncio.CancelledError:
            pass
        except Exception as error:  # a bug must not end in a visit after the other
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
            self._result = VisitResult(problem=f"the visit to the CA has failed by a bug: {where}; report it")

    async def _visit(self, visit: Visit, now: datetime) -> VisitResult:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with self._lock:
            if self.is_stopped:
                raise asyncio.CancelledError
            self._cancel = partial(loop.call_soon_threadsafe, task.cancel)
        try:
            return await self.work(visit, now)
        finally:
            with self._lock:  # the loop is about to be closed
                self._cancel = lambda: None


# --- a visit -----------------------------------------------------------------------------------------------


async def carry_out(
    site: AcmeSite,
    visit: Visit,
    now: datetime,
    *,
    progress: Progress,
    fetch_url: Fetch | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    clock: Clock = system_clock,
) -> VisitResult:
    """Carry out a visit to the CA. Failures are in the result."""
    from zcproto.certs.acme.client import AcmeClient, OrderFailedError  # noqa: PLC0415 - the extra `acme`

    result, began = VisitResult(), clock.now()
    answers = ChallengeFolder(site.managed_directory)
    try:
        files.make_folder(site.directory)
        if fetch_url is None:
            fetch_url = partial(_fetch, verifying_context(site.acme.ca_file, "acme.ca_file"))
        with _sole_visit(site.directory) as is_sole:
            if not is_sole:
                return VisitResult(is_busy=True)
            wall = partial(_wall, now, began, clock)
            key = _account_key(site.directory)
            client = AcmeClient(site.acme, key, answers, fetch=fetch_url, sleep=sleep, wall=wall)
            async with asyncio.timeout(VISIT_S):
                for path in visit.ask_about:
                    with contextlib.suppress(OrderFailedError, CertificateError):
                        result.windows[path] = await client.renewal_window(pair.read_certificate(path))
                for wanted in visit.wanted:
                    progress(f"Ordering a certificate for the {wanted.key_type} key ({wanted.why}).")
                    await _order(client, site, wanted, sleep, wall)
                    result.issued.append(wanted.key_type)
    except OrderFailedError as error:
        result.problem, result.retry_after_s = str(error), error.retry_after_s
    except TimeoutError:
        result.problem = (
            f"the CA has not issued a certificate within {VISIT_S / 60:g} minutes; look at its status page"
        )
    except ZcprotoError as error:
        result.problem = str(error)
    except OSError as error:
        result.problem = f"{site.directory}: cannot be used: {error.strerror or error}; check the disk"
    return result


async def _fetch(
    context: ssl.SSLContext, method: str, url: str, headers: Sequence[tuple[str, str]], body: bytes
) -> Response:
    """Send a request to a URL that was checked."""
    return await Endpoint(url, context).send(method, headers, body, timeout=REQUEST_S, max_body=MAX_REPLY)


def _wall(began_at: datetime, began: float, clock: Clock) -> datetime:
    return began_at + timedelta(seconds=clock.now() - began)


async def _order(
    client: AcmeClient,
    site: AcmeSite,
    wanted: Wanted,
    sleep: Callable[[float], Awaitable[None]],
    wall: Callable[[], datetime],
) -> None:
    from zcproto.certs.acme.client import OrderFailedError, renewal_id  # noqa: PLC0415

    key = pair.read_private_key(wanted.key)
    replaces = None
    if wanted.replaced is not None:
        with contextlib.suppress(CertificateError):
            replaces = renewal_id(pair.read_certificate(wanted.replaced))
    names = site.acme.names
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName(general_names(names)), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain = await client.order(names, request, replaces)
    certificate_path, key_path = rollover.pair_paths(site.directory, wanted.key_type)
    try:
        issued = pair.parse_certificates(chain, certificate_path)
        with pair.parsing(certificate_path):
            ahead = (issued[0].not_valid_before_utc - wall()).total_seconds()
            if 0 < ahead <= MAX_AHEAD_S:
                await sleep(ahead)
            for check in pair.checks(issued, certificate_path, wall(), key, wanted.key):
                check()
            found = pair.names_of(issued[0])
    except CertificateError as error:
        raise OrderFailedError(f"the CA has issued a certificate that cannot be served: {error}") from error
    missing = [name for name in names if not any(covers(entry, name) for entry in found)]
    if missing:
        raise OrderFailedError(
            f"the CA has issued a certificate without {', '.join(missing)}; check certificates.names"
        )
    with files.locked(site.directory, lambda sentence: None):
        files.recover(certificate_path, key_path, pair.match)
        is_known = key_path.exists() and pair.match(chain, files.read_key_file(key_path))
        files.install(certificate_path, chain, key_path, None if is_known else keys.key_pem(key))


def _account_key(directory: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key of the account, which is made if it does not exist. Raises CertificateError."""
    path = directory / "account.key"
    if not path.exists():
        files.replace(path, keys.key_pem(keys.generate("ecdsa-p256")))
    key = pair.read_private_key(path)
    if keys.key_type_of(key) != "ecdsa-p256":
        raise CertificateError(f"{path}: is no ECDSA P-256 key; move it away to create another account")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


@contextlib.contextmanager
def _sole_visit(directory: Path) -> Iterator[bool]:
    """Hold the lock of visits; yield whether it was free."""
    path = directory / ".visit"
    with file_errors(path, "locked", CertificateError):
        descriptor = try_lock(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)
