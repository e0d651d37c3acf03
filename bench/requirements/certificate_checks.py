"""Certificates: what is served and refused, how they are renewed, watched and pinned, and no server without one."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509 import verification

from bench.requirements.finding import Facts, Finding
from bench.requirements.foreign import KEYS, Authority
from bench.requirements.homes import HOST, NAME, TIMEOUT, House, Served, Workshop, make_own, zcproto
from zcproto.client import connect
from zcproto.errors import TlsError, ZcprotoError
from zcproto.tls.context import client_context
from zcproto.tls.pins import certificate_pin, key_pin

ALERT_DAYS: Final = (30, 14, 7, 3, 1)
LOOK_S: Final = 0.05
FILES: Final = """
[certificates]
mode = "files"
watch_interval = "100ms"
certificate = [{certificates}]
key = [{keys}]
"""


def files_config(*pairs: tuple[Path, Path]) -> str:
    certificates = ", ".join(json.dumps(str(certificate)) for certificate, _ in pairs)
    return FILES.format(certificates=certificates, keys=", ".join(json.dumps(str(key)) for _, key in pairs))


def until(condition: Callable[[], object], seconds: float = TIMEOUT) -> float | None:
    """Wait until it is so; after how many seconds that was, None if it did not come in time."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() > started + seconds:
            return None
        time.sleep(LOOK_S)
    return time.monotonic() - started


# --- keys and profile -------------------------------------------------------------------------------------


def key_size(served: Served, workshop: Workshop) -> Finding:
    """What a server serves by default, and what it refuses to start with."""
    facts, sizes = Facts(), []
    for file in ("server.crt", "server-ecdsa.crt"):
        key = _certificate(served.home.certs / file).public_key()
        assert isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
        name = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else "rsa"
        sizes.append(f"{name} {key.key_size}")
    facts.equal("own certificates", sizes, ["rsa 4096", "secp256r1 256"])
    shown = x509.load_der_x509_certificate(served.leaf()).public_key()
    facts.note(
        "who takes ECDSA is shown that", isinstance(shown, ec.EllipticCurvePublicKey), type(shown).__name__
    )
    authority = Authority(workshop.folder / "weak")
    taken, refused = [], []
    for name, make in KEYS.items():
        weak = name not in ("RSA-2048", "P-256")
        made = authority.issue(name.lower(), make(), timedelta(days=60))
        config = files_config((made.certificate_file, made.key_file))
        house = workshop.house(f"key-{name.lower()}", config, certificates=False)
        if weak:
            ended = zcproto(house.home, "serve", "--port", "0")
            facts.note(f"{name} is refused at the start", ended.code not in (0, None), ended.said[-160:])
            facts.note(f"{name}: it says why", name.split("-")[1] in ended.said, ended.said[-160:])
            refused.append(name)
        else:
            with house.serve() as other:
                facts.note(f"{name} is served", bool(_leaf_of(other, authority.file)))
            taken.append(name)
    return facts.finding(f"RSA-4096 and P-256; {', '.join(taken)} taken, {', '.join(refused)} refused")


def profile(served: Served) -> Finding:
    """Own certificates: X.509 version 3, the extensions of RFC 5280, and a chain that verifies."""
    facts = Facts()
    root = _certificate(served.ca_file)
    store = verification.Store([root])
    files = ("server.crt", "server-ecdsa.crt")
    for file in files:
        chain = x509.load_pem_x509_certificates((served.home.certs / file).read_bytes())
        leaf = chain[0]
        facts.equal(f"{file}: version", leaf.version, x509.Version.v3)
        extensions = {each.value.__class__: each for each in leaf.extensions}
        for wanted in (x509.SubjectAlternativeName, x509.ExtendedKeyUsage, x509.AuthorityKeyIdentifier,
                       x509.BasicConstraints, x509.KeyUsage):  # fmt: skip
            facts.note(f"{file}: {wanted.__name__}", wanted in extensions)
        for critical in (x509.BasicConstraints, x509.KeyUsage):
            facts.note(f"{file}: {critical.__name__} is critical",
                       critical in extensions and extensions[critical].critical)  # fmt: skip
        builder = verification.PolicyBuilder().store(store)
        verifier = builder.build_server_verifier(x509.DNSName(NAME))
        try:
            verified = verifier.verify(leaf, chain[1:])
            facts.note(f"{file}: the chain verifies", len(verified) >= 2, len(verified))
        except verification.VerificationError as error:
            facts.note(f"{file}: the chain verifies", False, error)
        facts.note(f"{file}: the root is not sent", root not in chain)
        ended = zcproto(served.home, "cert", "check", str(served.home.certs / file))
        facts.equal(f"{file}: `zcproto cert check` ends with", ended.code, 0)
    return facts.finding(f"{len(files)} certificates: version 3, extensions, chain")


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificates(path.read_bytes())[0]


def _leaf_of(served: Served, ca_file: Path) -> bytes:
    """The certificate of a server whose authority is another than that of its folder."""
    with (
        socket.create_connection((HOST, served.port), TIMEOUT) as raw,
        client_context(ca_file=ca_file, protocols=["zcp/1"]).wrap_socket(raw, server_hostname=NAME) as tls,
    ):
        return tls.getpeercert(binary_form=True) or b""


# --- pins -------------------------------------------------------------------------------------------------


def pinning(served: Served, house: House) -> Finding:
    """Clients with pins, of both forms: the right one, a wrong one, and a backup beside it."""
    leaf = served.leaf()
    right = {"key": key_pin(leaf), "certificate": certificate_pin(leaf)}
    facts = Facts()

    def outcome(*pins: str) -> str:
        return asyncio.run(_pinned(served, house, pins))

    for name, pin in right.items():
        prefix = pin.partition("/")[0]
        wrong, backup = (f"{prefix}/{letter * 43}=" for letter in "AE")
        facts.equal(f"pin of the {name}, and a backup", outcome(pin, backup), "answered")
        facts.equal(f"the {name} as the backup", outcome(backup, pin), "answered")
        facts.equal(f"wrong pins of the {name}", outcome(wrong, backup), "pin_mismatch")
    digest = hashlib.sha256(leaf).digest()
    facts.note(
        "the second form is the whole certificate's SHA-256",
        certificate_pin(leaf).endswith(base64.b64encode(digest).decode()),
    )
    pins = zcproto(served.home, "cert", "pins")
    facts.note("`zcproto cert pins` tells it", right["key"] in pins.said, pins.said)
    return facts.finding("key and certificate; a wrong pin is refused, a backup pin does")


async def _pinned(served: Served, house: House, pins: tuple[str, ...]) -> str:
    who = house.users[6]
    try:
        client = connect(
            f"{NAME}:{served.port}", user=who.user, key=who.key, pins=pins, home=served.home.path
        )
        async with client:
            await client.call("echo", word="hello")
            await client.call("session.close")
    except TlsError as error:
        return error.failure
    except ZcprotoError as error:
        return str(error)
    return "answered"


# --- coming to an end, and renewal -------------------------------------------------------------------------


def expiry_alerts(workshop: Workshop) -> Finding:
    """Certificates of others that end in fewer and fewer days: which alerts come."""
    authority = Authority(workshop.folder / "ending")
    key = KEYS["P-256"]()
    made = authority.issue("server", key, timedelta(days=60))
    folder = workshop.folder / "alerts-expiry"
    folder.mkdir()
    house = workshop.house(
        "expiry",
        files_config((made.certificate_file, made.key_file)) + alert_command(folder),
        certificates=False,
    )
    facts, told = Facts(), []
    with house.serve() as served:
        facts.equal("60 days before the end", [each["kind"] for each in alerts(folder)], [])
        for days in ALERT_DAYS:
            made = authority.issue("server", key, timedelta(days=days) - timedelta(hours=6))
            number = made.certificate.serial_number

            def shown(number: int = number) -> bool:
                leaf = x509.load_der_x509_certificate(_leaf_of(served, authority.file))
                return leaf.serial_number == number

            facts.note(f"the file with {days} days is taken up", until(shown) is not None)

            def threshold(days: int = days) -> bool:
                return _threshold(folder, days)

            seconds = until(threshold)
            facts.note(f"an alert at {days} days", seconds is not None, _titles(folder))
            told += [str(days)] if seconds is not None else []
    return facts.finding(
        f"alerts at {', '.join(told)} days, by a command",
        aim=len(told) == len(ALERT_DAYS),
        values={"alerts": len(told)},
    )


def _threshold(folder: Path, days: int) -> bool:
    return any(
        each["kind"] == "certificate.expiry" and each["details"].get("threshold_days") == days
        for each in alerts(folder)
    )


def _titles(folder: Path) -> str:
    return str([(each["title"], each["details"]) for each in alerts(folder)])


KEEP_MESSAGE: Final = (
    "import pathlib, sys, time; data = sys.stdin.buffer.read();"
    ' pathlib.Path(sys.argv[1], f"{time.time_ns()}.json").write_bytes(data)'
)


def alert_command(folder: Path) -> str:
    """The configuration that has each alert written into a file of its own."""
    command = json.dumps([sys.executable, "-I", "-c", KEEP_MESSAGE, str(folder)])
    return f'\n[alerts]\nrevocations = "any"\ncommand = {command}\n'


def alerts(folder: Path) -> list[dict[str, Any]]:
    """What has arrived so far, in order."""
    arrived = []
    for each in sorted(folder.glob("*.json")):
        with suppress(ValueError):  # it is being written
            arrived.append(json.loads(each.read_bytes())["alert"])
    return arrived


def renewal(workshop: Workshop) -> Finding:
    """Own certificates that are due: renewed by the server itself, with the same keys. And files that change."""
    facts = Facts()
    house = workshop.house("renewal", certificates=False)
    # 61 of 90 days ago: 29 are left, and 30 before the end is when they are due.
    make_own(house.home.certs, datetime.now(UTC) - timedelta(days=61))
    old = {file: _certificate(house.home.certs / file) for file in ("server.crt", "server-ecdsa.crt")}
    left = min(each.not_valid_after_utc for each in old.values()) - datetime.now(UTC)
    with house.serve() as served:
        for file, before in old.items():
            after = _certificate(house.home.certs / file)
            days = (after.not_valid_after_utc - datetime.now(UTC)).total_seconds() / 86_400
            facts.note(f"{file} is another", after.serial_number != before.serial_number)
            facts.note(f"{file} is good for its whole lifetime", 89 < days <= 90, f"{days:.1f} days")
            facts.note(f"{file} has the same key", after.public_key() == before.public_key())
        shown = x509.load_der_x509_certificate(served.leaf())
        facts.note("the new one is served", shown == _certificate(house.home.certs / "server-ecdsa.crt"))
    authority = Authority(workshop.folder / "renewing")
    made = authority.issue("server", KEYS["P-256"](), timedelta(days=60))
    house = workshop.house(
        "renewing-house", files_config((made.certificate_file, made.key_file)), certificates=False
    )
    with house.serve() as served:
        first = _leaf_of(served, authority.file)
        made.certificate_file.write_text("this is no certificate")
        time.sleep(0.4)  # longer than certificates.watch_interval: the server has looked at it
        facts.note("a file that went bad changes nothing", _leaf_of(served, authority.file) == first)
        authority.issue("server", KEYS["P-256"](), timedelta(days=90))
        seconds = until(lambda: _leaf_of(served, authority.file) != first)
        facts.note("files of others are taken up", seconds is not None)
    days_left = left.total_seconds() / 86_400
    return facts.finding(
        f"renewed with {days_left:.0f} days left, same keys; files of others after {seconds or 0:.1f} s",
        values={"days_left": days_left, "taken_up_after_s": seconds or 0.0},
    )


# --- no server without one --------------------------------------------------------------------------------


def fallback(workshop: Workshop) -> Finding:
    """Servers whose certificates are missing, damaged or not their keys': they end, say why, and do not listen."""
    authority = Authority(workshop.folder / "broken")
    good = authority.issue("good", KEYS["P-256"](), timedelta(days=60))
    other = authority.issue("other", KEYS["P-256"](), timedelta(days=60))
    over = authority.issue("over", KEYS["P-256"](), timedelta(days=-1))
    damaged = workshop.folder / "damaged.crt"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    cases = {
        "missing": (workshop.folder / "missing.crt", good.key_file),
        "damaged": (damaged, good.key_file),
        "of another key": (good.certificate_file, other.key_file),
        "expired": (over.certificate_file, over.key_file),
    }
    facts = Facts()
    for number, (what, pair) in enumerate(cases.items()):
        port = free_port()
        house = workshop.house(f"no-tls-{number}", files_config(pair), certificates=False)
        ended = zcproto(house.home, "serve", "--port", str(port))
        facts.note(f"{what}: it ends with an error", ended.code not in (0, None), ended.code)
        facts.note(
            f"{what}: it names the file", pair[0].name in ended.said or pair[1].name in ended.said, ended.said
        )
        facts.note(f"{what}: no traceback", "Traceback" not in ended.said, ended.said)
        facts.note(f"{what}: it never listened", "listening" not in ended.said, ended.said)
        with socket.socket() as probe:
            facts.note(f"{what}: nobody is at the port", probe.connect_ex((HOST, port)) != 0)
    return facts.finding(f"{len(cases)} of {len(cases)} kinds of bad certificate: no server, and the reason")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
