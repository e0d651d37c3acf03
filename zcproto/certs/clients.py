"""Decides how client certificates are issued, renewed and revoked in the folder of certificates.

    client-ca.crt, client-ca.key   the authority; servers believe clients by the first
    client-ca.issued               what it has issued, and what of that is revoked (client_list.py)
    client-ca.crl                  what is revoked, signed: made from the list, for OpenSSL
    clients/NAME.crt, NAME.key     for the device; the key is missing if the device made its own

Rules:
- A certificate gets into the list before it gets into its place, and a revocation gets into the list before
  it gets into the signed one. A crash in between leaves a certificate in the list that nobody has, or a
  signed list that is behind, which the next call of `refresh_crl`, `issue_client` or `revoke_client` mends.
- What was revoked once stays revoked: what the signed list has and the list has not, as after a restore of
  an old backup, is taken in.
- A certificate that is good is replaced only by a renewal, which keeps its key. After a revocation, or past
  its end, there is always a new key.
- Nothing that was not made here is overwritten.

Must not know: connections, the file of users, what time it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from zcproto.certs import files, keys, pair
from zcproto.certs.authority import pem, read_or_set_aside
from zcproto.certs.client_issue import (
    MAX_CLIENT_LIFETIME,
    client_authority_certificate,
    client_authority_name,
    client_certificate,
    revocation_list,
)
from zcproto.certs.client_list import (
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
from zcproto.certs.client_user import MAX_USER, USER_KINDS, is_dns_user, user_of
from zcproto.certs.names import check_name
from zcproto.errors import CertificateError

__all__ = [
    "MAX_CLIENT_LIFETIME",
    "REASONS",
    "USER_KINDS",
    "ClientCertificate",
    "Issued",
    "ensure_client_authority",
    "issue_client",
    "issued_clients",
    "refresh_crl",
    "revoke_client",
    "user_of",
]

KEY_TYPE: Final = "ecdsa-p256"

CRL_REFRESH: Final = timedelta(days=30)
"""How old the signed list gets. Eleven more months are left to notice that it is not renewed."""

CRL_RETRY: Final = timedelta(days=1)

MAX_CSR_BYTES: Final = 1 << 16

MAX_LIST_BYTES: Final = files.MAX_FILE_BYTES
"""Some 9,000 certificates with names of 20 characters. Larger fleets have an authority of their own."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A certificate that was issued to a client."""

    name: str
    """The user whom it names."""
    certificate: Path
    key: Path | None
    """None if the device has the key, and asked with a CSR."""
    serial: str
    """In hexadecimal, as `revoke_client` takes it."""
    not_after: datetime
    leaf_sha256: bytes
    """SHA-256 of the certificate's DER."""
    pin: str
    """The pin of its public key, as `spki_pin` gives it: a renewal keeps it."""


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: keys.PrivateKey | None
    problem: str
    """Why there is no key, as a sentence with the cure; empty if there is one."""

    def issued(self, certificate: x509.Certificate) -> bool:
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (InvalidSignature, *pair.UNREADABLE):
            return False
        return True

    def signing_key(self) -> keys.PrivateKey:
        if self.key is None:
            raise CertificateError(self.problem)
        return self.key


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a client's certificate is or will be, and what is there."""

    certificate_path: Path
    key_path: Path
    certificate: x509.Certificate | None
    key: keys.PrivateKey | None

    @property
    def has_its_key(self) -> bool:
        return (
            self.certificate is not None
            and self.key is not None
            and keys.belongs(self.key, self.certificate.public_key())
        )


def _silent(sentence: str) -> None:
    """Nobody listens."""


# --- what others call ------------------------------------------------------------------------------------


def ensure_client_authority(
    directory: Path, now: datetime, *, progress: Progress = _silent
) -> tuple[Path, Path]:
    """The authority's certificate and its signed list, both made if they are missing: for a server to believe.

    Raises CertificateError, which names the file, what is wrong and what to do; so do all functions here.
    """
    moment = pair.utc(now)
    files.make_folder(directory)
    with _locked(directory, progress):
        own = _load_or_make(directory, moment, timedelta(0), progress)
        _refresh(directory, own, moment, progress)
    return _authority_paths(directory)[0], _crl_path(directory)


def issue_client(
    directory: Path,
    name: str,
    *,
    lifetime: timedelta,
    now: datetime,
    renew: bool = False,
    csr: bytes | None = None,
    progress: Progress = _silent,
) -> ClientCertificate:
    """A certificate for the user `name`, in the folder `clients` below `directory`.

    `name` is a user's name in the form of a DNS name, which the certificate carries. `lifetime` is at most
    five years. `renew` replaces a certificate that is still good, with the same key; the one before stays
    good until it expires or is revoked. `csr` is a request for a certificate (PKCS #10, PEM or DER) by a
    device that keeps its key; nothing of it counts but its public key. `now` is an aware time.
    """
    moment = pair.utc(now)
    _check_name(name)
    _check_lifetime(lifetime)
    requested = None if csr is None else _requested_key(csr)
    files.make_folder(directory)
    folder = directory / "clients"
    with _locked(directory, progress):
        own = _load_or_make(directory, moment, lifetime, progress)
        signing_key = own.signing_key()
        _refresh(directory, own, moment, progress)
        issued, signed = _read_known(directory, own, moment, progress)
        files.make_folder(folder)
        place = _find(folder, name, own, progress)
        _check_replaceable(place, issued, moment, renew)
        new_key = None
        if requested is None and not (renew and _is_live(place, issued, moment)):
            new_key = keys.generate(KEY_TYPE)
        public_key = requested or (new_key or _kept_key(place)).public_key()
        certificate = client_certificate(public_key, name, own.certificate, signing_key, lifetime, moment)
        entry = Issued(certificate.serial_number, name, certificate.not_valid_after_utc)
        _write_list(directory, (*issued, entry), signed, moment)
        _put_key_aside(place, public_key, overwritten=new_key is not None, progress=progress)
        new_key_pem = None if new_key is None else keys.key_pem(new_key)
        files.install(place.certificate_path, pem(certificate), place.key_path, new_key_pem)
    der = certificate.public_bytes(serialization.Encoding.DER)
    return ClientCertificate(
        name=name,
        certificate=place.certificate_path,
        key=place.key_path if requested is None else None,
        serial=entry.serial,
        not_after=entry.not_after,
        leaf_sha256=hashlib.sha256(der).digest(),
        pin=pair.spki_pin(der),
    )


def revoke_client(
    directory: Path,
    *,
    name: str | None = None,
    serial: str | None = None,
    now: datetime,
    reason: str = UNSPECIFIED,
    progress: Progress = _silent,
) -> tuple[Issued, ...]:
    """Revoke every certificate of the user `name`, or the one with this `serial`, for one of REASONS.

    Returns those that were not revoked before; none is no error, if there are such certificates. A server
    that watches the folder refuses them at their next handshake: what is connected stays, and so does a
    session that such a connection opened.
    """
    moment = pair.utc(now)
    if (name is None) is (serial is None):
        raise CertificateError("give either the name of a user or a serial number")
    if reason not in REASONS:
        raise CertificateError(f"a certificate is revoked for one of: {', '.join(REASONS)}")
    number = None if serial is None else parse_serial(serial)
    files.check_folder(directory)
    with _locked(directory, progress):
        own = _load(directory, moment, timedelta(0), progress)
        if own is None:
            raise CertificateError(f"{directory}: no client certificate was ever issued here")
        own.signing_key()
        issued, signed = _read_known(directory, own, moment, progress)
        meant = [entry for entry in issued if entry.name == name or entry.serial_number == number]
        if number is not None and not meant:
            # It may be of a list that was lost.
            progress(f"{_list_path(directory)} has no certificate {serial}. It is revoked all the same.")
            meant = [Issued(number, UNKNOWN_NAME, moment + MAX_CLIENT_LIFETIME)]
        if not meant:
            raise CertificateError(
                f"{_list_path(directory)}: has no certificate of {str(name)[:MAX_USER]!r}; check the name"
            )
        revoked = {
            entry.serial_number: replace(entry, revoked_at=moment.replace(microsecond=0), reason=reason)
            for entry in meant
            if entry.revoked_at is None
        }
        known = {entry.serial_number: entry for entry in issued} | revoked
        if revoked:
            _write_list(directory, tuple(known.values()), signed, moment)
        _refresh(directory, own, moment, progress)
    return tuple(revoked.values())


def refresh_crl(directory: Path, now: datetime, *, progress: Progress = _silent) -> datetime | None:
    """Sign the list of revoked certificates anew if that is due; returns when to ask again.

    It is due when the list is missing or damaged, lacks a revocation, or is a month old. None: there is no
    authority for clients here, and nothing is made. Raises CertificateError if there is none that a server
    could use and none can be made.
    """
    moment = pair.utc(now)
    if not any(path.exists() for path in _authority_paths(directory)):
        return None
    files.check_folder(directory)
    with _locked(directory, progress):
        own = _load(directory, moment, timedelta(0), progress)
        return None if own is None else _refresh(directory, own, moment, progress)


def issued_clients(directory: Path) -> tuple[Issued, ...]:
    """What was issued and has not expired for long, in its order; empty if nothing ever was."""
    path = _list_path(directory)
    return _read_list(path) if path.exists() else ()


# --- the authority ---------------------------------------------------------------------------------------


def _authority_paths(directory: Path) -> tuple[Path, Path]:
    return directory / "client-ca.crt", directory / "client-ca.key"


@contextmanager
def _locked(directory: Path, progress: Progress) -> Iterator[None]:
    def tell_of_waiting() -> None:
        progress(f"Waiting for another process that is at work in {directory}.")

    with files.translated(directory, "used"), files.locked(directory, on_wait=tell_of_waiting):
        yield


def _load_or_make(directory: Path, now: datetime, lifetime: timedelta, progress: Progress) -> _Authority:
    own = _load(directory, now, lifetime, progress)
    return _make(directory, now, progress) if own is None else own


def _load(directory: Path, now: datetime, lifetime: timedelta, progress: Progress) -> _Authority | None:
    """The authority, repaired if its certificate is lost, renewed if it would end before a leaf's `lifetime`."""
    certificate_path, key_path = _authority_paths(directory)
    files.recover(certificate_path, key_path, pair.match)
    if key_path.exists():
        certificate = read_or_set_aside(certificate_path, progress)  # it can be made again
    elif certificate_path.exists():
        certificate = pair.read_certificates(certificate_path)[0]
    else:
        return None
    if certificate is not None:
        _check_made_here(certificate, certificate_path)
    key, problem = _read_key(certificate_path, key_path, certificate)
    if certificate is not None:
        good = certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc - lifetime
        if key is None or good:
            return _Authority(certificate, key, problem)
    if key is None:
        raise CertificateError(problem)
    certificate = client_authority_certificate(key, now)
    files.install(certificate_path, pem(certificate), key_path, None)
    progress(f"Renewed {certificate_path} with its key, until {certificate.not_valid_after_utc:%Y-%m-%d}.")
    return _Authority(certificate, key, "")


def _make(directory: Path, now: datetime, progress: Progress) -> _Authority:
    if not _list_path(directory).exists():
        _write_list(directory, (), (), now)  # first: an authority without a list has lost it
    key = keys.generate(KEY_TYPE)
    certificate = client_authority_certificate(key, now)
    certificate_path, key_path = _authority_paths(directory)
    files.install(certificate_path, pem(certificate), key_path, keys.key_pem(key))
    progress(f"Made the authority for clients {certificate_path}. The server believes clients by this file.")
    return _Authority(certificate, key, "")


def _read_key(
    certificate_path: Path, key_path: Path, certificate: x509.Certificate | None
) -> tuple[keys.PrivateKey | None, str]:
    """The authority's key, or why it cannot be used."""
    cure = (
        f"; put the right one back, or move {certificate_path.name} away with all {certificate_path.stem}.*"
        " to have a new authority made, whose certificates each client then needs"
    )
    if not key_path.exists():
        return None, f"{key_path}: does not exist, so nothing can be issued or revoked{cure}"
    try:
        key = pair.read_private_key(key_path)
    except files.DamagedFileError as error:
        return None, f"{error}{cure}"
    weak = keys.weakness(key)
    if weak is not None:
        return None, f"{key_path}: {weak}{cure}"
    if certificate is not None and not keys.belongs(key, certificate.public_key()):
        return None, f"{key_path}: is not the key of {certificate_path}{cure}"
    return key, ""


def _check_made_here(certificate: x509.Certificate, path: Path) -> None:
    try:
        name = client_authority_name(certificate.public_key())
        made_here = certificate.subject == certificate.issuer == name
    except pair.UNREADABLE:
        made_here = False
    if not made_here:
        raise CertificateError(
            f"{path}: was not made here and is never replaced; move it away with its key, and name it in"
            " tls.client_ca_file to believe the clients of another authority"
        )


# --- one client ------------------------------------------------------------------------------------------


def _check_name(name: str) -> None:
    if is_dns_user(name):
        return
    why = f"it has more than {MAX_USER} characters, the most for a user" if len(name) > MAX_USER else ""
    form = check_name(name)  # which says what is wrong with most
    why = why or f"write it as {form!r}, and call the user so" if form != name else why
    shown = name[:MAX_USER]
    raise CertificateError(f"{shown!r} cannot name a client: {why or 'it is an address or a wildcard'}")


def _check_lifetime(lifetime: timedelta) -> None:
    if not timedelta(seconds=1) <= lifetime <= MAX_CLIENT_LIFETIME:
        raise CertificateError(
            f"a client certificate cannot be valid for {lifetime};"
            f" give 1 second to {MAX_CLIENT_LIFETIME.days} days"
        )


def _requested_key(csr: bytes) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    """The public key of a request that was signed with its private key."""
    if len(csr) > MAX_CSR_BYTES:
        raise CertificateError(f"the CSR is larger than {MAX_CSR_BYTES} bytes; give a PKCS #10 request")
    load = x509.load_pem_x509_csr if b"-----BEGIN" in csr else x509.load_der_x509_csr
    try:
        request = load(csr)
        key, is_signed = request.public_key(), request.is_signature_valid
    except pair.UNREADABLE as error:
        raise CertificateError("the CSR cannot be read; give a PKCS #10 request in PEM or DER") from error
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey) or keys.weakness(key) is not None:
        raise CertificateError(f"the CSR is for a key that is not taken: {keys.weakness(key)}")
    if not is_signed:
        raise CertificateError("the CSR is not signed by its own key; make it anew")
    return key


def _find(folder: Path, name: str, own: _Authority, progress: Progress) -> _Place:
    certificate_path, key_path = folder / f"{name}.crt", folder / f"{name}.key"

    def may_be_installed(certificate_pem: bytes, key_pem: bytes) -> bool:
        """Whether it is one that was being installed."""
        return pair.match(certificate_pem, key_pem) and own.issued(
            x509.load_pem_x509_certificate(certificate_pem)
        )

    files.recover(certificate_path, key_path, may_be_installed)
    certificate = read_or_set_aside(certificate_path, progress)
    if certificate is not None and not own.issued(certificate):
        raise CertificateError(
            f"{certificate_path}: was not issued by {_authority_paths(folder.parent)[0]} and is never replaced;"
            " move it away with its key"
        )
    key = None
    if key_path.exists():
        try:
            key = pair.read_private_key(key_path)
        except files.DamagedFileError as error:
            progress(f"{error}. It is put aside as {files.set_aside(key_path)}.")
    return _Place(certificate_path, key_path, certificate, key)


def _is_live(place: _Place, issued: Sequence[Issued], now: datetime) -> bool:
    """Whether there is a certificate that a server would take."""
    certificate = place.certificate
    if certificate is None or now > certificate.not_valid_after_utc:
        return False
    serial_number = certificate.serial_number
    return not any(entry.serial_number == serial_number and entry.revoked_at for entry in issued)


def _check_replaceable(place: _Place, issued: Sequence[Issued], now: datetime, renew: bool) -> None:
    if not renew and _is_live(place, issued, now):
        assert place.certificate is not None
        raise CertificateError(
            f"{place.certificate_path}: is good until {place.certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC;"
            " renew it, or revoke it first"
        )


def _kept_key(place: _Place) -> keys.PrivateKey:
    """The key of the certificate that is renewed."""
    if place.key is None or not place.has_its_key:
        raise CertificateError(
            f"{place.key_path}: the key of {place.certificate_path} is not here; renew it with a CSR of the"
            " device that has it, or revoke it and issue another"
        )
    return place.key


def _put_key_aside(place: _Place, public_key: object, *, overwritten: bool, progress: Progress) -> None:
    """Keep a key that would be lost and may be somebody's, or that would lie beside another one's certificate."""
    if place.key is None or keys.belongs(place.key, public_key) or (overwritten and place.has_its_key):
        return
    progress(
        f"{place.key_path} is not this certificate's. It is put aside as {files.set_aside(place.key_path)}."
    )


# --- the list, and the signed list -----------------------------------------------------------------------


def _list_path(directory: Path) -> Path:
    return directory / "client-ca.issued"


def _crl_path(directory: Path) -> Path:
    return directory / "client-ca.crl"


def _read_list(path: Path) -> tuple[Issued, ...]:
    return parse_list(files.read_certificate_file(path), str(path))


def _read_known(
    directory: Path, own: _Authority, now: datetime, progress: Progress
) -> tuple[tuple[Issued, ...], frozenset[int]]:
    """The list, with what the signed list knows besides; and the serial numbers in the signed list.

    Raises CertificateError if the list is lost.
    """
    path = _list_path(directory)
    if not path.exists():
        raise CertificateError(
            f"{path}: is missing, so nobody knows what was issued; restore it from a backup. If it is lost,"
            " make an empty file there: what was issued until now can then be revoked by serial number only"
        )
    crl = _read_crl(directory, own, progress)
    return _merged(_read_list(path), crl, now), frozenset(entry.serial_number for entry in crl or ())


def _merged(
    issued: Sequence[Issued], crl: x509.CertificateRevocationList | None, now: datetime
) -> tuple[Issued, ...]:
    known = {entry.serial_number: entry for entry in issued}
    for revoked in crl or ():
        entry = known.get(revoked.serial_number)
        if entry is None:  # nobody knows when it ends: as late as it can
            entry = Issued(revoked.serial_number, UNKNOWN_NAME, now + MAX_CLIENT_LIFETIME)
        if entry.revoked_at is None:
            at, reason = revoked.revocation_date_utc, _reason_of(revoked)
            known[entry.serial_number] = replace(entry, revoked_at=at, reason=reason)
    return tuple(known.values())


def _reason_of(revoked: x509.RevokedCertificate) -> str:
    try:
        return revoked.extensions.get_extension_for_class(x509.CRLReason).value.reason.value
    except x509.ExtensionNotFound:
        return UNSPECIFIED


def _write_list(directory: Path, issued: Sequence[Issued], signed: Container[int], now: datetime) -> None:
    path = _list_path(directory)
    kept = current(issued, now, signed)
    if not has_room(kept, MAX_LIST_BYTES):
        raise CertificateError(
            f"{path}: is full with {len(kept)} certificates that have not expired; use shorter lifetimes, or"
            " an authority of your own (tls.client_ca_file)"
        )
    _replace(path, render_list(kept))


def _read_crl(directory: Path, own: _Authority, progress: Progress) -> x509.CertificateRevocationList | None:
    """The signed list; None if there is none, or none of this authority, which is put aside."""
    path = _crl_path(directory)
    if not path.exists():
        return None
    try:
        crl = x509.load_pem_x509_crl(files.read_certificate_file(path))
        public_key = own.certificate.public_key()
        assert isinstance(public_key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
        is_ours = crl.issuer == own.certificate.subject and crl.is_signature_valid(public_key)
    except pair.UNREADABLE:
        is_ours = False
    if is_ours:
        return crl
    progress(f"{path} is not signed by this authority. It is put aside as {files.set_aside(path)}.")
    return None


def _refresh(directory: Path, own: _Authority, now: datetime, progress: Progress) -> datetime:
    """Sign the list anew if that is due; when it is due next."""
    path = _crl_path(directory)
    crl = _read_crl(directory, own, progress)
    latest = now + CRL_REFRESH
    try:
        issued, _ = _read_known(directory, own, now, progress)
    except CertificateError as error:
        if crl is None:
            raise
        progress(f"{error}. Until then {path} goes on with what it has.")
        issued, latest = _merged((), crl, now), now + CRL_RETRY
    revoked = [entry for entry in current(issued, now) if entry.revoked_at is not None]
    if crl is not None and _is_fresh(crl, revoked, now):
        return min(latest, crl.last_update_utc + CRL_REFRESH)
    if own.key is None:
        if crl is None or not _is_valid(crl, now):
            raise CertificateError(f"{path}: must be signed anew: {own.problem}")
        progress(f"{path} could not be signed anew: {own.problem}. The old one is used on.")
        return now + CRL_RETRY
    crl = revocation_list(revoked, _next_number(crl, now), own.certificate, own.key, now)
    _replace(path, crl.public_bytes(serialization.Encoding.PEM))
    return min(latest, crl.last_update_utc + CRL_REFRESH)


def _is_valid(crl: x509.CertificateRevocationList, now: datetime) -> bool:
    end = crl.next_update_utc
    return end is not None and crl.last_update_utc <= now <= end


def _is_fresh(crl: x509.CertificateRevocationList, revoked: Sequence[Issued], now: datetime) -> bool:
    signed = {entry.serial_number for entry in crl}
    return (
        _is_valid(crl, now)
        and now < crl.last_update_utc + CRL_REFRESH
        and all(entry.serial_number in signed for entry in revoked)
    )


def _next_number(crl: x509.CertificateRevocationList | None, now: datetime) -> int:
    """Higher than all before, of lists that were lost too: it counts seconds."""
    last = 0 if crl is None else crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    return max(last + 1, int(now.timestamp()))


def _replace(path: Path, data: bytes) -> None:
    """Put a file in place in one step. What a crash left staged is not missed: it can be made again."""
    files.discard_staged(path, path)
    files.install(path, data, path, None)
