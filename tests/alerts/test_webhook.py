"""Test the webhook against a real HTTPS server and responses of all kinds."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.alerts.receiver import Answer, Receiver, answer, drip, flood, hang, vanish
from tests.conftest import ServerPairs
from tests.helpers import FakeClock
from tests.server.helpers import TIMEOUT
from zcproto.alerts.sinks import REFUSED_TRIES, Undelivered, Webhook, check_signature
from zcproto.common.https import MAX_ANSWER
from zcproto.common.secret import Secret
from zcproto.errors import ConfigError

SECRET = Secret("correct horse battery staple")
BODY = json.dumps({"id": "f00d-1", "alert": "é"}).encode()


@pytest.fixture
def certificate(server_pairs: ServerPairs) -> tuple[Path, Path]:
    return server_pairs.ecdsa.certificate, server_pairs.ecdsa.key


def webhook(
    url: str, ca_file: Path | None, clock: FakeClock, timeout: float = TIMEOUT, **options: Any
) -> Webhook:
    return Webhook(url, options.get("secret", SECRET), ca_file=ca_file, timeout=timeout, clock=clock)


async def test_message_is_delivered_complete_and_signed(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock
) -> None:
    with Receiver(certificate) as receiver:
        sink = webhook(receiver.url, ca_file, clock)
        assert sink.where == f"localhost:{receiver.port}"
        assert await sink.deliver(BODY) == "localhost answered 204"
    (request,) = receiver.received
    assert request.line == "POST /hook?team=ops HTTP/1.1"
    assert request.body == BODY
    headers = request.headers
    assert headers["host"] == f"localhost:{receiver.port}"
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert check_signature(SECRET, request.body, headers["zcproto-signature"], clock.wall()) == ""


async def test_each_attempt_has_a_new_signature(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock
) -> None:
    """A message queued for an hour must not be refused as old."""
    with Receiver(certificate) as receiver:
        sink = webhook(receiver.url, ca_file, clock)
        await sink.deliver(BODY)
        clock.advance(3_600)
        await sink.deliver(BODY)
    first, second = (request.headers["zcproto-signature"] for request in receiver.received)
    assert first != second
    assert check_signature(SECRET, BODY, second, clock.wall()) == ""
    assert check_signature(SECRET, BODY, first, clock.wall()) != ""


async def test_no_signature_without_secret(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock
) -> None:
    with Receiver(certificate) as receiver:
        await webhook(receiver.url, ca_file, clock, secret=None).deliver(BODY)
    assert "zcproto-signature" not in receiver.received[0].headers


async def test_plain_http_works_on_loopback(clock: FakeClock) -> None:
    with Receiver(None) as receiver:
        assert await webhook(receiver.url, None, clock).deliver(BODY) == "localhost answered 204"


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_any_2xx_is_success(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock, status: int
) -> None:
    with Receiver(certificate, answer(status, body=b"ok")) as receiver:
        assert await webhook(receiver.url, ca_file, clock).deliver(BODY) == f"localhost answered {status}"


@pytest.mark.parametrize(
    ("status", "tries"),
    [
        *((301, REFUSED_TRIES), (302, REFUSED_TRIES), (307, REFUSED_TRIES), (308, REFUSED_TRIES)),
        *((400, REFUSED_TRIES), (401, REFUSED_TRIES), (404, REFUSED_TRIES), (413, REFUSED_TRIES)),
        *((408, None), (425, None), (429, None), (500, None), (502, None), (503, None), (599, None)),
    ],
)
async def test_any_other_status_is_failure(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock, status: int, tries: int | None
) -> None:
    with Receiver(certificate, answer(status)) as receiver:
        with pytest.raises(Undelivered, match=f"localhost answered {status}") as caught:
            await webhook(receiver.url, ca_file, clock).deliver(BODY)
        assert caught.value.tries == tries


async def test_a_redirect_is_not_followed(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock
) -> None:
    with (
        Receiver(certificate) as other,
        Receiver(certificate, answer(307, f"Location: {other.url}")) as receiver,
    ):
        with pytest.raises(Undelivered, match="307: redirects are not followed"):
            await webhook(receiver.url, ca_file, clock).deliver(BODY)
        assert other.connections == 0


async def test_informational_responses_are_ignored(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock
) -> None:
    with Receiver(certificate, b"HTTP/1.1 103 Early Hints\r\n\r\n" + answer(200)) as receiver:
        assert await webhook(receiver.url, ca_file, clock).deliver(BODY) == "localhost answered 200"


@pytest.mark.parametrize("what", [hang, drip], ids=["hangs", "drips"])
async def test_slow_receiver_times_out(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock, what: Answer
) -> None:
    with Receiver(certificate, what) as receiver:
        with pytest.raises(Undelivered, match=r"localhost did not answer within 0\.3 s") as caught:
            await webhook(receiver.url, ca_file, clock, timeout=0.3).deliver(BODY)
        assert caught.value.tries is None


async def test_receiver_without_tls_handshake_times_out(ca_file: Path, clock: FakeClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://localhost:{silent.getsockname()[1]}/"
        with pytest.raises(Undelivered, match=r"did not answer within 0\.3 s"):
            await webhook(url, ca_file, clock, timeout=0.3).deliver(BODY)


async def test_endless_response_is_abandoned(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock
) -> None:
    with Receiver(certificate, flood) as receiver, pytest.raises(Undelivered, match="is longer than"):
        await webhook(receiver.url, ca_file, clock).deliver(BODY)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200\x00 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_ANSWER,
        vanish,
        b"HTTP/1.1 2",
    ],
    ids=["another protocol", "a bad line", "a head too large", "nothing", "a part"],
)
async def test_invalid_http_is_failure(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock, data: Answer
) -> None:
    with Receiver(certificate, data) as receiver, pytest.raises(Undelivered) as caught:
        await webhook(receiver.url, ca_file, clock).deliver(BODY)
    assert "localhost" in str(caught.value)


async def test_huge_response_is_not_read(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock
) -> None:
    with Receiver(certificate, answer(200, body=b"x" * 10_000_000)) as receiver:
        assert await webhook(receiver.url, ca_file, clock).deliver(BODY) == "localhost answered 200"


async def test_certificate_of_unknown_ca_is_refused(
    certificate: tuple[Path, Path], clock: FakeClock, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    for ca_file in (tmp_path / "other.pem", None):
        with Receiver(certificate) as receiver:
            with pytest.raises(Undelivered, match="the certificate of localhost is not trusted"):
                await webhook(receiver.url, ca_file, clock).deliver(BODY)
            assert receiver.received == []


async def test_certificate_for_other_name_is_refused(
    ca: trustme.CA, ca_file: Path, clock: FakeClock, tmp_path: Path
) -> None:
    issued = ca.issue_cert("other.example")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "other.pem")
    with (
        Receiver((tmp_path / "other.pem", tmp_path / "other.pem")) as receiver,
        pytest.raises(Undelivered, match="not trusted"),
    ):
        await webhook(receiver.url, ca_file, clock).deliver(BODY)
    assert receiver.received == []


async def test_https_to_plaintext_receiver_fails(ca_file: Path, clock: FakeClock) -> None:
    def answer_in_plain(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 400 this is no TLS\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer_in_plain, args=[listening], daemon=True)
        thread.start()
        with pytest.raises(Undelivered, match="TLS with localhost failed: "):
            await webhook(f"https://localhost:{listening.getsockname()[1]}/", ca_file, clock).deliver(BODY)
        thread.join(TIMEOUT)


async def test_connection_refused_is_reported(clock: FakeClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(Undelivered, match=r"cannot be reached") as caught:
        await webhook(f"http://127.0.0.1:{port}/a-secret-path", None, clock).deliver(BODY)
    assert "secret" not in str(caught.value)
    with pytest.raises(Undelivered, match=r"no-such-name\.invalid cannot be reached"):
        await webhook("https://no-such-name.invalid/", None, clock).deliver(BODY)


async def test_next_address_is_tried(
    certificate: tuple[Path, Path], ca_file: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def several(host: str, port: int, *more: Any, **options: Any) -> list[Any]:
        if host != "localhost":
            return real(host, port, *more, **options)
        return [(2, 1, 6, "", (address, port)) for address in ("127.0.0.9", "127.0.0.9", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", several)
    with Receiver(certificate) as receiver:
        await webhook(receiver.url, ca_file, clock).deliver(BODY)


async def test_hanging_resolver_is_abandoned(
    ca_file: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hang(host: str, port: int, **options: object) -> list[object]:
        asked.set()
        assert go_on.wait(TIMEOUT)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(Undelivered, match="did not answer within"):
        await webhook("https://localhost:9/", ca_file, clock, timeout=0.2).deliver(BODY)
    assert await asyncio.to_thread(asked.wait, TIMEOUT)
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "zcproto-https-name":
            await asyncio.to_thread(thread.join, TIMEOUT)
    await asyncio.sleep(0)


def test_invalid_ca_file_is_refused(clock: FakeClock, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    with pytest.raises(ConfigError, match=r"alerts\.webhook_ca_file: .*contains no PEM"):
        webhook("https://localhost/", tmp_path / "empty.pem", clock)
    with pytest.raises(ConfigError, match=r"alerts\.webhook_ca_file: .*cannot be read: No such file"):
        webhook("https://localhost/", tmp_path / "none.pem", clock)


async def test_sslkeylogfile_is_ignored(
    certificate: tuple[Path, Path],
    ca_file: Path,
    clock: FakeClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = tmp_path / "keys"
    with Receiver(certificate) as receiver:
        monkeypatch.setenv("SSLKEYLOGFILE", str(keys))
        await webhook(receiver.url, ca_file, clock).deliver(BODY)
    assert not keys.exists()
