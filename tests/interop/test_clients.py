"""Clients of other TLS stacks against a running server: they get its first frame, or refuse its certificate.

Each is given an address and the name that the certificate must be for, and trusts one authority. Each checks
chain and name by its own rules; where it does that only when asked, it is asked.
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

from tests.interop.conftest import CERTIFICATES, Serve
from tests.interop.support import Outcome, Programs, is_address, needs, run
from zcproto.wire.frame import MIN_LENGTH, WELCOME

GOOD_NAMES = ["localhost", "zcp.example.com", "127.0.0.1", "2001:db8::7"]
OTHER_NAMES = ["other.example", "192.0.2.8"]

key_types = pytest.mark.parametrize("key_type", CERTIFICATES)

Command = list[str | Path]


class Client(NamedTuple):
    """One stack's client, and how it says why it refuses."""

    stack: str
    commands: tuple[str, ...]
    command: Callable[[Programs, int, str, Path | None, Path], Command]
    """Of port, name, CA file (None is the system's authorities) and log file."""
    refused: int
    """Its exit code when it refuses."""
    untrusted: str
    misnamed: str
    """Patterns of what it says of another authority's certificate, and of one for another name."""

    def connect(
        self, programs: Programs, port: int, name: str, ca_file: Path | None, folder: Path
    ) -> Outcome:
        log = folder / "log"
        log.touch()
        return run(self.command(programs, port, name, ca_file, log), log)


def arguments(port: int, name: str, ca_file: Path | None) -> Command:
    """Those of the programs in the folder `programs`."""
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
        misnamed=r"hostname mismatch|IP address mismatch",
    ),
    Client(
        "gnutls",
        ("gnutls-cli",),
        gnutls,
        refused=1,
        untrusted=r"The certificate issuer is unknown",
        misnamed=r"The name in the certificate does not match the expected",
    ),
    Client(
        "go",
        ("go",),
        lambda programs, port, name, ca_file, log: [*programs.go(), *arguments(port, name, ca_file)],
        refused=3,
        untrusted=r"x509: certificate signed by unknown authority",
        misnamed=r"x509: certificate is valid for .*, not (other\.example|192\.0\.2\.8)",
    ),
    Client(
        "node",
        ("node",),
        lambda programs, port, name, ca_file, log: [*programs.node(), *arguments(port, name, ca_file)],
        refused=3,
        untrusted=r"UNABLE_TO_(VERIFY_LEAF_SIGNATURE|GET_ISSUER_CERT_LOCALLY)",
        misnamed=r"ERR_TLS_CERT_ALTNAME_INVALID",
    ),
    Client(
        "java",
        ("java", "javac"),
        lambda programs, port, name, ca_file, log: [*programs.java(), *arguments(port, name, ca_file)],
        refused=3,
        untrusted=r"unable to find valid certification path|Path does not chain with any of the trust anchors",
        misnamed=r"No subject alternative (DNS name|names) matching .*(other\.example|192\.0\.2\.8) found",
    ),
]

clients = pytest.mark.parametrize(
    "client", [pytest.param(each, id=each.stack, marks=needs(*each.commands)) for each in CLIENTS]
)


@pytest.mark.timeout(180)  # the first of Go makes Go's standard library
@key_types
@clients
def test_a_client_of_another_stack_gets_the_first_frame(
    client: Client, key_type: str, programs: Programs, own: Path, serve: Serve, tmp_path: Path
) -> None:
    for name in GOOD_NAMES:
        outcome = client.connect(programs, serve(key_type), name, own / "ca.crt", tmp_path)
        assert outcome.code == 0, outcome.said
        length, head = struct.unpack("!II", outcome.start)
        assert head == WELCOME  # version 1, kind 1, no flags
        assert MIN_LENGTH < length < 1024


@pytest.mark.timeout(180)
@key_types
@clients
def test_a_client_of_another_stack_refuses_an_authority_that_it_does_not_trust(
    client: Client, key_type: str, programs: Programs, stranger: Path, serve: Serve, tmp_path: Path
) -> None:
    for ca_file in (stranger, None):
        outcome = client.connect(programs, serve(key_type), "localhost", ca_file, tmp_path)
        assert outcome.start == b""
        assert outcome.code == client.refused, outcome.said
        assert re.search(client.untrusted, outcome.said), outcome.said


@pytest.mark.timeout(180)
@key_types
@clients
def test_a_client_of_another_stack_refuses_a_certificate_for_another_name(
    client: Client, key_type: str, programs: Programs, own: Path, serve: Serve, tmp_path: Path
) -> None:
    for name in OTHER_NAMES:
        outcome = client.connect(programs, serve(key_type), name, own / "ca.crt", tmp_path)
        assert outcome.start == b""
        assert outcome.code == client.refused, outcome.said
        assert re.search(client.misnamed, outcome.said), outcome.said


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


class StockServer(ThreadingHTTPServer):
    """Python's own HTTP server over Python's own TLS. A client that refuses its certificate is no news."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self._context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self._context.wrap_socket(request, server_side=True) as connection:
            super().finish_request(connection, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def stock_server(certificate: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    with StockServer(context) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def curl(port: int, name: str, ca_file: Path | None) -> Outcome:
    host = f"[{name}]" if ":" in name else name
    command: Command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--tlsv1.3", "--max-time", "20"]
    command += ["--connect-to", f"{host}:{port}:127.0.0.1:{port}", f"https://{host}:{port}/"]
    return run([*command, *([] if ca_file is None else ["--cacert", ca_file])])


@needs("curl")
@key_types
def test_curl_takes_the_certificate_from_any_server_and_refuses_as_it_should(
    key_type: str, own: Path, stranger: Path
) -> None:
    """There is no HTTPS beside the protocol yet, and curl offers no other, so it meets a stock server."""
    with stock_server(own / CERTIFICATES[key_type]) as port:
        for name in GOOD_NAMES:
            outcome = curl(port, name, own / "ca.crt")
            assert BODY.startswith(outcome.start), outcome.said
            assert outcome.code == 0, outcome.said
        for ca_file in (stranger, None):
            outcome = curl(port, "localhost", ca_file)
            assert outcome.code == PEER_FAILED_VERIFICATION
            assert "unable to get local issuer certificate" in outcome.said
        for name in OTHER_NAMES:
            outcome = curl(port, name, own / "ca.crt")
            assert outcome.code == PEER_FAILED_VERIFICATION
            assert "no alternative certificate subject name matches" in outcome.said
