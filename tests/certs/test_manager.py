"""Certificates that change under a running server: what new connections get, what standing ones notice."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import trustme

from tests.helpers import raising
from tests.server.helpers import EVENT, TIMEOUT, ClosedError, ServerThread, configuration
from zcproto.certs import checker, client_ca, managed
from zcproto.certs import manager as manager_module
from zcproto.certs.checker import CertificateChecker, ServingCertificates
from zcproto.certs.managed import ManagedSettings
from zcproto.certs.manager import CertificateManager
from zcproto.certs.settings import managed_site
from zcproto.common.clock import system_clock
from zcproto.config.model import Config, LogConfig
from zcproto.errors import CertificateError
from zcproto.observe import log as log_module
from zcproto.runtime.background import close_revoked
from zcproto.runtime.server import Server

DAY = timedelta(days=1)
ECDSA = {"certificates__key_types": ["ecdsa-p256"]}

Serve = Callable[..., ServerThread]


def check(server: ServerThread) -> None:
    """Have the manager look now."""
    asyncio.run_coroutine_threadsafe(server.server.parts.certificates.check(), server.loop).result(TIMEOUT)


def served(server: ServerThread, name: str | None = "localhost") -> bytes:
    """SHA-256 of the certificate that a new connection gets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["zcp/1"])
    with server.tcp() as raw, context.wrap_socket(raw, server_hostname=name) as tls:
        der = tls.getpeercert(binary_form=True)
        tls.recv(1)  # the handshake is at its end for the server, too
    assert der is not None
    return hashlib.sha256(der).digest()


def settings(server: ServerThread) -> ManagedSettings:
    chosen = managed_site(server.server.config)
    assert chosen is not None
    return chosen.settings


def wall(server: ServerThread) -> datetime:
    return datetime.fromtimestamp(server.clock.wall() / 1000, UTC)


def renew(server: Server) -> None:
    """Renew the certificates on disk, as another process does."""
    site = managed_site(server.config)
    assert site is not None
    managed.renew(site.directory, site.settings, server.parts.certificates.now())


NewConfig = Callable[..., Config]
NewManager = Callable[..., CertificateManager]


@pytest.fixture
def new_config(tmp_path: Path, certs: Path) -> NewConfig:
    """Return a function that gives the configuration of managed certificates with changes."""
    return partial(configuration, tmp_path / "home", certificates__directory=certs, **ECDSA)


@pytest.fixture
def new_manager(new_config: NewConfig) -> NewManager:
    """Return a function that makes a manager for changed settings. It is not started."""

    def make(
        *, serves: Any = lambda serving: None, maintains: bool = True, **changes: Any
    ) -> CertificateManager:
        config = new_config(**changes)
        return CertificateManager(config, system_clock, ["zcp/1"], on_serving=serves, maintains=maintains)

    return make


def notices(server: ServerThread) -> dict[str, int]:
    return dict(server.stats["certificate_notices"])


def events(err: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in err.splitlines() if line.startswith("{")]


# --- own certificates ------------------------------------------------------------------------------------------


@pytest.mark.requirement("renewal")
def test_renewal_on_disk_is_served_by_the_next_check_and_closes_no_connection(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as standing:
        before, pins = served(server), standing.call("server.info")["pins"]
        renew(server.server)
        check(server)
        after = served(server)
        assert after != before
        assert standing.call("echo", {"word": "still here"}) == {"word": "still here"}
        assert standing.call("server.info")["pins"] == pins == server.server.pins
    assert server.server.certificates[0].leaf_sha256 == after


def test_certificates_are_checked_periodically(serve: Serve) -> None:
    server = serve(certificates__watch_interval="100ms")
    before = served(server)
    renew(server.server)
    server.until(lambda: server.server.certificates[0].leaf_sha256 != before)
    assert served(server) != before


@pytest.mark.requirement("renewal")
def test_due_certificate_is_renewed_with_its_key(serve: Serve) -> None:
    server = serve()
    before, pins = served(server), server.server.pins
    server.clock.ahead_ms = 61 * 86_400_000
    check(server)
    assert served(server) != before
    assert server.server.pins == pins
    stats = server.stats
    assert stats["certificate_notices"]["renewed"] == 1
    assert stats["last_renewal"]["ok"]
    leaf, authority = stats["certificates"]
    assert (leaf["source"], leaf["key_type"], leaf["pin"]) == ("own", "ecdsa-p256", pins[0])
    assert leaf["seconds_left"] == pytest.approx(90 * 86_400, abs=120)
    assert authority["source"] == "authority"


def test_next_key_is_announced_and_used_at_its_time(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as standing, server.client() as anonymous:
        now = wall(server)
        use_from = now.replace(microsecond=0) + 3 * DAY
        chosen = replace(settings(server), announce_key=3 * DAY)
        done = managed.rotate(server.home / "certs", chosen, now)
        assert done.next_pins is not None
        check(server)
        reported = {"pins": list(done.next_pins.pins), "from": round(use_from.timestamp() * 1000)}
        for client in (standing, anonymous):
            event = client.receive()
            assert (event.kind, event.value, event.token) == (EVENT, ["pins.next", reported], bytes(32))
        with server.client() as late:
            assert late.receive().value == ["pins.next", reported]
            assert late.call("server.info")["pins_next"] == reported
        server.clock.ahead_ms = 3 * 86_400_000 + 60_000
        check(server)
        assert server.server.pins == reported["pins"]
        info = standing.call("server.info", timestamp=server.clock.wall(), token=bytes(32))
        assert (info["pins"], info["pins_next"]) == (reported["pins"], None)
    assert server.server.state.announcement is None
    assert notices(server)["key_rotated"] == 1


def test_key_announced_before_the_start_is_announced_again(tmp_path: Path, certs: Path) -> None:
    first = ServerThread(tmp_path / "home", certs)
    with first:
        managed.rotate(tmp_path / "home" / "certs", settings(first), wall(first))
    with ServerThread(tmp_path / "home", certs) as server, server.client() as client:
        assert client.receive().value[0] == "pins.next"


def test_disk_failure_changes_nothing_and_is_reported_once(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(certificates__watch_interval="1h")
    before = served(server)
    server.clock.ahead_ms = 61 * 86_400_000
    with monkeypatch.context() as patched:
        patched.setattr("zcproto.certs.files._stage", raising(OSError(28, "No space left on device")))
        for _ in range(3):
            check(server)
    assert served(server) == before
    assert notices(server) == {"loaded": 1, "renewal_failed": 1, "expiry": 1}
    server.clock.ahead_ms += 86_400_000
    check(server)
    assert served(server) != before
    assert notices(server)["renewal_recovered"] == 1


# --- contexts that do not prove themselves ----------------------------------------------------------------------


def test_context_that_fails_its_handshake_is_not_served(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(certificates__watch_interval="1h")
    before = served(server)
    renew(server.server)
    with monkeypatch.context() as patched:
        patched.setattr(checker, "proven_sites", raising(CertificateError("NO_SHARED_CIPHER")))
        for _ in range(3):
            check(server)
    assert served(server) == before
    assert notices(server) == {"loaded": 1}
    check(server)
    assert served(server) != before
    assert notices(server) == {"loaded": 2}


async def test_failed_context_is_logged_once_and_an_internal_error_each_time(
    tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ServerThread(tmp_path / "home", certs, certificates__watch_interval="1h").server
    async with server:
        manager = server.parts.certificates
        before = server.certificates
        renew(server)
        with monkeypatch.context() as patched:
            for error, times in (
                (CertificateError("it is bad"), 3),
                (CertificateError("it is worse"), 1),
                (MemoryError(), 2),
            ):
                patched.setattr(checker, "proven_sites", raising(error))
                for _ in range(times):
                    await manager.check()
        assert server.certificates == before
        await manager.check()
        assert server.certificates != before
    failures = {"certificate.not_used", "certificate.look_failed"}
    reported = [event for event in events(capsys.readouterr().err) if event["event"] in failures]
    assert [event["event"] for event in reported] == [
        *("certificate.not_used", "certificate.not_used"),
        *("certificate.look_failed", "certificate.look_failed"),
    ]
    assert [event["message"] for event in reported[:2]] == ["it is bad", "it is worse"]


@pytest.mark.requirement("fallback")
async def test_server_does_not_start_without_a_working_context(
    tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ServerThread(tmp_path / "home", certs).server
    monkeypatch.setattr(checker, "proven_sites", raising(CertificateError("no")))
    with pytest.raises(CertificateError, match="no"):
        await server.start()
    with pytest.raises(AssertionError, match="not been started"):
        _ = server.port


# --- the checking thread -----------------------------------------------------------------------------------------


async def test_loop_is_called_only_for_news(
    tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ServerThread(tmp_path / "home", certs, certificates__watch_interval="1h").server
    async with server:
        manager = server.parts.certificates
        handed: list[Callable[[], None]] = []
        manager._check_and_report(handed.append)
        manager._check_and_report(handed.append)
        assert handed == []
        renew(server)
        manager._check_and_report(handed.append)
        manager._check_and_report(handed.append)
        assert len(handed) == 1
        with monkeypatch.context() as patched:
            patched.setattr(CertificateChecker, "check", raising(CertificateError("it is bad")))
            manager._check_and_report(handed.append)
        manager._check_and_report(handed.append)  # the recovery is reported as well
        manager._check_and_report(handed.append)
        assert len(handed) == 3
        problems: list[str] = []
        manager._on_problem = problems.append
        before = server.certificates
        for report in handed:
            report()
        assert server.certificates != before
        assert problems == ["it is bad", ""]


def test_thread_applies_news_and_ends_with_the_server(tmp_path: Path, certs: Path) -> None:
    others = set(threading.enumerate())
    with ServerThread(tmp_path / "home", certs, certificates__watch_interval="100ms") as server:
        before = served(server)
        (thread,) = [each for each in {*threading.enumerate()} - others if each.name == manager_module.THREAD]
        renew(server.server)
        server.until(lambda: server.server.certificates[0].leaf_sha256 != before)
    thread.join(TIMEOUT)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("is_incomplete", "wait"), [(False, manager_module.RARE_S), (True, manager_module.SOON)]
)
async def test_process_that_does_not_maintain_checks_rarely_by_itself(
    new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, is_incomplete: bool, wait: float
) -> None:
    manager = new_manager(maintains=False)
    manager.checker = Mock(is_incomplete=is_incomplete)
    steps: list[object] = []

    async def sleep(seconds: float) -> None:
        if len(steps) == 4:
            raise asyncio.CancelledError
        steps.append(seconds)

    async def check() -> None:
        steps.append("check")

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(manager, "check", check)
    with pytest.raises(asyncio.CancelledError):
        await manager.run()
    assert steps == [wait, "check", wait, "check"]


async def test_thread_that_cannot_be_started_is_retried(
    new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = new_manager(certificates__watch_interval="100ms")
    started = asyncio.Event()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(manager, "_check_and_report", lambda hand: loop.call_soon_threadsafe(started.set))
    real = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", real)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    running = asyncio.create_task(manager.run())
    await asyncio.wait_for(started.wait(), TIMEOUT)
    running.cancel()
    await asyncio.wait({running})
    (reported,) = events(capsys.readouterr().err)
    assert reported["event"] == "certificate.look_failed"


def test_result_after_the_end_of_the_loop_or_the_watch_is_dropped(new_manager: NewManager) -> None:
    manager = new_manager(serves=raising(AssertionError()))
    manager.interval = 0.0
    ended = threading.Event()
    loop = asyncio.new_event_loop()
    checks = 0

    def check_and_report(hand: Callable[[manager_module.Report], object]) -> None:
        nonlocal checks
        checks += 1
        if checks == 1:
            hand(raising(AssertionError()))  # dropped: the watch is over when the loop runs it
            ended.set()
            loop.run_until_complete(asyncio.sleep(0))
            ended.clear()
        else:
            loop.close()
            hand(raising(AssertionError()))

    manager._check_and_report = check_and_report  # type: ignore[method-assign]
    manager._watch(loop, ended)
    assert checks == 2


LEFT_ALONE = """
import asyncio, sys
from pathlib import Path
from zcproto import Server
from zcproto.config import load_config

home = Path(sys.argv[1])
overrides = {"server.port": 0, "certificates.key_types": ["ecdsa-p256"], "certificates.watch_interval": "1h"}
config = load_config(None, home=home, environ={}, overrides={**overrides, "store.url": "memory"})
asyncio.new_event_loop().run_until_complete(Server(config=config, home=home).start())
print("started")
"""


def test_program_that_does_not_stop_its_server_exits(tmp_path: Path, certs: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copytree(certs, home / "certs")
    ended = subprocess.run(
        [sys.executable, "-c", LEFT_ALONE, str(home)], capture_output=True, timeout=TIMEOUT, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, b"started\n"), ended.stderr


class Impatient(threading.Event):
    """An event that records timeouts instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return False


async def test_changed_settings_are_checked_and_adopted_together_with_the_rest(
    new_config: NewConfig, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[ServingCertificates] = []
    manager = new_manager(serves=served.append)
    await manager.start()
    with monkeypatch.context() as patched:
        patched.setattr(manager, "_checker_for", raising(AssertionError("certificates are checked")))
        applied: list[int] = []
        assert not await manager.reconfigure(
            new_config(certificates__watch_interval="1h"), lambda: applied.append(len(served))
        )
        assert (applied, manager.interval) == ([1], 3600.0)
    with pytest.raises(ValueError, match="not now"):
        await manager.reconfigure(new_config(certificates__renew_before="9d"), raising(ValueError("not now")))
    assert len(served) == 1
    assert await manager.reconfigure(
        new_config(certificates__renew_before="10d"), lambda: applied.append(len(served))
    )
    assert (applied, len(served)) == ([1, 1], 2)


async def test_settings_that_cannot_be_applied_are_not_adopted(
    new_config: NewConfig, new_manager: NewManager
) -> None:
    served: list[ServingCertificates] = []
    manager = new_manager(serves=served.append)
    await manager.start()
    before = manager.checker, manager.interval
    changed = new_config(certificates__renew_before="9d", certificates__watch_interval="1h")
    for _ in range(2):  # the second attempt finds the old settings
        with pytest.raises(ValueError, match="not now"):
            await manager.reconfigure(changed, raising(ValueError("not now")))
        assert (manager.checker, manager.interval) == before
    with pytest.raises(ValueError, match="not now"):
        await manager.reconfigure(
            new_config(certificates__watch_interval="1h"), raising(ValueError("not now"))
        )
    assert manager.interval == before[1]
    assert len(served) == 1
    await manager.check()
    assert await manager.reconfigure(changed, lambda: None)
    assert (manager.interval, len(served)) == (3600.0, 2)


def test_settings_are_not_adopted_after_the_end_of_the_loop(
    new_config: NewConfig, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager_module, "LONGEST_WAIT", 0.01)
    changed, manager = new_config(certificates__renew_before="9d"), new_manager()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(manager.start())
    before = manager.checker
    waits = threading.Semaphore(0)

    def count(futures: Any, timeout: float) -> Any:
        waits.release()
        return wait(futures, timeout)

    monkeypatch.setattr(manager_module, "wait", count)
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *arguments: None)  # the loop runs nothing more
    reconfiguring = loop.create_task(manager.reconfigure(changed, raising(AssertionError("applied"))))
    loop.run_until_complete(asyncio.sleep(0))
    for _ in range(2):
        assert waits.acquire(timeout=TIMEOUT)
    loop.close()
    with manager._checking:  # the thread ends
        assert manager.checker is before
    # Its loop is closed on purpose; asyncio would log that it never ended.
    reconfiguring._log_destroy_pending = False  # type: ignore[attr-defined]


def test_long_wait_has_its_full_length(new_manager: NewManager) -> None:
    manager = new_manager(certificates__watch_interval="1300ms")
    event = Impatient()
    assert manager._waited(event)
    assert sum(event.waits) == pytest.approx(1.3)
    assert max(event.waits) <= manager_module.LONGEST_WAIT


# --- certificates of others -------------------------------------------------------------------------------------


def write_pair(issued: trustme.LeafCert, certificate: Path, key: Path) -> bytes:
    """Write a pair of files; SHA-256 of the certificate."""
    issued.cert_chain_pems[0].write_to_path(certificate)
    key.touch(0o600)
    issued.private_key_pem.write_to_path(key)
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())).digest()


def external(certificate: Path, key: Path) -> dict[str, Any]:
    """Return the settings with which these files are served."""
    return {
        "certificates__mode": "files",
        "certificates__certificate": [certificate],
        "certificates__key": [key],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "others"
    made.mkdir(0o700)
    return made


@pytest.mark.requirement("renewal")
def test_external_certificates_are_served_and_watched(serve: Serve, ca: trustme.CA, folder: Path) -> None:
    certificate, key = folder / "server.pem", folder / "server.key"
    first = write_pair(ca.issue_cert("localhost"), certificate, key)
    server = serve(**external(certificate, key))
    assert served(server) == first
    second = ca.issue_cert("localhost")
    second.cert_chain_pems[0].write_to_path(certificate)  # the key comes later: half is not taken
    check(server)
    assert served(server) == first
    assert write_pair(second, certificate, key) != first
    check(server)
    assert served(server) == write_pair(second, certificate, key)
    certificate.write_text("damaged")
    check(server)
    assert served(server) != first
    assert not (server.home / "certs" / "server.crt").exists()


async def test_check_between_certificate_and_key_is_repeated_soon(
    tmp_path: Path, ca: trustme.CA, folder: Path
) -> None:
    certificate, key = folder / "server.pem", folder / "server.key"
    write_pair(ca.issue_cert("localhost"), certificate, key)
    config = configuration(
        tmp_path / "home", **external(certificate, key), certificates__watch_interval="300ms"
    )
    manager = CertificateManager(config, system_clock, ["zcp/1"])
    await manager.start()
    ca.issue_cert("localhost").cert_chain_pems[0].write_to_path(certificate)
    waits = []
    for _ in range(2):
        await manager.check()
        event = Impatient()
        assert manager._waited(event)
        waits.append(sum(event.waits))
    assert waits == [manager_module.SOON, 0.3]


def test_each_name_gets_the_certificate_of_its_site(serve: Serve, ca: trustme.CA, folder: Path) -> None:
    sites, expected = [], {}
    for name in ("a.example", "*.b.example"):
        files = folder / f"{name.strip('*.')}.pem", folder / f"{name.strip('*.')}.key"
        expected[name] = write_pair(ca.issue_cert(name), *files)
        sites.append({"names": [name], "certificate": [files[0]], "key": [files[1]]})
    server = serve(certificates__site=sites)
    default = server.server.certificates[0].leaf_sha256
    assert served(server, "a.example") == expected["a.example"]
    assert served(server, "A.Example") == expected["a.example"]
    assert served(server, "x.b.example") == expected["*.b.example"]
    for name in ("localhost", "b.example", "x.y.b.example", "unknown.example", None):
        assert served(server, name) == default


def test_site_with_damaged_files_does_not_delay_the_others(
    serve: Serve, ca: trustme.CA, folder: Path
) -> None:
    files = folder / "a.pem", folder / "a.key"
    of_site = write_pair(ca.issue_cert("a.example"), *files)
    site = {"names": ["a.example"], "certificate": [files[0]], "key": [files[1]]}
    server = serve(certificates__site=[site])
    before = served(server)
    files[0].write_text("damaged")
    renew(server.server)
    check(server)
    assert served(server) != before
    assert served(server, "a.example") == of_site


@pytest.mark.requirement("expiry_alerts")
async def test_near_expiry_of_an_external_certificate_is_reported(
    tmp_path: Path, ca: trustme.CA, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    issued = ca.issue_cert("localhost", not_after=datetime.now(UTC) + 5 * DAY)
    write_pair(issued, folder / "a.pem", folder / "a.key")
    home = tmp_path / "home"
    config = configuration(home, **external(folder / "a.pem", folder / "a.key"))
    log_module.configure_logging(LogConfig(level="info", format="json"))
    async with Server(config=config, home=home) as server:
        await server.parts.certificates.check()
        pins = server.pins
        alerts = server.parts.alerts.report()["open"]
    loaded, reported = [
        event for event in events(capsys.readouterr().err) if event["event"].startswith("certificate.")
    ]
    assert (loaded["event"], loaded["pins"]) == ("certificate.loaded", pins)
    assert (reported["event"], reported["level"]) == ("certificate.expiry", "warning")
    assert (reported["threshold_days"], reported["days_left"]) == (7, 4)
    assert ("certificate.expiry", str(folder / "a.pem")) in [(each["kind"], each["about"]) for each in alerts]


# --- certificates of clients ------------------------------------------------------------------------------------


def shown(server: ServerThread, issued: client_ca.ClientCertificate) -> Any:
    """A connection that shows a client's certificate."""
    from zcproto.client.blocking import connect_blocking

    assert issued.key is not None
    return connect_blocking(
        f"localhost:{server.port}",
        ca_file=server.home / "certs" / "ca.crt",
        certificate=issued.certificate,
        certificate_key=issued.key,
        session=False,
        home=server.home / "client",
    )


def test_connection_with_a_revoked_client_certificate_is_closed_and_others_are_kept(serve: Serve) -> None:
    server = serve(tls__client_auth="optional")
    folder, now = server.home / "certs", datetime.now(UTC)
    good, bad = (client_ca.issue_client(folder, name, lifetime=30 * DAY, now=now) for name in ("good", "bad"))
    with shown(server, good) as first, shown(server, bad) as second, server.client("ada") as third:
        for client in (first, second):
            assert client.call("server.info")["versions"] == [1]
        client_ca.revoke_client(folder, name="bad", now=now)
        check(server)
        server.until(lambda: server.server.state.counters.connections_ended.get("certificate_revoked") == 1)
        assert first.call("server.info")["versions"] == [1]
        assert third.call("echo", {"word": "x"}) == {"word": "x"}
    assert notices(server)["client_trust_loaded"] >= 1


def test_revocation_checks_many_connections_over_several_turns(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcproto.server.state.CONNECTIONS_PER_TURN", 1)
    server = serve()
    with server.client("ada") as one, server.client("bob") as other:
        asyncio.run_coroutine_threadsafe(
            close_revoked(server.server.parts, frozenset({(b"", 1)})), server.loop
        ).result(TIMEOUT)
        assert one.call("echo") == other.call("echo") == {}


def test_client_without_a_certificate_is_refused_where_one_is_required(serve: Serve) -> None:
    server = serve(tls__client_auth="required")
    with pytest.raises((ClosedError, ssl.SSLError)):
        server.client()
    server.until(lambda: server.server.parts.acceptor.failures[_failure("certificate_required")])


def _failure(value: str) -> Any:
    from zcproto.tls.failure import TlsFailure

    return TlsFailure(value)


# --- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wall_ms", "year"), [(-1, 1970), (0, 1970), (1_800_000_000_000, 2027), (2**63, 9999)]
)
def test_any_wall_clock_is_a_date(tmp_path: Path, wall_ms: int, year: int) -> None:
    class Clock:
        def wall(self) -> int:
            return wall_ms

        def now(self) -> float:
            return 0.0

    manager = CertificateManager(
        configuration(tmp_path),
        Clock(),
        ["zcp/1"],
        on_serving=raising(AssertionError()),
        on_next_pins=raising(AssertionError()),
    )
    assert manager.now().year in (year, year - 1)
