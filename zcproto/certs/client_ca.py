"""Decides how client certificates are issued, renewed and revoked in the certificate folder.

    client-ca.crt, client-ca.key   the authority; servers verify clients with the certificate
    client-ca.issued               what it has issued and which of that is revoked (issued.py)
    client-ca.crl                  the revocation list (CRL), generated from the list, for OpenSSL
    clients/NAME.crt, NAME.key     for the device; the key is missing if the device generated its own

Rules:
- A certificate is written to the list before it is installed, and a revocation to the list before the CRL. An
  interruption in between leaves a certificate in the list that no client has, or an outdated CRL, which the next
  call of `refresh_crl`, `issue_client` or `revoke_client` repairs.
- A revocation is permanent: one that is in the CRL and not in the list, as after restoring an old backup, is added
  to the list.
- A valid certificate is replaced only by a renewal, which keeps its key. After a revocation or expiry the key is
  always new.
- Nothing that was not created here is overwritten.

Must not know: connections, the users file, the current time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from zcproto.certs import authority, files, keys, pair
from zcproto.certs.authority import Authority, AuthorityFolder, Leaf, Progress
from zcproto.certs.client_user import MAX_USER, is_dns_user
from zcproto.certs.issued import (
    REASONS,
    UNKNOWN_NAME,
    UNSPECIFIED,
    Issued,
    current,
    has_room,
    parse_list,
    parse_serial,
    render_list,
)
from zcproto.certs.names import check_name
from zcproto.certs.profile import MAX_CLIENT_LIFETIME, client_certificate, revocation_list
from zcproto.errors import CertificateError
from zcproto.tls.pins import key_pin

KEY_TYPE: Final = "ecdsa-p256"

CRL_REFRESH: Final = timedelta(days=30)
"""Age at which the CRL is signed again. Eleven months remain to notice that it is not renewed."""

CRL_RETRY: Final = timedelta(days=1)

MAX_CSR_BYTES: Final = 1 << 16

MAX_LIST_BYTES: Final = files.MAX_FILE_BYTES
"""About 9,000 certificates with names of 20 characters. Larger fleets have an authority of their own."""


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A certificate that was issued to a client."""

    certificate: Path
    key: Path | None
    """None if the device has the key and sent a CSR."""
    serial: str
    """In hexadecimal, as accepted by `revoke_client`."""
    not_after: datetime
    pin: str
    """The pin of its public key, as returned by `key_pin`. A renewal keeps it."""


def paths(directory: Path) -> tuple[Path, Path]:
    """Return where the authority's certificate and its CRL are."""
    return authority.CLIENT.paths(directory)[0], directory / "client-ca.crl"


def ensure_authority(
    directory: Path, now: datetime, *, progress: Progress = lambda sentence: None
) -> tuple[Path, Path]:
    """Create the authority and its CRL if they are missing, and return their paths.

    Raises CertificateError, which names the file, the problem and the remedy; so do all functions here.
    """
    files.make_folder(directory)
    with files.locked(directory, progress):
        ca = _ClientAuthority(directory, now, progress)
        ca.load_or_create()
        ca.refresh_crl()
    return paths(directory)


def check_authority(directory: Path, now: datetime) -> None:
    """Raise the CertificateError with which `ensure_authority` would fail for the authority. Changes nothing."""
    if directory.exists():
        files.check_folder(directory)
        AuthorityFolder(
            authority.CLIENT, directory, pair.utc(now), lambda sentence: None, changes=False
        ).load()


def issue_client(
    directory: Path,
    name: str,
    *,
    lifetime: timedelta,
    now: datetime,
    renew: bool = False,
    csr: bytes | None = None,
    progress: Progress = lambda sentence: None,
) -> ClientCertificate:
    """Issue a certificate for the user `name`, in the folder `clients` below `directory`.

    `name` is a user name in the form of a DNS name, which the certificate contains. `lifetime` is at most five
    years. `renew` replaces a valid certificate and keeps its key; the old certificate stays valid until it expires
    or is revoked. `csr` is a certificate request (PKCS #10, PEM or DER) of a device that keeps its key; only its
    public key is used. `now` is an aware time.
    """
    _check_name(name)
    requested = None if csr is None else _requested_key(csr)
    files.make_folder(directory)
    with files.locked(directory, progress):
        ca = _ClientAuthority(directory, now, progress)
        ca.load_or_create(lifetime)
        return ca.issue(name, lifetime, renew=renew, requested=requested)


def revoke_client(
    directory: Path,
    *,
    name: str | None = None,
    serial: str | None = None,
    now: datetime,
    reason: str = UNSPECIFIED,
    progress: Progress = lambda sentence: None,
) -> tuple[Issued, ...]:
    """Revoke every certificate of the user `name`, or the one with this `serial`, for one of REASONS.

    Return those that were not revoked before; it is not an error if all of them were. A server that watches the
    folder closes the connections that use a revoked certificate and refuses it in handshakes.
    """
    if reason not in REASONS:
        raise CertificateError(f"unknown revocation reason; use one of: {', '.join(REASONS)}")
    number = None if serial is None else parse_serial(serial)
    files.check_folder(directory)
    with files.locked(directory, progress):
        ca = _ClientAuthority(directory, now, progress)
        if not ca.load():
            raise CertificateError(f"{directory}: no client certificate was ever issued here")
        return ca.revoke(name, number, reason)


def refresh_crl(
    directory: Path, now: datetime, *, progress: Progress = lambda sentence: None
) -> datetime | None:
    """Sign the CRL again if due, and return when it is due next.

    It is due when it is missing or damaged, lacks a revocation, or is a month old. Return None if the folder has no
    client authority; nothing is created then. Raises CertificateError if there is no usable CRL and none can be
    created.
    """
    if not any(path.exists() for path in authority.CLIENT.paths(directory)):
        return None
    files.check_folder(directory)
    with files.locked(directory, progress):
        ca = _ClientAuthority(directory, now, progress)
        return ca.refresh_crl() if ca.load() else None


def issued_clients(directory: Path) -> tuple[Issued, ...]:
    """Return the issued certificates that have not expired long ago, in order of issue."""
    path = _list_path(directory)
    return _read_list(path) if path.exists() else ()


def _list_path(directory: Path) -> Path:
    return directory / "client-ca.issued"


def _read_list(path: Path) -> tuple[Issued, ...]:
    return parse_list(files.read_certificate_file(path), str(path))


# --- requests ----------------------------------------------------------------------------------------------


def _check_name(name: str) -> None:
    if is_dns_user(name):
        return
    why = f"it has more than {MAX_USER} characters, the limit for a user" if len(name) > MAX_USER else ""
    form = check_name(name)  # raises an error that explains most problems
    why = why or f"write it as {form!r}, and rename the user accordingly" if form != name else why
    shown = name[:MAX_USER]
    raise CertificateError(f"{shown!r} cannot name a client: {why or 'it is an address or a wildcard'}")


def _requested_key(csr: bytes) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    """Return the public key of a request that was signed with its private key."""
    if len(csr) > MAX_CSR_BYTES:
        raise CertificateError(f"the CSR is larger than {MAX_CSR_BYTES} bytes; give a PKCS #10 request")
    load = x509.load_pem_x509_csr if b"-----BEGIN" in csr else x509.load_der_x509_csr
    try:
        request = load(csr)
        key, is_signed = request.public_key(), request.is_signature_valid
    except pair.UNREADABLE as error:
        raise CertificateError("the CSR cannot be parsed; give a PKCS #10 request in PEM or DER") from error
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey) or keys.weakness(key) is not None:
        raise CertificateError(f"the CSR has a key that is not accepted: {keys.weakness(key)}")
    if not is_signed:
        raise CertificateError("the CSR is not signed with its own key; create it again")
    return key


def _renewed_key(client: Leaf) -> keys.PrivateKey:
    if client.key is None or not client.is_matching:
        raise CertificateError(
            f"{client.key_path}: the key of {client.certificate_path} is not here; renew it with a CSR from the"
            " device that has the key, or revoke it and issue another"
        )
    return client.key


# --- under the folder's lock -------------------------------------------------------------------------------


class _ClientAuthority:
    """The client authority with its list and its CRL."""

    def __init__(self, directory: Path, now: datetime, progress: Progress) -> None:
        self._directory = directory
        self._now = pair.utc(now)
        self._progress = progress
        self._list_path = _list_path(directory)
        _, self._crl_path = paths(directory)
        self._folder = AuthorityFolder(authority.CLIENT, directory, self._now, progress)
        self._authority: Authority  # set by `load`

    def load(self, lifetime: timedelta = timedelta(0)) -> bool:
        """Load the authority. Return False if it does not exist."""
        found = self._folder.load(lifetime)
        if found is not None:
            self._authority = found
        return found is not None

    def load_or_create(self, lifetime: timedelta = timedelta(0)) -> None:
        if self.load(lifetime):
            return
        if not self._list_path.exists():
            self._write_list((), None)  # first, because an authority without a list has lost it
        self._authority = self._folder.create(keys.generate(KEY_TYPE))

    def issue(
        self,
        name: str,
        lifetime: timedelta,
        *,
        renew: bool,
        requested: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | None,
    ) -> ClientCertificate:
        """Issue a certificate for a key that is new, kept, or `requested`."""
        signing_key = self._authority.signing_key()
        self.refresh_crl()
        crl = self._read_crl()
        issued = self._read_issued(crl)
        folder = self._directory / "clients"
        files.make_folder(folder)
        paths = folder / f"{name}.crt", folder / f"{name}.key"
        client = self._folder.find_leaf(*paths, self._authority, "move it away with its key")
        valid_until = self._valid_until(client.certificate, issued)
        if valid_until is not None and not renew:
            raise CertificateError(
                f"{client.certificate_path}: is valid until"
                f" {valid_until:%Y-%m-%d %H:%M} UTC; renew it, or revoke it first"
            )
        new_key = keys.generate(KEY_TYPE) if requested is None and valid_until is None else None
        public_key = requested or (new_key or _renewed_key(client)).public_key()
        certificate = client_certificate(
            public_key, name, self._authority.certificate, signing_key, lifetime, self._now
        )
        entry = Issued(certificate.serial_number, name, certificate.not_valid_after_utc)
        self._write_list((*issued, entry), crl)
        is_replaced = new_key is not None and client.is_matching
        if client.key is not None and not keys.belongs(client.key, public_key) and not is_replaced:
            aside = files.set_aside(client.key_path)
            self._progress(
                f"{client.key_path} does not belong to this certificate. It was set aside as {aside}."
            )
        authority.install(certificate, client.certificate_path, new_key, client.key_path)
        return ClientCertificate(
            certificate=client.certificate_path,
            key=client.key_path if requested is None else None,
            serial=entry.serial,
            not_after=entry.not_after,
            pin=key_pin(public_key),
        )

    def revoke(self, name: str | None, number: int | None, reason: str) -> tuple[Issued, ...]:
        """Revoke the certificates of a user or with a serial number. Return those not revoked before."""
        self._authority.signing_key()
        crl = self._read_crl()
        issued = self._read_issued(crl)
        matching = [entry for entry in issued if entry.name == name or entry.serial_number == number]
        if number is not None and not matching:
            # It may have been in a list that was lost.
            self._progress(f"{self._list_path} has no certificate {number:X}. It is revoked nevertheless.")
            matching = [Issued(number, UNKNOWN_NAME, self._now + MAX_CLIENT_LIFETIME)]
        if not matching:
            raise CertificateError(
                f"{self._list_path}: has no certificate of {str(name)[:MAX_USER]!r}; check the name"
            )
        revoked = {
            entry.serial_number: replace(entry, revoked_at=self._now.replace(microsecond=0), reason=reason)
            for entry in matching
            if entry.revoked_at is None
        }
        if revoked:
            merged = {entry.serial_number: entry for entry in issued} | revoked
            self._write_list(tuple(merged.values()), crl)
        self.refresh_crl()
        return tuple(revoked.values())

    def refresh_crl(self) -> datetime:
        """Sign the CRL again if due, and return when it is due next."""
        now, path = self._now, self._crl_path
        crl = self._read_crl()
        latest = now + CRL_REFRESH
        try:
            issued = self._read_issued(crl)
        except CertificateError as error:
            if crl is None:
                raise
            self._progress(f"{error}. Until then {path} keeps its revocations.")
            issued, latest = _merged((), crl, now), now + CRL_RETRY
        revoked = [entry for entry in current(issued, now) if entry.revoked_at is not None]
        signed = _serial_numbers(crl)
        is_complete = all(entry.serial_number in signed for entry in revoked)
        if (
            crl is not None
            and is_complete
            and _is_valid(crl, now)
            and now < crl.last_update_utc + CRL_REFRESH
        ):
            return min(latest, crl.last_update_utc + CRL_REFRESH)
        key, problem = self._authority.key, self._authority.problem
        if key is None:
            if crl is None or not _is_valid(crl, now):
                raise CertificateError(f"{path}: must be signed again: {problem}")
            self._progress(f"{path} could not be signed again: {problem}. The old one remains in use.")
            return now + CRL_RETRY
        crl = revocation_list(revoked, _next_number(crl, now), self._authority.certificate, key, now)
        files.replace(path, crl.public_bytes(serialization.Encoding.PEM))
        return min(latest, crl.last_update_utc + CRL_REFRESH)

    def _valid_until(self, certificate: x509.Certificate | None, issued: Iterable[Issued]) -> datetime | None:
        """Return until when a server accepts the certificate; None if it does not."""
        if certificate is None or self._now > certificate.not_valid_after_utc:
            return None
        revoked = (entry.serial_number for entry in issued if entry.revoked_at)
        return None if certificate.serial_number in revoked else certificate.not_valid_after_utc

    def _read_issued(self, crl: x509.CertificateRevocationList | None) -> tuple[Issued, ...]:
        """Return the list, completed with revocations from the CRL. Raises CertificateError if it is lost."""
        path = self._list_path
        if not path.exists():
            raise CertificateError(
                f"{path}: is missing, which loses what was issued; restore it from a backup. If it is lost,"
                " create an empty file there: earlier certificates can then be revoked only by serial number"
            )
        return _merged(_read_list(path), crl, self._now)

    def _write_list(self, issued: Sequence[Issued], crl: x509.CertificateRevocationList | None) -> None:
        kept = current(issued, self._now, _serial_numbers(crl))
        if not has_room(kept, MAX_LIST_BYTES):
            raise CertificateError(
                f"{self._list_path}: is full with {len(kept)} certificates that have not expired; use shorter"
                " lifetimes, or an authority of your own (tls.client_ca_file)"
            )
        files.replace(self._list_path, render_list(kept))

    def _read_crl(self) -> x509.CertificateRevocationList | None:
        """Return the CRL, or None if it is missing. One that this authority did not sign is set aside."""
        path = self._crl_path
        if not path.exists():
            return None
        try:
            crl = x509.load_pem_x509_crl(files.read_certificate_file(path))
            public_key = self._authority.certificate.public_key()
            assert isinstance(public_key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
            is_signed = crl.issuer == self._authority.certificate.subject and crl.is_signature_valid(
                public_key
            )
        except pair.UNREADABLE:
            is_signed = False
        if is_signed:
            return crl
        self._progress(
            f"{path} is not signed by this authority. It was set aside as {files.set_aside(path)}."
        )
        return None


# --- the CRL -----------------------------------------------------------------------------------------------


def _merged(
    issued: Sequence[Issued], crl: x509.CertificateRevocationList | None, now: datetime
) -> tuple[Issued, ...]:
    known = {entry.serial_number: entry for entry in issued}
    for revoked in crl or ():
        entry = known.get(revoked.serial_number)
        if entry is None:  # its expiry is unknown: assume the latest possible
            entry = Issued(revoked.serial_number, UNKNOWN_NAME, now + MAX_CLIENT_LIFETIME)
        if entry.revoked_at is None:
            at, reason = revoked.revocation_date_utc, _reason_of(revoked)
            known[entry.serial_number] = replace(entry, revoked_at=at, reason=reason)
    return tuple(known.values())


def _serial_numbers(crl: x509.CertificateRevocationList | None) -> frozenset[int]:
    return frozenset(entry.serial_number for entry in crl or ())


def _reason_of(revoked: x509.RevokedCertificate) -> str:
    try:
        return revoked.extensions.get_extension_for_class(x509.CRLReason).value.reason.value
    except x509.ExtensionNotFound:
        return UNSPECIFIED


def _is_valid(crl: x509.CertificateRevocationList, now: datetime) -> bool:
    end = crl.next_update_utc
    return end is not None and crl.last_update_utc <= now <= end


def _next_number(crl: x509.CertificateRevocationList | None, now: datetime) -> int:
    """Return a number higher than those of all lists before, including lost ones: it counts seconds."""
    last = 0 if crl is None else crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    return max(last + 1, int(now.timestamp()))
