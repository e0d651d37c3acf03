"""Write the first inputs of the corpus: test vectors, bytes captured from real programs, and generated inputs.

    python -m tests.fuzz.seeds DIR

writes them to DIR/TARGET, for `python -m tests.fuzz --runs 0 --corpus DIR --keep`, and captured bytes directly into
the corpus. Programs that are not installed are skipped.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.fuzz.corpus import CAPTURED, CORPUS, ROOT
from tests.fuzz.targets.certificates import THROWAWAY
from tests.fuzz.targets.config import SECRET_KEYS
from tests.tls.hellos import Hello, alpn, server_name
from zcproto.config import default_config_file

VECTORS = ROOT / "spec" / "vectors"
HEADER = 68
CONNECT_TIMEOUT_S = 10.0

Seed = tuple[str, bytes]
"""Target name and input."""


def seeds() -> Iterator[Seed]:
    yield from vector_seeds()
    yield from client_hello_seeds()
    yield from proxy_header_seeds()
    yield from http_seeds()
    yield from configuration_seeds()
    yield from certificate_seeds()
    yield from script_seeds()


def vector_seeds() -> Iterator[Seed]:
    for path in sorted(VECTORS.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("type") != "frames":
            continue
        for vector in document["vectors"]:
            data = bytes.fromhex(vector["bytes"])[:4_000]
            side = vector["receiver"] == "client"
            yield "frames", bytes([side | 2]) + data
            yield "messages", b"\0" + data[HEADER:]
            yield "server", b"\0" + bytes([min(len(data), 255)]) + data[:255]
            yield "client", b"\1\0" + bytes([min(len(data), 255)]) + data[:255]


def client_hello_seeds() -> Iterator[Seed]:
    yield "client_hello", Hello().bytes()
    named = (
        Hello()
        .with_extension(0, server_name(b"server.example.com"))
        .with_extension(16, alpn(b"h2", b"zcp/1"))
    )
    yield "client_hello", named.bytes()
    yield "client_hello", b"GET / HTTP/1.1\r\n"
    yield "client_hello", b"\x16\x03\x01"


def captured_inputs() -> Iterator[tuple[str, str, bytes]]:
    """Yield target name, file name and bytes captured from installed programs."""
    at = "127.0.0.1:{port}"
    hellos: dict[str, Sequence[str]] = {
        "openssl": ("openssl", "s_client", "-connect", at, "-alpn", "zcp/1", "-servername", "a.example.com"),
        "openssl-tls12": ("openssl", "s_client", "-connect", at, "-tls1_2"),
        "openssl-aes128": ("openssl", "s_client", "-connect", at, "-ciphersuites", "TLS_AES_128_GCM_SHA256"),
        "curl": ("curl", "-sk", "https://localhost:{port}/"),
        "gnutls": ("gnutls-cli", "--insecure", "-p", "{port}", "localhost"),
        "node": ("node", "-e", "require('tls').connect({port},'127.0.0.1',{{ALPNProtocols:['zcp/1']}})"),
    }
    for name, command in hellos.items():
        if shutil.which(command[0]):
            yield "client_hello", name, first_bytes(command)
    yield "client_hello", "python", hello_of_python(["zcp/1"])
    yield "client_hello", "python-without-alpn", hello_of_python([])
    requests: dict[str, Sequence[str]] = {
        "curl-get": (),
        "curl-post": ("--data", "a=b"),
        "curl-chunked": ("-H", "Transfer-Encoding: chunked", "--data", "a=b"),
    }
    for name, options in requests.items():
        if shutil.which("curl"):
            yield "http", name, b"\0" + first_bytes(("curl", "-s", *options, "http://127.0.0.1:{port}/x"))


def first_bytes(command: Sequence[str]) -> bytes:
    """Return the first bytes that a program sends to a silent server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(CONNECT_TIMEOUT_S)
        port = server.getsockname()[1]
        words = [word.format(port=port) for word in command]
        program = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            client, _ = server.accept()
            with client:
                client.settimeout(CONNECT_TIMEOUT_S)
                return client.recv(16_384)
        finally:
            program.kill()
            program.communicate()


def hello_of_python(protocols: list[str]) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if protocols:
        context.set_alpn_protocols(protocols)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = context.wrap_bio(incoming, outgoing, server_hostname="host.example.com.")
    with contextlib.suppress(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def proxy_header_seeds() -> Iterator[Seed]:
    signature = b"\r\n\r\n\x00\r\nQUIT\n"
    tls = b"\x16\x03\x01"
    four = bytes([192, 0, 2, 7, 192, 0, 2, 1]) + b"\x1f\x90\x1d\x13"
    six = bytes.fromhex("20010db8000000000000000000000007" * 2) + b"\x1f\x90\x1d\x13"
    mapped = bytes.fromhex("00000000000000000000ffffc0000207" * 2) + b"\x1f\x90\x1d\x13"
    for head, family, rest in (
        (0x21, 0x11, four),
        (0x21, 0x11, four + b"\x04\x00\x02hi"),
        (0x21, 0x21, six),
        (0x21, 0x21, mapped),
        (0x21, 0x31, bytes(216)),
        (0x20, 0x00, b""),
        (0x21, 0x00, b""),
        (0x21, 0x12, four),
        (0x22, 0x11, four),
        (0x11, 0x11, four),
    ):
        yield ("proxy_header", signature + bytes([head, family]) + len(rest).to_bytes(2, "big") + rest + tls)
    yield "proxy_header", b"PROXY TCP4 192.0.2.7 192.0.2.1 4000 443\r\n"
    yield "proxy_header", signature[:7]
    yield "proxy_header", signature + b"\x21\x11\xff\xff"


def http_seeds() -> Iterator[Seed]:
    for request in (
        b"GET /healthz HTTP/1.1\r\nHost: localhost:7443\r\nUser-Agent: curl/8.14.1\r\nAccept: */*\r\n\r\n",
        b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\nHEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: a:1\r\nAuthorization: Bearer abc\r\nConnection: close\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello",
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
        b"GET http://a/b?c#d HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\r\nGET /a?b=c HTTP/1.0\r\n\r\n",
        b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET /" + b"a" * 200 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12 + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 1_100,
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 7,
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nExpect: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        yield "http", b"\0" + request
    yield "http", b"\1GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def configuration_seeds() -> Iterator[Seed]:
    example = default_config_file(Path("/srv/zcproto"))
    lines = [line.removeprefix("#") for line in example.splitlines()]
    settings = [line for line in lines if " = " in line or line.startswith("[")]
    section: list[str] = []
    for line in [*settings, "["]:
        if line.startswith("[") and section:
            yield "config", b"\0" + "\n".join(section).encode()
            for key in section[1:]:
                yield "config", b"\0" + f"{section[0]}\n{key}".encode()
            section = []
        section.append(line)
    for text in (
        "", "a = 1", "[server]\nprot = 1", "[servr]\nport = 1", "[server]\nport = 99999", "server = 1", "a = [",
        "[server]\nport = 1\nport = 2", "[server]\nport = " + "9" * 5_000, "a = " + "[" * 900, "[a.b]\nc = 1",
        "[server]\nhost = \"\\u202e\"", "\ufeff", "[alerts]\nwebhook = \"https://a/\"",
    ):  # fmt: skip
        yield "config", b"\0" + text.encode()
    yield "config", b"\0\xff"
    for number in range(len(SECRET_KEYS)):
        yield "config", bytes([number * 4 + 2]) + b"localhost:6379/0"
        yield "config", bytes([number * 4 + 3]) + b"@x"


def certificate_seeds() -> Iterator[Seed]:
    certificate, key = (THROWAWAY / "certificate.pem").read_bytes(), (THROWAWAY / "key.pem").read_bytes()
    for file in (
        *(
            certificate + key,
            key + certificate,
            certificate,
            key,
            certificate * 2 + key,
            certificate * 11 + key,
        ),
        *(b"", b"-----BEGIN CERTIFICATE-----\n", certificate[:200], key[:100], certificate + key[:100]),
    ):
        yield "certificates", b"\0" + file
    yield "certificates", b"\1" + der_of(certificate)
    yield "certificates", b"\2" + der_of(key)
    key_object = serialization.load_pem_private_key(key, None)
    assert isinstance(key_object, ec.EllipticCurvePrivateKey)
    yield "certificates", b"\3" + key_object.private_bytes(*_OLD_FORM, serialization.NoEncryption())
    small = rsa.generate_private_key(65537, 1024)  # too weak for any use
    yield "certificates", b"\2" + small.private_bytes(*_NEW_FORM, serialization.NoEncryption())
    encrypted = key_object.private_bytes(*_NEW_FORM, serialization.BestAvailableEncryption(b"word"))
    yield "certificates", b"\0" + certificate + _pem("ENCRYPTED PRIVATE KEY", encrypted)


_OLD_FORM = (serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL)
_NEW_FORM = (serialization.Encoding.DER, serialization.PrivateFormat.PKCS8)


def _pem(label: str, der: bytes) -> bytes:
    return f"-----BEGIN {label}-----\n{base64.encodebytes(der).decode()}-----END {label}-----\n".encode()


def der_of(pem: bytes) -> bytes:
    return base64.b64decode(b"".join(pem.splitlines()[1:-1]))


def script_seeds() -> Iterator[Seed]:
    """Yield scripts with each single step, and with all steps in sequence."""
    for first in range(13):
        for choices in (b"\0" * 8, b"\1" * 8, bytes(range(8)), b"\4\3\2\1\0\5\6\7"):
            yield "server", bytes([first]) + choices
            yield "client", b"\1" + bytes([first]) + choices
    yield "server", b"".join(bytes([each % 13]) + b"\1\0\2\1a\0\1" for each in range(26))
    yield "client", b"\1" + b"".join(bytes([each % 9]) + b"\1\0\2\1a\0\1" for each in range(26))


def main(arguments: list[str]) -> int:
    (folder,) = map(Path, arguments)
    for number, (target, data) in enumerate(seeds()):
        (folder / target).mkdir(parents=True, exist_ok=True)
        (folder / target / f"seed-{number}").write_bytes(data)
    for target, name, data in captured_inputs():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        (CORPUS / target / f"{CAPTURED}{name}").write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
