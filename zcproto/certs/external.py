"""Decides whether certificates that other programs provide can be served: all of a site, or none.

Rules:
- The pairs of a site are loaded together. If one cannot be served, the site keeps what it had.
- Other programs write a certificate and its key one after the other. What cannot be loaded is retried at each
  check, and is a failure only after the files have been unchanged for a while (30 seconds). It is reported once for
  each state of the files, and retried each minute, because a change of a folder's mode or of the time may fix it.
- Files that change all the time do not defer the report for ever.
- Each name of a site is covered by each of its certificates, otherwise clients would refuse it.
- Nothing is ever written.

Must not know: managed certificates, when certificates expire, who serves them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Generic, TypeVar

from zcproto.certs import files
from zcproto.certs.keys import family
from zcproto.certs.names import covers
from zcproto.certs.notices import Notice, NoticeKind
from zcproto.certs.pair import CertificatePair, Site, load_pair
from zcproto.common.secret import SecretBytes
from zcproto.common.text import escape_text
from zcproto.common.watcher import FileWatcher
from zcproto.errors import CertificateError

T = TypeVar("T")

MAX_PASSPHRASE_BYTES = 1024
"""What OpenSSL accepts from a passphrase callback (PEM_BUFSIZE)."""

_SHOWN_NAMES = 4
_MAX_SHOWN = 200

SETTLE_S = 30.0
"""What a program may need between writing a certificate and its key."""

LONGEST_SETTLE_S = 300.0
"""After failures for this long the last one is reported even if the files still change."""

RETRY_S = 60.0
"""Between attempts on files that have not changed."""


@dataclass(frozen=True, slots=True)
class PassphraseSource:
    """Where the passphrase of keys comes from: a file, an environment variable, or nowhere."""

    file: Path | None = None
    """Its first line is the passphrase. Only its owner can read it."""
    variable: str = ""

    def read(self, environ: Mapping[str, str]) -> SecretBytes | None:
        """Return the passphrase, or None if there is no source. Raises CertificateError, which does not show it."""
        if self.file is not None:
            line, _, _ = files.read_key_file(self.file).partition(b"\n")
            return _checked_passphrase(line.removesuffix(b"\r"), f"{self.file}: its first line")
        if self.variable:
            if self.variable not in environ:
                raise CertificateError(
                    f"the environment variable {self.variable} is not set; set it to the key's passphrase"
                )
            value = os.fsencode(environ[self.variable])
            return _checked_passphrase(value, f"the environment variable {self.variable}")
        return None


def _checked_passphrase(passphrase: bytes, where: str) -> SecretBytes:
    if not 1 <= len(passphrase) <= MAX_PASSPHRASE_BYTES:
        raise CertificateError(f"{where} must be a passphrase of 1 to {MAX_PASSPHRASE_BYTES} bytes")
    return SecretBytes(passphrase)


@dataclass(frozen=True, slots=True)
class ExternalSite:
    """The configuration of a site whose certificates other programs provide."""

    names: tuple[str, ...]
    """Exact or wildcard, in normal form; empty for the default site."""
    certificates: tuple[Path, ...]
    """One or two."""
    keys: tuple[Path, ...] = ()
    """In the same order; empty if each key is in its certificate's file."""
    passphrase: PassphraseSource = field(default=PassphraseSource())
    required: tuple[str, ...] = ()
    """Further names that each certificate must have; those of the default site."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files on which the site depends."""
        secret = () if self.passphrase.file is None else (self.passphrase.file,)
        return tuple(dict.fromkeys((*self.certificates, *self.keys, *secret)))


def load_site(
    spec: ExternalSite, now: datetime, environ: Mapping[str, str], before: Site | None = None
) -> Site:
    """Return the site with all its pairs, valid to be served at `now`, in place of `before`.

    Raises CertificateError.
    """
    passphrase = spec.passphrase.read(environ)
    pairs = tuple(
        load_pair(certificate, key, now, passphrase)
        for certificate, key in zip(spec.certificates, spec.keys or spec.certificates, strict=True)
    )
    if len(pairs) == 2 and family(pairs[0].key_type) == family(pairs[1].key_type):
        raise CertificateError(
            f"{pairs[0].certificate} and {pairs[1].certificate} are both {family(pairs[0].key_type)};"
            " configure one of each key family"
        )
    for pair in pairs:
        missing = [
            name for name in wanted_names(spec) if not any(covers(entry, name) for entry in pair.names)
        ]
        if missing:
            raise CertificateError(
                f"{pair.certificate}: is not valid for {', '.join(missing)}; use one with all names of the site,"
                " or configure fewer names"
            )
    if before is not None and not wanted_names(spec):
        _check_successors(pairs, [name for pair in before.pairs for name in pair.names])
    return Site(spec.names, pairs)


def wanted_names(spec: ExternalSite) -> tuple[str, ...]:
    """Return the names that each certificate of a site must have."""
    return (*spec.names, *spec.required)


def _check_successors(pairs: Iterable[CertificatePair], known: Sequence[str]) -> None:
    """Raise CertificateError if a certificate has no name of those that it is to replace."""
    for pair in pairs:
        if known and not any(covers(new, old) or covers(old, new) for new in pair.names for old in known):
            raise CertificateError(
                f"{pair.certificate}: is valid for {_shown(pair.names) or 'no name'}, and not for {_shown(known)},"
                " which it replaces; put the right file there, or set certificates.names to its names and reload"
            )


def _shown(names: Sequence[str]) -> str:
    return escape_text(", ".join(names[:_SHOWN_NAMES]), _MAX_SHOWN)


class WatchedFiles(Generic[T]):
    """What is loaded from files of other programs, and reloaded when they change."""

    def __init__(self, paths: Iterable[Path], load: Callable[[datetime, T | None], T]) -> None:
        """`load` returns what is valid at a time and may replace what was before, or raises CertificateError.

        Notices name the first path.
        """
        self.problem = ""
        """The problem that was reported, until it is fixed."""
        self.is_incomplete = False
        """True after a change that cannot be loaded: its program may be about to write the next file."""
        self._value: T | None = None
        self._load = load
        self._watcher = FileWatcher(paths, files.MAX_FILE_BYTES)
        self._failing_since: float | None = None
        self._quiet_since = 0.0
        self._retry_at = 0.0
        self._reported = ""  # for this state of the files

    @property
    def value(self) -> T:
        """What was valid last; there is something once `start` has returned."""
        assert self._value is not None
        return self._value

    def start(self, now: datetime, monotonic: float) -> None:
        """Load the files for the first time. Raises CertificateError if that fails."""
        self._watcher.look()
        self._quiet_since = monotonic
        self._value = self._load(now, None)

    def check(self, now: datetime, monotonic: float, *, force: bool = False) -> list[Notice]:
        """Load the files if they changed or could not be loaded before. Return what has become good or bad.

        With `force`, as after a change of the clock, a failed attempt is repeated at once.
        """
        has_changed = self._watcher.look()
        self.is_incomplete = False
        if has_changed:
            self._quiet_since = self._retry_at = monotonic
            if self._reported:
                self._reported, self._failing_since = "", monotonic
        elif self._failing_since is None or (monotonic < self._retry_at and not force):
            return []
        try:
            value = self._load(now, self._value)
        except CertificateError as error:
            self.is_incomplete = has_changed
            return self._failed(str(error), monotonic)
        was_bad = bool(self.problem)
        self._value, self.problem, self._reported, self._failing_since = value, "", "", None
        path = str(self._watcher.paths[0])
        return [Notice(NoticeKind.FILES_RECOVERED, path, f"{path} is valid again.")] if was_bad else []

    def _failed(self, problem: str, monotonic: float) -> list[Notice]:
        if self._failing_since is None:
            self._failing_since = monotonic
        settled = (
            monotonic - self._quiet_since >= SETTLE_S or monotonic - self._failing_since >= LONGEST_SETTLE_S
        )
        if not settled:
            return []
        self._retry_at = monotonic + RETRY_S
        if problem == self._reported:
            return []
        self.problem = self._reported = problem
        message = f"{problem}. The last valid files remain in use."
        return [Notice(NoticeKind.FILES_BAD, str(self._watcher.paths[0]), message)]
