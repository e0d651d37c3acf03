"""Decides whether certificates that others make are served: whole, or not at all.

Rules:
- The pairs of a site are loaded together. If one cannot be served, the site stays as it was.
- Others write a certificate and its key one after the other. What cannot be loaded is tried again at each
  look, and is a failure only when the files have been quiet for a while (30 seconds). It is told once for
  each state of the files, and tried again each minute: a folder's mode or the time may mend it.
- Files that change all the time cannot put off the word for ever.
- Each name of a site is covered by each of its certificates, or clients would refuse it.
- Nothing is ever written.

Must not know: own certificates, when certificates expire, who serves them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Generic, TypeVar

from zcproto.certs import files
from zcproto.certs.certificates import Site
from zcproto.certs.keys import family
from zcproto.certs.names import check_names
from zcproto.certs.pair import MAX_PASSPHRASE_BYTES, CertificatePair, load_pair
from zcproto.common.secret import SecretBytes
from zcproto.common.watcher import FileWatcher
from zcproto.errors import CertificateError

T = TypeVar("T")

MAX_SITES = 100
"""Each is some stats a second, and a TLS context in memory."""

SETTLE_S = 30.0
"""What a program may take between writing a certificate and its key."""

LONGEST_SETTLE_S = 300.0
"""After this much time of failures the last one is told even if the files are never quiet."""

RETRY_S = 60.0
"""Between attempts on files that stay as they are."""


@dataclass(frozen=True, slots=True)
class PassphraseSource:
    """Where the passphrase of keys is: a file, an environment variable, or nowhere."""

    file: Path | None = None
    """Its first line is the passphrase. It is its owner's alone."""
    variable: str = ""

    def read(self, environ: Mapping[str, str]) -> SecretBytes | None:
        """The passphrase; None if there is no source. Raises CertificateError, which does not show it."""
        if self.file is not None and self.variable:
            raise CertificateError(
                f"a passphrase is in the file {self.file} or in the variable {self.variable}; configure one"
            )
        if self.file is not None:
            line, _, _ = files.read_key_file(self.file).partition(b"\n")
            return _bounded(line.removesuffix(b"\r"), f"{self.file}: its first line")
        if self.variable:
            if self.variable not in environ:
                raise CertificateError(
                    f"the environment variable {self.variable} is not set; set it to the key's passphrase"
                )
            return _bounded(os.fsencode(environ[self.variable]), f"the environment variable {self.variable}")
        return None


@dataclass(frozen=True, slots=True)
class ForeignSite:
    """What is configured of a site whose certificates others make."""

    names: tuple[str, ...]
    """Exact or wildcard; empty for the default site."""
    certificates: tuple[Path, ...]
    """One, or one of each key family."""
    keys: tuple[Path, ...] = ()
    """In the same order; empty if each key is in its certificate's file."""
    passphrase: PassphraseSource = field(default=PassphraseSource())

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that the site depends on."""
        secret = () if self.passphrase.file is None else (self.passphrase.file,)
        return tuple(dict.fromkeys((*self.certificates, *self.keys, *secret)))


def load_site(spec: ForeignSite, now: datetime, environ: Mapping[str, str]) -> Site:
    """The site with all its pairs, fit to be served at `now`. Raises CertificateError."""
    names = site_names(spec)
    if not 1 <= len(spec.certificates) <= 2 or len(spec.keys) not in {0, len(spec.certificates)}:
        raise CertificateError(
            f"{_title(spec)} has {len(spec.certificates)} certificates and {len(spec.keys)} keys;"
            " configure one certificate, or one of RSA and one of ECDSA, and a key for each"
        )
    passphrase = spec.passphrase.read(environ)
    pairs = tuple(
        load_pair(certificate, key, now, passphrase)
        for certificate, key in zip(spec.certificates, spec.keys or spec.certificates, strict=True)
    )
    if len(pairs) == 2 and family(pairs[0].key_type) == family(pairs[1].key_type):
        raise CertificateError(
            f"{pairs[0].certificate} and {pairs[1].certificate} are both {family(pairs[0].key_type)};"
            " configure one of each kind of key"
        )
    for pair in pairs:
        _check_names(names, pair)
    return Site(names, pairs)


def site_names(spec: ForeignSite) -> tuple[str, ...]:
    """The names of the site in their one form. Raises CertificateError for one that a client cannot ask for."""
    names = check_names(spec.names)
    for name in names:
        if _is_address(name):
            raise CertificateError(
                f"{name} cannot be the name of a site: clients send no address as a server's name;"
                " put it into the default certificate"
            )
    return names


def check_sites(specs: Sequence[ForeignSite]) -> None:
    """Raises CertificateError unless these can be the sites beside the default one."""
    if len(specs) > MAX_SITES:
        raise CertificateError(f"{len(specs)} sites are configured; at most {MAX_SITES} can be")
    owner: dict[str, ForeignSite] = {}
    for spec in specs:
        names = site_names(spec)
        if not names:
            raise CertificateError(f"{_title(spec)} has no names; give the names that clients ask for")
        for name in names:
            if name in owner:
                raise CertificateError(f"two sites have the name {name}; leave it in one of them")
            owner[name] = spec


def covers(entry: str, name: str) -> bool:
    """Whether an entry of a SubjectAltName is good for `name`: a wildcard is one label, the first one.

    A wildcard name is covered by the same wildcard only (RFC 9525 section 6.3).
    """
    entry = entry.lower()
    if entry == name:
        return True
    return entry.startswith("*.") and not name.startswith("*.") and name.partition(".")[2] == entry[2:]


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at others' files found."""

    changed: bool = False
    """Something else was loaded than before."""
    bad: str = ""
    """What is wrong with the files, if that is to be told now; what was loaded before stays."""
    recovered: bool = False
    """What was told to be bad is good again."""


_NOTHING = Look()


class Watched(Generic[T]):
    """What is loaded from others' files, looked at again and again."""

    def __init__(
        self,
        paths: Iterable[Path],
        load: Callable[[datetime], T],
        *,
        settle_s: float = SETTLE_S,
        longest_settle_s: float = LONGEST_SETTLE_S,
    ) -> None:
        """`load` gives what is good at a time, or raises CertificateError; equal values are no change."""
        self.value: T | None = None
        """What was good last."""
        self.problem = ""
        """What has been told to be wrong, until it is good again."""
        self._load = load
        self._settle_s = settle_s
        self._longest_settle_s = longest_settle_s
        self._watch = FileWatcher(paths, files.MAX_FILE_BYTES)
        self._failing_since: float | None = None
        self._quiet_since = 0.0
        self._retry_at = 0.0
        self._told = ""  # of this state of the files

    def start(self, now: datetime, monotonic: float) -> T:
        """What is there to begin with. Raises CertificateError if that is not good."""
        self._watch.look()
        self._quiet_since = monotonic
        self.value = value = self._load(now)
        return value

    def look(self, now: datetime, monotonic: float, *, again: bool = False) -> Look:
        """Looks at the files, and loads them if they are other ones, or were no good before.

        With `again` what was no good is tried at once, as after the clock was set.
        """
        if self._watch.look():
            self._quiet_since = self._retry_at = monotonic
            if self._told:
                self._told, self._failing_since = "", monotonic
        elif self._failing_since is None or (monotonic < self._retry_at and not again):
            return _NOTHING
        try:
            value = self._load(now)
        except CertificateError as error:
            return self._failed(str(error), monotonic)
        changed, recovered = value != self.value, bool(self.problem)
        self.value, self.problem, self._told, self._failing_since = value, "", "", None
        return Look(changed=changed, recovered=recovered)

    def _failed(self, problem: str, monotonic: float) -> Look:
        if self._failing_since is None:
            self._failing_since = monotonic
        settled = (
            monotonic - self._quiet_since >= self._settle_s
            or monotonic - self._failing_since >= self._longest_settle_s
        )
        if not settled:
            return _NOTHING
        self._retry_at = monotonic + RETRY_S
        if problem == self._told:
            return _NOTHING
        self.problem = self._told = problem
        return Look(bad=problem)


def watched_site(spec: ForeignSite, environ: Mapping[str, str]) -> Watched[Site]:
    return Watched(spec.paths, lambda now: load_site(spec, now, environ))


def _check_names(names: Sequence[str], pair: CertificatePair) -> None:
    missing = [name for name in names if not any(covers(entry, name) for entry in pair.names)]
    if missing:
        raise CertificateError(
            f"{pair.certificate}: is not for {', '.join(missing)}; get one that has all names of the site,"
            " or configure fewer"
        )


def _title(spec: ForeignSite) -> str:
    if spec.names:
        return f"the site {spec.names[0]}"
    return f"the site of {spec.certificates[0]}" if spec.certificates else "a site"


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _bounded(passphrase: bytes, where: str) -> SecretBytes:
    if not 1 <= len(passphrase) <= MAX_PASSPHRASE_BYTES:
        raise CertificateError(f"{where} must be a passphrase of 1 to {MAX_PASSPHRASE_BYTES} bytes")
    return SecretBytes(passphrase)
