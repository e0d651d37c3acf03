"""Speaks ACME with one CA: finds or creates the account, orders certificates, asks when to renew them.

    RFC 8555: ACME    RFC 8737: the challenge tls-alpn-01    RFC 8738: addresses    RFC 9773: renewal information

The messages, their signatures and the account binding are those of certbot's package `acme`. Its `ClientV2` is not
used: it reads responses of any size, its timeout begins again with each byte, it follows redirects to plain HTTP
and uses proxies of the environment, it repeats a rejected nonce only once, it cannot name the certificate that an
order replaces, and a thread that waits in it cannot be stopped.

Rules:
- Every URL of the CA begins with `https:`, also those that it sends, and its certificate is verified.
- A rejected nonce is replaced, up to NONCE_TRIES times (RFC 8555 section 6.5).
- Texts of the CA are shortened and escaped before they appear in an error.
- The answers to challenges are in place before the CA is asked to check, and are removed after the order.

Must not know: files, when to order. Time, waiting and the network are arguments.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

from acme import challenges, jws, messages
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.errors import DeserializationError
from josepy.interfaces import JSONDeSerializable
from josepy.json_util import decode_b64jose
from josepy.json_util import field as json_field
from josepy.jwa import ES256
from josepy.jwk import JWK, JWKEC

from zcproto.certs.acme.schedule import RenewalWindow
from zcproto.certs.names import is_address
from zcproto.certs.settings import TLS_ALPN, AcmeSettings
from zcproto.common.files import read_secret
from zcproto.common.https import Response, Unreachable
from zcproto.common.text import escape_text

NONCE_TRIES: Final = 20
"""A CA rejects a nonce if it was idle for long, or its servers disagree; one that rejects half rejects 20 in a row
once in a million requests."""

FIRST_POLL_S: Final = 1.0
MIN_POLL_S: Final = 0.25
MAX_POLL_S: Final = 30.0

MAX_RETRY_AFTER_S: Final = 86_400.0
"""The longest delay that is taken from a CA, so that a wrong one does not stop renewals."""

MAX_DETAIL: Final = 500
"""Characters of a text of the CA in an error."""

_URL: Final = re.compile(r"https://[!$-~]{1,2000}")
_JOSE: Final = ("Content-Type", "application/jose+json")
_AGENT: Final = ("User-Agent", "zcproto-acme/1")
_BY_CODE: Final = {
    "rateLimited": "wait; the next attempt is made when the CA allows it",
    "externalAccountRequired": "set acme.eab_kid and acme.eab_key_file, which the CA gives to its customers",
    "caa": "allow the CA in the CAA records of the name",
    "dns": "check the DNS records of the name",
    "rejectedIdentifier": "remove the name from certificates.names if the CA does not issue for it",
    "unsupportedIdentifier": "remove the name from certificates.names if the CA does not issue for it",
    "userActionRequired": "follow the instructions of the CA",
}
_REACHABLE: Final = {
    True: "the CA must reach server.port of this server as port 443 of that name",
    False: "the CA must reach http.redirect_port of this server as port 80 of that name",
}

T = TypeVar("T")


class OrderFailedError(Exception):
    """The CA did not issue a certificate. The message is a sentence with the cure.

    `code` is the type of the CA's problem, without its prefix; `retry_after_s` the seconds that the CA wants to
    wait.
    """

    def __init__(self, message: str, *, code: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class ChallengeAnswers(Protocol):
    """Where the answers to challenges are put."""

    def put_text(self, token: str, text: str) -> None: ...

    def put_certificate(self, name: str, digest: bytes, now: datetime) -> None: ...

    def clear(self) -> None: ...


@challenges.ChallengeResponse.register
class TlsAlpn01Response(challenges.KeyAuthorizationChallengeResponse):
    """The response to TlsAlpn01."""

    typ = TLS_ALPN


@challenges.Challenge.register
class TlsAlpn01(challenges.KeyAuthorizationChallenge):
    """The challenge of RFC 8737, which the package does not have."""

    response_cls = TlsAlpn01Response
    typ = TLS_ALPN

    def validation(self, account_key: JWK, **unused: Any) -> str:
        """Return the key authorization."""
        return str(self.key_authorization(account_key))


class ReplacingOrder(messages.NewOrder):
    """A new order that names the certificate which it replaces (RFC 9773 section 5)."""

    replaces: str | None = json_field("replaces", omitempty=True)


Fetch = Callable[[str, str, Sequence[tuple[str, str]], bytes], Awaitable[Response]]
"""Sends a request of this method to this URL, with these header fields and this body. Raises Unreachable."""


class AcmeClient:
    """One account at one CA. Each method raises OrderFailedError."""

    def __init__(
        self,
        settings: AcmeSettings,
        account_key: ec.EllipticCurvePrivateKey,
        answers: ChallengeAnswers,
        *,
        fetch: Fetch,
        sleep: Callable[[float], Awaitable[None]],
        wall: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._key = JWKEC(key=account_key)
        self._answers = answers
        self._fetch = fetch
        self._sleep = sleep
        self._wall = wall
        self._directory: messages.Directory | None = None
        self._nonce: bytes | None = None
        self._account: str | None = None

    async def order(
        self, names: Sequence[str], request: x509.CertificateSigningRequest, replaces: str | None = None
    ) -> bytes:
        """Return the chain for a request, as PEM. `replaces` is the `renewal_id` of the certificate before it."""
        await self._find_account()
        try:
            return await self._order(names, request, replaces)
        finally:
            self._answers.clear()

    async def renewal_window(self, certificate: x509.Certificate) -> RenewalWindow | None:
        """Ask when to renew a certificate. Return None if the CA does not say."""
        directory = await self._find_directory()
        base = directory.to_partial_json().get("renewalInfo")
        its_id = renewal_id(certificate)
        if not isinstance(base, str) or its_id is None:
            return None
        reply = self._checked(await self._send(f"{_checked_url(base)}/{its_id}"))
        window = _parsed(reply, messages.RenewalInfo).suggested_window
        if None in (window.start, window.end) or window.end <= window.start:
            return None  # RFC 9773 section 4.2: treat it as if there were none
        return RenewalWindow(
            window.start.astimezone(UTC), window.end.astimezone(UTC), self._retry_after(reply)
        )

    # --- the account ---------------------------------------------------------------------------------------

    async def _find_directory(self) -> messages.Directory:
        if self._directory is None:
            reply = self._checked(await self._send(self._settings.directory))
            self._directory = _parsed(reply, messages.Directory)
        return self._directory

    async def _url_of(self, resource: str) -> str:
        directory = await self._find_directory()
        return _checked_url(directory.to_partial_json().get(resource))

    async def _find_account(self) -> None:
        """Find the account of the key, or create it (RFC 8555 section 7.3)."""
        if self._account is not None:
            return
        url = await self._url_of("newAccount")
        try:
            reply = await self._post(url, messages.NewRegistration(only_return_existing=True))
        except OrderFailedError as error:
            if error.code != "accountDoesNotExist":
                raise
            reply = await self._post(url, self._registration())
        self._account = _checked_url(reply.headers.get("location"))

    def _registration(self) -> messages.NewRegistration:
        settings, binding = self._settings, None
        if settings.eab_key_file is not None:
            secret = read_secret(settings.eab_key_file, "acme.eab_key_file")
            assert self._directory is not None
            try:
                binding = messages.ExternalAccountBinding.from_data(
                    self._key.public_key(), settings.eab_kid, secret, self._directory
                )
            except ValueError as error:
                raise OrderFailedError(
                    f"{settings.eab_key_file} holds no key in base64url: store it as the CA shows it"
                ) from error
        return messages.NewRegistration(
            contact=tuple(f"mailto:{address}" for address in settings.contact),
            terms_of_service_agreed=True,
            external_account_binding=binding,
        )

    # --- an order ------------------------------------------------------------------------------------------

    async def _order(
        self, names: Sequence[str], request: x509.CertificateSigningRequest, replaces: str | None
    ) -> bytes:
        reply = await self._new_order(names, replaces)
        order, order_url = _parsed(reply, messages.Order), _checked_url(reply.headers.get("location"))
        pending: dict[str, messages.ChallengeBody] = {}
        for url in order.authorizations or ():
            authorization = _parsed(await self._post(_checked_url(url)), messages.Authorization)
            if authorization.status == messages.STATUS_PENDING:
                pending[url] = self._answer(authorization, names)
        for challenge in pending.values():
            await self._post_bytes(_checked_url(challenge.uri), b"{}")
        for url in pending:
            await self._poll(
                url, messages.Authorization, self._refusal_of_authorization, messages.STATUS_VALID
            )
        order = await self._poll(order_url, messages.Order, _refusal_of_order, messages.STATUS_READY)
        await self._post(_checked_url(order.finalize), messages.CertificateRequest(csr=request))
        order = await self._poll(order_url, messages.Order, _refusal_of_order, messages.STATUS_VALID)
        return (await self._post(_checked_url(order.certificate))).body

    async def _new_order(self, names: Sequence[str], replaces: str | None) -> Response:
        url = await self._url_of("newOrder")
        identifiers = [
            messages.Identifier(
                typ=messages.IDENTIFIER_IP if is_address(name) else messages.IDENTIFIER_FQDN, value=name
            )
            for name in names
        ]
        try:
            return await self._post(url, ReplacingOrder(identifiers=identifiers, replaces=replaces))
        except OrderFailedError as error:
            # The certificate was replaced before, or is not of this account: neither prevents a new one.
            if replaces is None or error.code in ("", "rateLimited"):
                raise
            return await self._post(url, ReplacingOrder(identifiers=identifiers))

    def _answer(self, authorization: messages.Authorization, names: Sequence[str]) -> messages.ChallengeBody:
        """Put the answer to the challenge of an authorization in place, and return the challenge."""
        wanted, name = self._settings.challenge, _name_of(authorization)
        if name not in names:
            raise OrderFailedError("the CA asks for a name that was not ordered; check acme.directory")
        for body in authorization.challenges or ():
            challenge = body.chall
            if challenge.typ != wanted or not isinstance(challenge, challenges.KeyAuthorizationChallenge):
                continue
            text = str(challenge.validation(self._key))
            if wanted == TLS_ALPN:
                self._answers.put_certificate(name, hashlib.sha256(text.encode()).digest(), self._wall())
            else:
                self._answers.put_text(challenge.encode("token"), text)
            return body
        raise OrderFailedError(f"the CA does not check {name} by {wanted}; set acme.challenge to another one")

    async def _poll(
        self,
        url: str,
        kind: type[T],
        refusal_of: Callable[[T], OrderFailedError | None],
        wanted: messages.Status,
    ) -> T:
        """Fetch a resource until it has this status. The caller has a limit of time."""
        delay = FIRST_POLL_S
        while True:
            reply = await self._post(url)
            found: Any = _parsed(reply, kind)
            if found.status == wanted:
                return found  # type: ignore[no-any-return]
            refusal = refusal_of(found)
            if refusal is not None:
                raise refusal
            await self._sleep(min(max(self._retry_after(reply, delay), MIN_POLL_S), MAX_POLL_S))
            delay = min(delay * 1.5, MAX_POLL_S)

    def _refusal_of_authorization(self, found: messages.Authorization) -> OrderFailedError | None:
        if found.status in (messages.STATUS_PENDING, messages.STATUS_PROCESSING):
            return None
        problems = [body.error for body in found.challenges or () if body.error is not None]
        why = "; ".join(_text_of(problem) for problem in problems) or _status_of(found)
        cure = _REACHABLE[self._settings.challenge == TLS_ALPN]
        return OrderFailedError(
            f"the CA could not check {_name_of(found)} by {self._settings.challenge}: {why}; {cure}"
        )

    # --- requests ------------------------------------------------------------------------------------------

    async def _post(self, url: str, message: JSONDeSerializable | None = None) -> Response:
        """Send a signed message, or fetch a resource without one (RFC 8555 section 6.3)."""
        return await self._post_bytes(url, b"" if message is None else message.json_dumps().encode())

    async def _post_bytes(self, url: str, payload: bytes) -> Response:
        for _ in range(NONCE_TRIES):
            if self._nonce is None:
                self._checked(await self._send(await self._url_of("newNonce"), "HEAD"))
            nonce, self._nonce = self._nonce, None
            if nonce is None:
                break
            signed = jws.JWS.sign(payload, key=self._key, alg=ES256, nonce=nonce, url=url, kid=self._account)
            reply = await self._send(url, "POST", signed.json_dumps().encode())
            try:
                return self._checked(reply)
            except OrderFailedError as error:
                if error.code != "badNonce":
                    raise
        raise OrderFailedError(f"{self._host} accepts no nonce; try again later, or ask the CA")

    async def _send(self, url: str, method: str = "GET", body: bytes = b"") -> Response:
        headers = (_AGENT, _JOSE) if body else (_AGENT,)
        try:
            reply = await self._fetch(method, url, headers, body)
        except Unreachable as error:
            raise OrderFailedError(f"{error}; check acme.directory, acme.ca_file and the network") from error
        nonce = reply.headers.get("replay-nonce")
        if nonce is not None:
            try:
                self._nonce = decode_b64jose(nonce) or None
            except DeserializationError:
                self._nonce = None
        return reply

    def _checked(self, reply: Response) -> Response:
        """Return a successful response. Raise the problem of any other (RFC 8555 section 6.7)."""
        if 200 <= reply.status < 300:
            return reply
        code, why = "", ""
        try:
            problem = messages.Error.from_json(_json(reply))
            code, why = str(problem.typ).rpartition(":")[2], _text_of(problem)
        except (OrderFailedError, DeserializationError, TypeError, ValueError):
            pass  # an error of a proxy, or of a server that is no CA
        detail = f": {why}" if why else ""
        cure = _BY_CODE.get(code, "check [acme], or try again later")
        retry_after = self._retry_after(reply, 0.0)
        raise OrderFailedError(
            f"{self._host} answered {reply.status}{detail}; {cure}", code=code, retry_after_s=retry_after
        )

    @property
    def _host(self) -> str:
        return urlsplit(self._settings.directory).hostname or ""

    def _retry_after(self, reply: Response, default: float = 6 * 3600.0) -> float:
        """Return the seconds that a response wants to wait (RFC 9110 section 10.2.3)."""
        text = reply.headers.get("retry-after", "")
        if text.isdecimal() and len(text) <= 9:
            seconds = float(text)
        else:
            try:
                at = parsedate_to_datetime(text)
            except ValueError:
                return default
            seconds = (at.replace(tzinfo=at.tzinfo or UTC) - self._wall()) / timedelta(seconds=1)
        return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def renewal_id(certificate: x509.Certificate) -> str | None:
    """Return the identifier of a certificate in requests for renewal information (RFC 9773 section 4.1)."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        return None
    key_id = extension.value.key_identifier
    if key_id is None:
        return None
    number = certificate.serial_number
    serial = number.to_bytes(number.bit_length() // 8 + 1, "big")  # with room for the sign, as in DER
    return ".".join(urlsafe_b64encode(part).decode().rstrip("=") for part in (key_id, serial))


def _checked_url(url: object) -> str:
    with contextlib.suppress(ValueError):  # of the port
        if (
            isinstance(url, str)
            and _URL.fullmatch(url)
            and urlsplit(url).hostname
            and urlsplit(url).port != 0
        ):
            return url
    raise OrderFailedError("the CA has sent an address that is not https; check acme.directory")


def _json(reply: Response) -> dict[str, Any]:
    try:
        found = json.loads(reply.body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise OrderFailedError("the CA has sent something else than ACME; check acme.directory")
    return found


def _parsed(reply: Response, kind: Any) -> Any:
    """Return a message of the CA."""
    try:
        return kind.from_json(_json(reply))
    except (DeserializationError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise OrderFailedError("the CA has sent something else than ACME; check acme.directory") from error


def _refusal_of_order(found: messages.Order) -> OrderFailedError | None:
    if found.status in (messages.STATUS_PENDING, messages.STATUS_PROCESSING, messages.STATUS_READY):
        return None
    why = _status_of(found) if found.error is None else _text_of(found.error)
    return OrderFailedError(f"the CA has refused the order: {why}; check certificates.names")


def _name_of(found: messages.Authorization) -> str:
    return escape_text(str(getattr(found.identifier, "value", "")), MAX_DETAIL)


def _status_of(found: messages.Authorization | messages.Order) -> str:
    return f"its status is {getattr(found.status, 'name', 'missing')}"


def _text_of(problem: messages.Error) -> str:
    texts = [problem.detail or problem.title or str(problem.typ)]
    texts += [each.detail for each in problem.subproblems or () if each.detail]
    return escape_text("; ".join(map(str, texts)), MAX_DETAIL)
