"""Test visits to a CA: the account, orders, challenges, what is installed, and every kind of failure."""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
import stat
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.certs.acme.fake_ca import Problem, at
from tests.certs.acme.support import NAMES, Desk, acme_site, wanted
from tests.certs.harness import disk_fails
from tests.certs.support import DAY, NOW, build, pem, pem_of_key
from tests.conftest import ServerPairs
from tests.helpers import raising
from tests.server.helpers import TIMEOUT
from zcproto.certs import keys, managed
from zcproto.certs.acme import orders
from zcproto.certs.acme.client import renewal_id
from zcproto.certs.acme.orders import Visit, VisitResult, VisitThread, carry_out
from zcproto.certs.pair import load_pair
from zcproto.certs.settings import HTTP
from zcproto.common.files import try_lock
from zcproto.common.https import Response


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_desk(tmp_path)


def make_desk(folder: Path, **changes: Any) -> Desk:
    site = acme_site(folder, **changes)
    managed.ensure(site.managed_directory, site.managed, NOW)
    return Desk(site)


async def order(desk: Desk, **changes: Any) -> VisitResult:
    return await desk.visit(Visit((wanted(desk.site, **changes),)))


def certificate_of(desk: Desk) -> x509.Certificate:
    return x509.load_pem_x509_certificate((desk.site.directory / "server-ecdsa.crt").read_bytes())


# --- success -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("challenge", ["tls-alpn-01", "http-01"])
async def test_first_order_creates_an_account_and_installs_a_certificate(
    tmp_path: Path, challenge: str
) -> None:
    desk = make_desk(tmp_path, challenge=challenge, contact=("ops@example.com",))
    result = await order(desk)
    assert (result.issued, result.problem) == (["ecdsa-p256"], "")
    folder = desk.site.directory
    pair = load_pair(folder / "server-ecdsa.crt", folder / "server-ecdsa.key", NOW)
    assert pair.names == NAMES
    assert (
        pair.pin
        == load_pair(
            desk.site.managed_directory / "server-ecdsa.crt",
            desk.site.managed_directory / "server-ecdsa.key",
            NOW,
        ).pin
    )
    (account,) = desk.ca.accounts.values()
    assert account["contact"] == ["mailto:ops@example.com"]
    assert desk.sentences == ["Ordering a certificate for the ecdsa-p256 key (a test)."]
    assert list((folder / "challenges").iterdir()) == []
    for path in (folder, folder / "challenges", folder / "account.key", folder / "server-ecdsa.key"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


async def test_second_order_uses_the_account_and_keeps_the_key_file(desk: Desk) -> None:
    await order(desk)
    key = desk.site.directory / "server-ecdsa.key"
    before, identity = certificate_of(desk), os.stat(key).st_ino
    assert (await order(desk)).problem == ""
    assert len(desk.ca.accounts) == 1
    assert certificate_of(desk).serial_number != before.serial_number
    assert os.stat(key).st_ino == identity


async def test_order_for_a_new_key_replaces_both_files(desk: Desk) -> None:
    await order(desk)
    site = desk.site
    managed.rotate(site.managed_directory, site.managed, NOW, at_once=True)
    assert (await order(desk)).problem == ""
    key = (site.directory / "server-ecdsa.key").read_bytes()
    assert key == (site.managed_directory / "server-ecdsa.key").read_bytes()
    load_pair(site.directory / "server-ecdsa.crt", site.directory / "server-ecdsa.key", NOW)


async def test_order_names_the_certificate_that_it_replaces(desk: Desk) -> None:
    await order(desk)
    before = certificate_of(desk)
    assert (await order(desk, replaced=desk.site.directory / "server-ecdsa.crt")).problem == ""
    assert desk.ca.orders[-1]["replaces"] == renewal_id(before)


async def test_order_is_repeated_without_the_certificate_that_was_replaced_before(desk: Desk) -> None:
    await order(desk)
    old = desk.site.directory / "old.crt"
    old.write_bytes((desk.site.directory / "server-ecdsa.crt").read_bytes())
    assert (await order(desk, replaced=old)).problem == ""
    assert (await order(desk, replaced=old)).problem == ""
    assert [each["replaces"] is None for each in desk.ca.orders] == [True, False, True]


async def test_unreadable_certificate_is_replaced_without_naming_it(desk: Desk) -> None:
    assert (await order(desk, replaced=desk.site.directory / "none.crt")).problem == ""
    assert desk.ca.orders[-1]["replaces"] is None


async def test_valid_authorizations_need_no_challenge(desk: Desk) -> None:
    await order(desk)
    desk.ca.reuses_authorizations = True
    checked: list[str] = []
    desk.ca.check = lambda kind, name, token, text: checked.append(name) or ""  # type: ignore[func-returns-value]
    assert (await order(desk)).problem == ""
    assert checked == []


async def test_rsa_key_is_certified_too(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    desk = make_desk(tmp_path)
    key = desk.site.managed_directory / "server.key"
    key.touch(0o600)
    key.write_bytes(pem_of_key(rsa_key))
    assert (await order(desk, key_type="rsa-2048", key=key)).issued == ["rsa-2048"]
    load_pair(desk.site.directory / "server.crt", desk.site.directory / "server.key", NOW)


@pytest.mark.parametrize(
    ("name", "server_name"),
    [
        ("192.0.2.7", "7.2.0.192.in-addr.arpa"),
        ("2001:db8::1", "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa"),
    ],
)
async def test_address_is_checked_by_its_reverse_name(tmp_path: Path, name: str, server_name: str) -> None:
    """RFC 8738 section 6."""
    desk = make_desk(tmp_path, managed={"names": (name,)}, names=(name,))
    found: list[list[str]] = []

    def check(kind: str, name: str, token: str, text: str) -> str:
        found.append([path.name for path in (desk.site.directory / "challenges").iterdir()])
        return ""

    desk.ca.check = check
    assert (await order(desk)).problem == ""
    assert found == [[f"tls-alpn-01.{server_name}.pem"]]


async def test_rejected_nonces_are_replaced(desk: Desk) -> None:
    desk.ca.reject_nonces = 12
    assert (await order(desk)).problem == ""


async def test_polls_wait_as_long_as_the_ca_wants(desk: Desk) -> None:
    desk.ca.polls_until_checked, desk.ca.polls_until_issued = 3, 4
    desk.ca.retry_after = {"retry-after": "7"}
    assert (await order(desk)).problem == ""
    assert desk.sleeps.seconds
    assert set(desk.sleeps.seconds) == {7.0}


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.25),
        ("86400", 30.0),
        (at(NOW + timedelta(seconds=9)), 1.0),
        ("999999999999", 1.0),
        ("soon", 1.0),
    ],
)
async def test_polls_are_bounded(desk: Desk, header: str, seconds: float) -> None:
    desk.ca.polls_until_checked = 2
    desk.ca.retry_after = {"retry-after": header}
    assert (await order(desk)).problem == ""
    assert desk.sleeps.seconds[0] == seconds


async def test_retry_after_may_be_a_date(desk: Desk) -> None:
    desk.ca.polls_until_checked = 2
    desk.ca.retry_after = {"retry-after": (NOW + timedelta(seconds=9)).strftime("%a, %d %b %Y %H:%M:%S GMT")}
    assert (await order(desk)).problem == ""
    assert 8.0 < desk.sleeps.seconds[0] <= 9.0


async def test_external_account_is_bound_once(tmp_path: Path) -> None:
    desk = make_desk(tmp_path, eab_kid="kid-1", eab_key_file=tmp_path / "eab")
    desk.ca.eab = ("kid-1", b"0123456789abcdef0123456789abcdef")
    (tmp_path / "eab").touch(0o600)
    (tmp_path / "eab").write_text("MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY\n")
    assert (await order(desk)).problem == ""
    (tmp_path / "eab").unlink()  # it is needed no more
    assert (await order(desk)).problem == ""


# --- failures ----------------------------------------------------------------------------------------------


async def test_failed_check_names_the_reason_and_the_port(desk: Desk) -> None:
    desk.ca.check = lambda kind, name, token, text: f"no route to {name}\x1b[31m" if name == NAMES[1] else ""
    result = await order(desk)
    assert result.issued == []
    assert result.problem == (
        "the CA could not check www.example.com by tls-alpn-01: no route to www.example.com\\x1b[31m; the CA must"
        " reach server.port of this server as port 443 of that name"
    )
    assert list((desk.site.directory / "challenges").iterdir()) == []
    assert not (desk.site.directory / "server-ecdsa.crt").exists()


async def test_failed_check_by_http_names_the_other_port(tmp_path: Path) -> None:
    desk = make_desk(tmp_path, challenge=HTTP)
    desk.ca.check = lambda kind, name, token, text: "no"
    assert "http.redirect_port of this server as port 80" in (await order(desk)).problem


async def test_rate_limit_is_reported_with_the_time_to_wait(desk: Desk) -> None:
    desk.ca.problem_at["/order"] = Problem("rateLimited", 429, "too many certificates", retry_after="3600")
    result = await order(desk)
    assert result.problem == (
        "ca.example answered 429: too many certificates; wait; the next attempt is made when the CA allows it"
    )
    assert result.retry_after_s == 3600.0


async def test_ca_cannot_stop_renewals_for_ever(desk: Desk) -> None:
    desk.ca.problem_at["/order"] = Problem("rateLimited", 429, retry_after="999999999")
    assert (await order(desk)).retry_after_s == 86_400.0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"down": "ca.example cannot be reached: Connection refused"},
            "Connection refused; check acme.directory",
        ),
        ({"reject_nonces": 10_000}, "ca.example accepts no nonce"),
        ({"extra_directory": {"newOrder": "http://ca.example/order"}}, "an address that is not https"),
        ({"extra_directory": {"newAccount": None}}, "an address that is not https"),
        ({"extra_directory": {"newAccount": "https://:443/"}}, "an address that is not https"),
        ({"extra_directory": {"newAccount": "https://ca.example:99999/"}}, "an address that is not https"),
        ({"extra_directory": {"newAccount": "https://ca.example/\r\nX: y"}}, "an address that is not https"),
        ({"extra_directory": {"meta": 7}}, "something else than ACME"),
        (
            {"challenge_types": ["dns-01"]},
            "does not check zcp.example.com by tls-alpn-01; set acme.challenge",
        ),
        (
            {"names": lambda names: names[:1]},
            "a certificate without www.example.com; check certificates.names",
        ),
        ({"lifetime": timedelta(days=-1)}, "a certificate that cannot be served: "),
        (
            {"problem_at": {"/dir": Problem("serverInternal", 500, "down for maintenance")}},
            "down for maintenance",
        ),
        ({"problem_at": {"/nonce": Problem("", 503)}}, "ca.example answered 503"),
        (
            {"problem_at": {"/account": Problem("userActionRequired", 403)}},
            "follow the instructions of the CA",
        ),
        ({"eab": ("kid-1", b"key")}, "set acme.eab_kid and acme.eab_key_file"),
    ],
)
async def test_failure_is_reported_with_its_cure(desk: Desk, change: dict[str, Any], problem: str) -> None:
    for name, value in change.items():
        setattr(desk.ca, name, value)
    result = await order(desk)
    assert result.issued == []
    assert problem in result.problem
    assert not (desk.site.directory / "server-ecdsa.crt").exists()


async def test_ca_whose_clock_is_ahead_is_waited_for(desk: Desk) -> None:
    desk.ca.ahead = timedelta(hours=1, seconds=20)
    assert (await order(desk)).problem == ""
    assert 19.0 < desk.sleeps.seconds[-1] <= 20.0


async def test_certificate_of_another_time_is_refused(desk: Desk) -> None:
    desk.ca.ahead = timedelta(hours=2)
    assert "is not valid before" in (await order(desk)).problem


async def test_last_good_certificate_is_kept_if_the_new_one_cannot_be_served(desk: Desk) -> None:
    await order(desk)
    before = certificate_of(desk)
    desk.ca.names = lambda names: ["other.example"]
    assert "without" in (await order(desk)).problem
    assert certificate_of(desk) == before


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"status": "of the future"}'])
async def test_anything_but_acme_is_a_failure(desk: Desk, data: bytes) -> None:
    real = desk.ca.fetch

    async def fetch(method: str, url: str, *more: Any) -> Any:
        reply = await real(method, url, *more)
        return reply._replace(body=data) if "/order" in url else reply

    desk.ca.fetch = fetch  # type: ignore[method-assign]
    assert "something else than ACME; check acme.directory" in (await order(desk)).problem


@pytest.mark.parametrize("nonce", ["*", "a", None])
async def test_ca_without_nonces_is_a_failure(desk: Desk, nonce: str | None) -> None:
    real = desk.ca.fetch

    async def fetch(*request: Any) -> Response:
        reply = await real(*request)
        fields = {**reply.headers, "replay-nonce": nonce} if nonce else {}
        return reply._replace(headers=fields)

    desk.ca.fetch = fetch  # type: ignore[method-assign, assignment]
    assert "ca.example accepts no nonce" in (await order(desk)).problem


async def test_error_of_a_proxy_is_a_failure(desk: Desk) -> None:
    async def fetch(*request: Any) -> Response:
        return Response(502, b"<html>bad gateway</html>", {"retry-after": "120"})

    desk.ca.fetch = fetch  # type: ignore[method-assign]
    result = await order(desk)
    assert result.problem == "ca.example answered 502; check [acme], or try again later"
    assert result.retry_after_s == 120.0


async def test_order_without_a_status_is_a_failure(desk: Desk) -> None:
    real = desk.ca.shown

    def shown(number: int) -> dict[str, Any]:
        return {name: value for name, value in real(number).items() if name != "status"}

    desk.ca.shown = shown  # type: ignore[method-assign]
    assert "the CA has refused the order: its status is missing" in (await order(desk)).problem


async def test_visit_orders_for_several_keys_with_one_account(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    desk = make_desk(tmp_path)
    key = desk.site.managed_directory / "server.key"
    key.touch(0o600)
    key.write_bytes(pem_of_key(rsa_key))
    both = (wanted(desk.site, key_type="rsa-2048", key=key), wanted(desk.site))
    assert (await desk.visit(Visit(both))).issued == ["rsa-2048", "ecdsa-p256"]
    assert [path for method, path in desk.ca.requests].count("/account") == 2  # looked for, then created


async def test_requests_go_over_verified_tls(
    tmp_path: Path, server_pairs: ServerPairs, ca_file: Path
) -> None:
    lines: list[bytes] = []

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines.append(head.partition(b"\r\n")[0])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nno ACME")
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(server_pairs.ecdsa.certificate, server_pairs.ecdsa.key)
    async with await asyncio.start_server(reply, "localhost", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        for trusted, problem in (
            (ca_file, "the CA has sent something else than ACME; check acme.directory"),
            (None, "the certificate of localhost is not trusted: "),
        ):
            directory = f"https://localhost:{port}/dir"
            site = make_desk(tmp_path / str(trusted is None), directory=directory, ca_file=trusted).site
            result = await carry_out(site, Visit((wanted(site),)), NOW, progress=lambda sentence: None)
            assert problem in result.problem
    assert lines == [b"GET /dir HTTP/1.1"]


async def test_refused_order_is_a_failure(desk: Desk) -> None:
    real = desk.ca.shown

    def refused(number: int) -> dict[str, Any]:
        shown = real(number)
        return shown | (
            {"status": "invalid", "error": {"type": "x", "title": "no"}} if shown["status"] == "valid" else {}
        )

    desk.ca.shown = refused  # type: ignore[method-assign]
    assert "the CA has refused the order: no; check certificates.names" in (await order(desk)).problem


async def test_name_that_was_not_ordered_is_not_answered(desk: Desk) -> None:
    real = desk.ca.authorization_of
    desk.ca.authorization_of = lambda name: real("evil.example")  # type: ignore[method-assign]
    assert "a name that was not ordered" in (await order(desk)).problem


async def test_binding_needs_a_key_in_base64url(tmp_path: Path) -> None:
    desk = make_desk(tmp_path, eab_kid="kid-1", eab_key_file=tmp_path / "eab")
    assert "acme.eab_key_file: " in (await order(desk)).problem
    (tmp_path / "eab").touch(0o600)
    (tmp_path / "eab").write_text("a")
    assert "holds no key in base64url" in (await order(desk)).problem


async def test_account_key_of_another_type_is_refused(desk: Desk, rsa_key: rsa.RSAPrivateKey) -> None:
    await order(desk)
    (desk.site.directory / "account.key").write_bytes(pem_of_key(rsa_key))
    assert "account.key: is no ECDSA P-256 key; move it away" in (await order(desk)).problem


async def test_full_disk_is_a_failure(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_fails(monkeypatch, errno.ENOSPC, "fsync")
    assert "No space left on device" in (await order(desk)).problem


async def test_failing_disk_is_a_failure(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "_account_key", raising(OSError(errno.EIO, "Input/output error")))
    assert "cannot be used: Input/output error; check the disk" in (await order(desk)).problem


async def test_visit_ends_after_its_time(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.ca.polls_until_checked = 2
    desk.sleeps = asyncio.sleep  # type: ignore[assignment]
    monkeypatch.setattr(orders, "VISIT_S", 0.0)
    assert "within 0 minutes" in (await order(desk)).problem


async def test_only_one_process_visits_the_ca(desk: Desk) -> None:
    await order(desk)
    descriptor = try_lock(desk.site.directory / ".visit")
    assert descriptor is not None
    try:
        assert (await order(desk)).is_busy
    finally:
        os.close(descriptor)
    assert (await order(desk)).problem == ""


# --- renewal information -----------------------------------------------------------------------------------


async def test_renewal_window_is_asked(desk: Desk) -> None:
    await order(desk)
    desk.ca.window = {"start": at(NOW + 3 * DAY), "end": at(NOW + 5 * DAY)}
    desk.ca.retry_after = {"retry-after": "600"}
    path = desk.site.directory / "server-ecdsa.crt"
    (window,) = (await desk.visit(Visit(ask_about=(path,)))).windows.values()
    assert window is not None
    assert (window.start, window.end) == tuple((NOW + days * DAY).replace(microsecond=0) for days in (3, 5))
    assert window.ask_again_s == 600.0
    assert desk.ca.asked == [renewal_id(certificate_of(desk))]


@pytest.mark.parametrize(
    "window",
    [
        None,
        {},
        {"start": at(NOW)},
        {"start": at(NOW), "end": at(NOW)},
        {"start": at(NOW + DAY), "end": at(NOW)},
    ],
)
async def test_invalid_window_counts_as_none(desk: Desk, window: Any) -> None:
    await order(desk)
    desk.ca.window = window
    result = await desk.visit(Visit(ask_about=(desk.site.directory / "server-ecdsa.crt",)))
    assert list(result.windows.values()) == [None]


async def test_failed_question_fails_nothing(desk: Desk) -> None:
    await order(desk)
    desk.ca.down = "gone"
    paths = (desk.site.directory / "server-ecdsa.crt", desk.site.directory / "none.crt")
    assert await desk.visit(Visit(ask_about=paths)) == VisitResult()


def test_renewal_id_is_that_of_the_standard() -> None:
    """RFC 9773 section 4.1."""
    key = keys.generate("ecdsa-p256")
    key_id = bytes.fromhex("69885B6B87464041E1B37B847BA0AE2CDE01C8D4")
    certificate = (
        x509.CertificateBuilder(serial_number=0x87654321, public_key=key.public_key())
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .not_valid_before(NOW)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.AuthorityKeyIdentifier(key_id, None, None), critical=False)
        .sign(key, hashes.SHA256())
    )
    assert renewal_id(certificate) == "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"


@pytest.mark.parametrize("extensions", [(), (x509.AuthorityKeyIdentifier(None, None, None),)])
async def test_certificate_without_key_identifier_is_not_asked_about(
    desk: Desk, extensions: tuple[x509.ExtensionType, ...]
) -> None:
    certificate = build(keys.generate("ecdsa-p256"), extensions=extensions)
    assert renewal_id(certificate) is None
    await order(desk)
    desk.ca.window = {"start": at(NOW), "end": at(NOW + DAY)}
    path = desk.site.directory / "old.crt"
    path.write_bytes(pem(certificate))
    assert (await desk.visit(Visit(ask_about=(path,)))).windows == {path: None}
    assert desk.ca.asked == []


# --- the thread --------------------------------------------------------------------------------------------


def test_stop_ends_a_visit_at_once() -> None:
    begun = threading.Event()

    async def work(visit: Visit, now: Any) -> VisitResult:
        begun.set()
        await asyncio.sleep(3600)
        raise AssertionError

    thread = VisitThread(work)
    thread.begin(Visit(), NOW)
    assert begun.wait(TIMEOUT)
    assert thread.is_running
    assert thread.take_result() is None
    thread.stop()
    thread.wait(TIMEOUT)
    assert thread.take_result() is None
    assert not thread.is_running
    thread.begin(Visit(), NOW)  # stopped: ends without work
    thread.wait(TIMEOUT)
    assert thread.take_result() is None


def test_bug_is_a_failure_with_its_place() -> None:
    async def work(visit: Visit, now: Any) -> VisitResult:
        raise KeyError("secret")

    thread = VisitThread(work)
    thread.begin(Visit(), NOW)
    thread.wait(TIMEOUT)
    result = thread.take_result()
    assert result is not None
    assert "by a bug: KeyError in test_orders.py, line " in result.problem
    assert "secret" not in result.problem
