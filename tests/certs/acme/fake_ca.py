"""A CA that speaks ACME, in process: `fetch` stands for the network.

It is built without the code under test and without the package `acme`: it checks signatures, nonces and URLs
itself, and has switches for what a CA, or a peer in its place, may do.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from zcproto.common.https import Response, Unreachable

ROOT = "https://ca.example"
DIRECTORY = f"{ROOT}/dir"
Answered = tuple[int, dict[str, str], Any]
PROBLEM = "urn:ietf:params:acme:error:"


class Problem(Exception):
    """An error response."""

    def __init__(self, code: str, status: int = 400, detail: str = "", **headers: str) -> None:
        super().__init__(code)
        self.code, self.status, self.detail, self.headers = code, status, detail or code, headers


class FakeCa:
    """The CA. `check` judges the answer to a challenge: its type, name, token and key authorization."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self.now = now
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.root_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fake CA")])
        self.check: Callable[[str, str, str, str], str] = lambda kind, name, token, text: ""
        self.lifetime = timedelta(days=90)
        self.ahead = timedelta(0)
        """By how much the validity begins later."""
        self.names: Callable[[list[str]], list[str]] = lambda names: names
        self.challenge_types = ["http-01", "tls-alpn-01", "dns-01", "of-the-future"]
        self.reject_nonces = 0
        self.polls_until_checked = 1
        self.polls_until_issued = 1
        self.problems: deque[Problem] = deque()
        """Sent instead of the response to the next signed requests."""
        self.problem_at: dict[str, Problem] = {}
        """Sent at every request to a resource."""
        self.eab: tuple[str, bytes] | None = None
        self.window: dict[str, Any] | None = None
        self.extra_directory: dict[str, Any] = {}
        self.retry_after: dict[str, str] = {}
        """By resource."""
        self.down = ""
        self.reuses_authorizations = False
        # What has happened.
        self.requests: list[tuple[str, str]] = []
        self.accounts: dict[str, dict[str, Any]] = {}  # by thumbprint
        self.orders: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self._authorizations: list[dict[str, Any]] = []
        self._nonces: set[str] = set()
        self._issued: dict[str, bytes] = {}

    # --- the network

    async def fetch(self, method: str, url: str, headers: Sequence[tuple[str, str]], body: bytes) -> Response:
        assert url.startswith(f"{ROOT}/"), url
        path = url.removeprefix(ROOT)
        self.requests.append((method, path))
        if self.down:
            raise Unreachable(self.down)
        try:
            if path in self.problem_at:
                raise self.problem_at[path]
            status, fields, data = self._answer(method, path, dict(headers), body)
        except Problem as problem:
            status, fields = (
                problem.status,
                {name.replace("_", "-"): value for name, value in problem.headers.items()},
            )
            data = {"type": PROBLEM + problem.code, "detail": problem.detail, "status": status}
        if method == "POST" or path == "/nonce":
            nonce = _encode(f"nonce {len(self.requests)}".encode())
            self._nonces.add(nonce)
            fields["replay-nonce"] = nonce
        return Response(status, data if isinstance(data, bytes) else json.dumps(data).encode(), fields)

    def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answered:
        if path == "/dir":
            found = {
                name: f"{ROOT}/{url}" for name, url in (("newNonce", "nonce"), ("newAccount", "account"))
            }
            found |= {"newOrder": f"{ROOT}/order"}
            if self.window is not None:
                found["renewalInfo"] = f"{ROOT}/renewal"
            return 200, {}, {**found, "meta": {"termsOfService": f"{ROOT}/terms"}, **self.extra_directory}
        if path == "/nonce":
            return 200, {}, b""
        if path.startswith("/renewal/"):
            self.asked.append(path.removeprefix("/renewal/"))
            return 200, dict(self.retry_after), {"suggestedWindow": self.window}
        assert method == "POST", path
        assert headers["Content-Type"] == "application/jose+json"
        protected, payload, thumbprint = self._open(path, body)
        if self.problems:
            raise self.problems.popleft()
        if path == "/account":
            return self._account(payload, protected, thumbprint)
        assert protected["kid"] == f"{ROOT}/account/{thumbprint}"
        kind, _, number = path[1:].partition("/")
        return getattr(self, f"_{kind}")(number, payload, thumbprint)  # type: ignore[no-any-return]

    def _open(self, path: str, body: bytes) -> tuple[dict[str, Any], Any, str]:
        """Check a JWS (RFC 8555 section 6.2)."""
        message = json.loads(body)
        protected = json.loads(_decode(message["protected"]))
        assert protected["alg"] == "ES256"
        assert protected["url"] == ROOT + path
        assert ("jwk" in protected) != ("kid" in protected)
        jwk = protected.get("jwk") or self.accounts[protected["kid"].rpartition("/")[2]]["jwk"]
        numbers = [int.from_bytes(_decode(jwk[name]), "big") for name in ("x", "y")]
        signature = _decode(message["signature"])
        halves = (int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
        ec.EllipticCurvePublicNumbers(*numbers, ec.SECP256R1()).public_key().verify(
            encode_dss_signature(*halves),
            f"{message['protected']}.{message['payload']}".encode(),
            ec.ECDSA(hashes.SHA256()),
        )
        if protected["nonce"] not in self._nonces or self.reject_nonces > 0:
            self.reject_nonces -= 1
            raise Problem("badNonce")
        self._nonces.remove(protected["nonce"])
        payload = _decode(message["payload"])
        return protected, json.loads(payload) if payload else None, _thumbprint(jwk)

    # --- resources

    def _account(self, payload: Any, protected: dict[str, Any], thumbprint: str) -> Answered:
        location = {"location": f"{ROOT}/account/{thumbprint}"}
        if thumbprint in self.accounts:
            return 200, location, {"status": "valid"}
        if payload.get("onlyReturnExisting"):
            raise Problem("accountDoesNotExist")
        if not payload.get("termsOfServiceAgreed"):
            raise Problem("userActionRequired", 403)
        if self.eab is not None:
            binding = payload.get("externalAccountBinding")
            if binding is None:
                raise Problem("externalAccountRequired", 403)
            kid, key = self.eab
            signed = f"{binding['protected']}.{binding['payload']}".encode()
            assert json.loads(_decode(binding["protected"])) == {
                "alg": "HS256",
                "kid": kid,
                "url": f"{ROOT}/account",
            }
            assert json.loads(_decode(binding["payload"])) == protected["jwk"]
            if hmac.digest(key, signed, "sha256") != _decode(binding["signature"]):
                raise Problem("unauthorized", 403, "the binding is not signed with the key")
        self.accounts[thumbprint] = {"jwk": protected["jwk"], "contact": payload.get("contact")}
        return 201, location, {"status": "valid"}

    def _order(self, number: str, payload: Any, thumbprint: str) -> Answered:
        if not number:
            wanted = [each["value"] for each in payload["identifiers"]]
            for each in payload["identifiers"]:
                is_address = each["value"].replace(".", "").isdigit() or ":" in each["value"]
                assert each["type"] == ("ip" if is_address else "dns")
            if payload.get("replaces") in {order.get("replaces") for order in self.orders} - {None}:
                raise Problem("alreadyReplaced", 409)
            number = str(len(self.orders))
            order: dict[str, Any] = {
                "status": "pending",
                "names": wanted,
                "replaces": payload.get("replaces"),
            }
            order["authorizations"] = [self.authorization_of(name) for name in wanted]
            self.orders.append(order)
            return 201, {"location": f"{ROOT}/order/{number}", **self.retry_after}, self.shown(int(number))
        return 200, dict(self.retry_after), self.shown(int(number))

    def shown(self, number: int) -> dict[str, Any]:
        order = self.orders[number]
        states = {self._authorizations[each]["status"] for each in order["authorizations"]}
        if order["status"] == "pending" and states == {"valid"}:
            order["status"] = "ready"
        if "invalid" in states:
            order["status"] = "invalid"
        if order["status"] == "processing":
            order["polls"] += 1
            if order["polls"] >= self.polls_until_issued:
                order["status"] = "valid"
        shown = {
            "status": order["status"],
            "identifiers": [{"type": "dns", "value": name} for name in order["names"]],
            "authorizations": [f"{ROOT}/authorization/{each}" for each in order["authorizations"]],
            "finalize": f"{ROOT}/finalize/{number}",
        }
        return shown | ({"certificate": f"{ROOT}/certificate/{number}"} if order["status"] == "valid" else {})

    def authorization_of(self, name: str) -> int:
        for number, each in enumerate(self._authorizations):
            if self.reuses_authorizations and each["name"] == name and each["status"] == "valid":
                return number
        token = _encode(hashlib.sha256(f"{name}{len(self._authorizations)}".encode()).digest())
        self._authorizations.append(
            {"status": "pending", "name": name, "token": token, "polls": 0, "taken": None}
        )
        return len(self._authorizations) - 1

    def _authorization(self, number: str, payload: Any, thumbprint: str) -> Answered:
        found = self._authorizations[int(number)]
        assert payload is None
        if found["taken"] is not None and found["status"] == "pending":
            found["polls"] += 1
            if found["polls"] >= self.polls_until_checked:
                text = f"{found['token']}.{thumbprint}"
                found["problem"] = self.check(found["taken"], found["name"], found["token"], text)
                found["status"] = "invalid" if found["problem"] else "valid"
        problem = found.get("problem")
        challenges = [
            {
                "type": kind,
                "url": f"{ROOT}/challenge/{number}.{kind}",
                "token": found["token"],
                "status": found["status"],
                **(
                    {"error": {"type": f"{PROBLEM}unauthorized", "detail": problem}}
                    if problem and kind == found["taken"]
                    else {}
                ),
            }
            for kind in self.challenge_types
        ]
        identifier = {"type": "dns", "value": found["name"]}
        return (
            200,
            dict(self.retry_after),
            {
                "status": found["status"],
                "identifier": identifier,
                "challenges": challenges,
            },
        )

    def _challenge(self, number: str, payload: Any, thumbprint: str) -> Answered:
        assert payload == {}
        number, _, kind = number.partition(".")
        found = self._authorizations[int(number)]
        found["taken"] = kind
        return 200, {}, {"type": kind, "url": f"{ROOT}/challenge/{number}.{kind}", "status": "processing"}

    def _finalize(self, number: str, payload: Any, thumbprint: str) -> Answered:
        order = self.orders[int(number)]
        assert order["status"] == "ready"
        request = x509.load_der_x509_csr(_decode(payload["csr"]))
        assert request.is_signature_valid
        san = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [str(each.value) for each in san] == order["names"]
        self._issued[number] = self.issue(request.public_key(), self.names(order["names"]))
        order |= {"status": "processing", "polls": 0}
        return 200, {}, self.shown(int(number))

    def _certificate(self, number: str, payload: Any, thumbprint: str) -> Answered:
        assert payload is None
        return 200, {}, self._issued[number]

    def issue(self, public_key: Any, names: list[str]) -> bytes:
        """Return a certificate as PEM."""
        now = self.now().replace(microsecond=0)
        sans = [
            x509.IPAddress(ip_address(name)) if name[0].isdigit() or ":" in name else x509.DNSName(name)
            for name in names
        ]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.root_name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1) + self.ahead + min(self.lifetime, timedelta(0)))
            .not_valid_after(now + self.lifetime)
            .add_extension(x509.SubjectAlternativeName(sans), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


def check_files(folder: Path) -> Callable[[str, str, str, str], str]:
    """Return a `FakeCa.check` that looks for the answers in the folder of challenges."""

    def check(kind: str, name: str, token: str, text: str) -> str:
        if kind == "http-01":
            return "" if (folder / f"http-01.{token}").read_text() == text else "another text"
        certificate = x509.load_pem_x509_certificate((folder / f"tls-alpn-01.{name}.pem").read_bytes())
        (extension,) = [
            each for each in certificate.extensions if each.oid.dotted_string == "1.3.6.1.5.5.7.1.31"
        ]
        assert extension.critical
        assert isinstance(extension.value, x509.UnrecognizedExtension)
        digest = hashlib.sha256(text.encode()).digest()
        return "" if extension.value.value == b"\x04\x20" + digest else "another digest"

    return check


def at(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _thumbprint(jwk: dict[str, str]) -> str:
    members = {name: jwk[name] for name in ("crv", "kty", "x", "y")}
    return _encode(
        hashlib.sha256(json.dumps(members, separators=(",", ":"), sort_keys=True).encode()).digest()
    )


def _encode(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))
