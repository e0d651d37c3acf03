"""Order certificates from pebble, the test server of Let's Encrypt, with its chaos on."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from bench import pebble
from bench.pebble import AT_ONCE, CHAOS, Pebble
from bench.scenarios.harness import ask_control
from bench.server_process import free_port
from bench.stage import ECDSA_ONLY, Stage
from tests.limits import TIMEOUT
from tests.server.helpers import eventually

pytestmark = pytest.mark.skipif(not pebble.is_installed(), reason="pebble is not installed")

NAMES = ["zcp.example.com", "127.0.0.1"]


def served(port: int, ca: bytes, name: str) -> str:
    """Return the serial number of the certificate that a client gets which trusts only the CA."""
    context = ssl.create_default_context(cadata=ca.decode())
    with (
        socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as raw,
        context.wrap_socket(raw, server_hostname=name) as tls,
    ):
        certificate = tls.getpeercert()
        assert certificate is not None
        return str(certificate["serialNumber"])


@pytest.mark.parametrize(
    ("challenge", "workers", "binding"),
    [
        ("tls-alpn-01", 2, None),
        ("http-01", 1, ("kid-1", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W")),
    ],
    ids=["by TLS with workers", "by HTTP with an external account"],
)
def test_certificates_are_ordered_and_renewed(
    tmp_path: Path, challenge: str, workers: int, binding: tuple[str, str] | None
) -> None:
    port, http_port = free_port(), free_port()
    ca = Pebble(
        tmp_path / "pebble", tls_port=port, http_port=http_port, chaos=CHAOS | AT_ONCE, binding=binding
    )
    with ca:
        names = NAMES if challenge == "tls-alpn-01" else NAMES[:1]
        settings: dict[str, Any] = {
            **ECDSA_ONLY, **ca.settings(), "certificates.names": names, "acme.challenge": challenge,
            "server.workers": workers,
        }  # fmt: skip
        if challenge == "http-01":
            settings["http.redirect_port"] = http_port
        if binding is not None:
            (tmp_path / "eab").touch(0o600)
            (tmp_path / "eab").write_text(binding[1])
            settings |= {"acme.eab_kid": binding[0], "acme.eab_key_file": str(tmp_path / "eab")}
        stage = Stage(tmp_path / "home", settings)
        with stage.serve(cpu=None, port=port) as server:
            _, before = ask_control(stage.home, "GET", "certificates")
            certificate = stage.home.certs / "acme" / "server-ecdsa.crt"
            eventually(certificate.exists)
            root = ca.root()

            seen: set[str] = set()

            def is_renewed() -> bool:
                """Return whether all workers serve one certificate, which was not seen before."""
                try:
                    found = {served(server.port, root, name) for name in names * 5}
                except ssl.SSLCertVerificationError:
                    return False
                if len(found) > 1 or found <= seen:
                    return False
                seen.update(found)
                return True

            eventually(is_renewed)
            for _ in range(2):
                status, renewed = ask_control(stage.home, "POST", "certificates/renew")
                assert status == 200, renewed
                eventually(is_renewed)
            _, after = ask_control(stage.home, "GET", "certificates")
            assert after["pins"] == before["pins"]
            assert after["certificates"][0]["source"] == "acme"
        faults = [event for event in stage.log_events() if "certificate." in event or "error: " in event]
    assert faults == []
