"""Test clients of other TLS stacks against a server: they receive its first frame, or refuse its certificate.

Each gets an address, the expected name and one trusted authority, and verifies chain and name by its own rules.
Where verification is optional, it is switched on.
"""

from __future__ import annotations

import re
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.interop.conftest import CERTIFICATES, Serve, ca_of
from tests.interop.support import Outcome, Programs, is_address, needs, run_client
from zcproto.wire.frame import MIN_LENGTH, WELCOME

GOOD_NAMES = ["localhost", "zcp.example.com", "127.0.0.1", "2001:db8::7"]
OTHER_NAMES = ["other.example", "192.0.2.8"]

key_types = pytest.mark.parametrize("key_type", CERTIFICATES)

Command = list[str | Path]


class Client(NamedTuple):
    """A client of one stack, and its exit code and messages when it refuses a certificate."""

    stack: str
    commands: tuple[str, ...]
    command: Callable[[Programs, int, str, Path | None, Path], Command]
    """Build the command from port, name, CA file (None: the system's authorities) and log file."""
    refused: int
    """Exit code when it refuses a certificate."""
    untrusted: str
    wrong_name: str
    """Patterns of its messages for an untrusted authority and for a wrong name."""
    has_ipv6: bool = True
    """Whether it can check an IPv6 address."""

    def connect(
        self, programs: Programs, port: int, name: str, ca_file: Path | None, folder: Path
    ) -> Outcome:
        log = folder / "log"
        log.touch()
        return run_client(self.command(programs, port, name, ca_file, log), log)


def arguments(port: int, name: str, ca_file: Path | None) -> Command:
    """Return the arguments of the programs in the folder `programs`."""
    return [str(port), name, *([] if ca_file is None else [ca_file])]


def openssl(programs: Programs, port: int, name: str, ca_file: Path | None, log: Path) -> Command:
    command: Command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-brief", "-tls1_3"]
    command += ["-alpn", "zcp/1", "-verify_return_error", "-x509_strict"]
    command += ["-verify_ip", name, "-noservername"] if is_address(name) else ["-verify_hostname", name]
    return [*command, *([] if ca_file is None else ["-no-CApath", "-CAfile", ca_file])]


def gnutls(programs: Programs, port: int, name: str, ca_file: Path | None, log: Path) -> Command:
    command: Command = ["gnutls-cli", "--port", str(port), "--alpn", "zcp/1", "--verify-hostname", name]
    command += ["--priority", "NORMAL:-VERS-ALL:+VERS-TLS1.3:%PROFILE_HIGH", "--logfile", log]
    command += ["--disable-sni"] if is_address(name) else ["--sni-hostname", name]
    return [*command, *([] if ca_file is None else ["--x509cafile", ca_file]), "127.0.0.1"]


CLIENTS = [
    Client(
        "openssl",
        ("openssl",),
        openssl,
        refused=1,
        untrusted=r"unable to get local issuer certificate",
        wrong_name=r"hostname mismatch|IP address mismatch",
    ),
    Client(
        "gnutls",
        ("gnutls-cli",),
        gnutls,
        refused=1,
        untrusted=r"The certificate issuer is unknown",
        wrong_name=r"The name in the certificate does not match the expected",
    ),
    Client(
        "go",
        ("go",),
        lambda programs, port, name, ca_file, log: [*programs.go(), *arguments(port, name, ca_file)],
        refused=3,
        untrusted=r"x509: certificate signed by unknown authority",
        wrong_name=r"x509: certificate is valid for .*, not (other\.example|192\.0\.2\.8)",
    ),
    Client(
        "node",
        ("node",),
        lambda programs, port, name, ca_file, log: [*programs.node(), *arguments(port, name, ca_file)],
        refused=3,
        untrusted=r"UNABLE_TO_(VERIFY_LEAF_SIGNATURE|GET_ISSUER_CERT_LOCALLY)",
        wrong_name=r"ERR_TLS_CERT_ALTNAME_INVALID",
    ),
    Client(
        "java",
        ("java", "javac"),
        lambda programs, port, name, ca_file, log: [*programs.java(), *arguments(port, name, ca_file)],
        refused=3,
        untrusted=r"unable to find valid certification path|Path does not chain with any of the trust anchors",
        wrong_name=r"No subject alternative (DNS name|names) matching .*(other\.example|192\.0\.2\.8) found",
    ),
    Client(
        "mbedtls",
        ("cc", "/usr/include/mbedtls/ssl.h"),
        lambda programs, port, name, ca_file, log: [
            *programs.c("welcome_mbedtls", "mbedtls", "mbedx509", "mbedcrypto"),
            *arguments(port, name, ca_file),
        ],
        refused=3,
        untrusted=r"The certificate is not correctly signed by the trusted CA",
        wrong_name=r"The certificate Common Name \(CN\) does not match with the expected CN",
    ),
    Client(
        "wolfssl",
        ("cc", "/usr/include/wolfssl/ssl.h"),
        lambda programs, port, name, ca_file, log: [
            *programs.c("welcome_wolfssl", "wolfssl"),
            *arguments(port, name, ca_file),
        ],
        refused=3,
        untrusted=r"certificate verify failed",
        wrong_name=r"peer subject name mismatch",
        has_ipv6=False,  # wolfSSL 5.7 compares only the text of IPv4 addresses
    ),
    Client(
        "rustls",
        ("cargo", "/usr/share/cargo/registry/rustls-0.23*"),
        lambda programs, port, name, ca_file, log: [*programs.rust(), *arguments(port, name, ca_file)],
        refused=3,
        untrusted=r"UnknownIssuer",
        wrong_name=r"NotValidForName|certificate not valid for name",
    ),
]

SLOW_BUILDS = ("rustls",)
"""The client in Rust has the same stack, and its own tests."""

clients = pytest.mark.parametrize(
    "client",
    [
        pytest.param(
            each,
            id=each.stack,
            marks=[needs(*each.commands), *([pytest.mark.slow] if each.stack in SLOW_BUILDS else [])],
        )
        for each in CLIENTS
    ],
)


@pytest.mark.timeout(180)  # the first build with Go compiles its standard library
@key_types
@clients
def test_client_of_other_stack_receives_first_frame(
    client: Client, key_type: str, programs: Programs, managed_certs: Path, serve: Serve, tmp_path: Path
) -> None:
    ca_file = ca_of(managed_certs / CERTIFICATES[key_type])
    for name in GOOD_NAMES:
        if ":" in name and not client.has_ipv6:
            continue
        outcome = client.connect(programs, serve(key_type), name, ca_file, tmp_path)
        assert outcome.code == 0, outcome.output
        length, head = struct.unpack("!II", outcome.start)
        assert head == WELCOME  # version 1, kind 1, no flags
        assert MIN_LENGTH < length < 1024


@pytest.mark.timeout(180)
@key_types
@clients
def test_client_of_other_stack_refuses_untrusted_authority(
    client: Client, key_type: str, programs: Programs, other_ca: Path, serve: Serve, tmp_path: Path
) -> None:
    for ca_file in (other_ca, None):
        outcome = client.connect(programs, serve(key_type), "localhost", ca_file, tmp_path)
        assert outcome.start == b""
        assert outcome.code == client.refused, outcome.output
        assert re.search(client.untrusted, outcome.output), outcome.output


@pytest.mark.timeout(180)
@key_types
@clients
def test_client_of_other_stack_refuses_wrong_name(
    client: Client, key_type: str, programs: Programs, managed_certs: Path, serve: Serve, tmp_path: Path
) -> None:
    ca_file = ca_of(managed_certs / CERTIFICATES[key_type])
    for name in OTHER_NAMES:
        outcome = client.connect(programs, serve(key_type), name, ca_file, tmp_path)
        assert outcome.start == b""
        assert outcome.code == client.refused, outcome.output
        assert re.search(client.wrong_name, outcome.output), outcome.output


# --- curl ------------------------------------------------------------------------------------------------

BODY = b"over TLS 1.3\n"
PEER_FAILED_VERIFICATION = 60
"""curl's exit code."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class StandardServer(ThreadingHTTPServer):
    """The standard library's HTTP server over TLS. Errors of clients that refuse its certificate are ignored."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self._context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self._context.wrap_socket(request, server_side=True) as connection:
            super().finish_request(connection, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def standard_server(certificate: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    with StandardServer(context) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def curl(port: int, name: str, ca_file: Path | None) -> Outcome:
    host = f"[{name}]" if ":" in name else name
    command: Command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--tlsv1.3"]
    command += ["--connect-to", f"{host}:{port}:127.0.0.1:{port}", f"https://{host}:{port}/"]
    return run_client([*command, *([] if ca_file is None else ["--cacert", ca_file])])


@needs("curl")
@key_types
def test_curl_accepts_certificate_and_refuses_wrong_name_and_untrusted_authority(
    key_type: str, managed_certs: Path, other_ca: Path
) -> None:
    """A standard HTTPS server serves the certificate because curl does not offer ZCP/1."""
    with standard_server(managed_certs / CERTIFICATES[key_type]) as port:
        for name in GOOD_NAMES:
            outcome = curl(port, name, ca_of(managed_certs / CERTIFICATES[key_type]))
            assert BODY.startswith(outcome.start), outcome.output
            assert outcome.code == 0, outcome.output
        for ca_file in (other_ca, None):
            outcome = curl(port, "localhost", ca_file)
            assert outcome.code == PEER_FAILED_VERIFICATION
            assert "unable to get local issuer certificate" in outcome.output
        for name in OTHER_NAMES:
            outcome = curl(port, name, ca_of(managed_certs / CERTIFICATES[key_type]))
            assert outcome.code == PEER_FAILED_VERIFICATION
            assert "no alternative certificate subject name matches" in outcome.output
