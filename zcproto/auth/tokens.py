"""Store machine tokens in `tokens.toml`: names, digests, scopes, times.

    [tokens.prometheus]
    sha256 = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"
    scopes = ["metrics"]
    added = 2026-01-01T12:00:00Z
    expires = 2026-04-01T12:00:00Z
    last_used = 2026-01-02T08:00:00Z

Decides: how tokens are read, added, removed and marked as used, and which one a token is.

Rules:
- A token is 32 random bytes, shown once as text. The file holds the SHA-256 of the bytes: a plain hash is enough
  for 256 random bits.
- A token is found by its digest, which is then compared in constant time.
- `last_used` is a full hour, so that the file is seldom written.

Must not know: HTTP, sessions, clocks.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

from zcproto.auth.files import RewrittenFile, is_moment, name_faults, quoted, toml_key, toml_moment
from zcproto.common.clock import Entropy, system_entropy
from zcproto.common.secret import SecretText
from zcproto.common.text import toml_string
from zcproto.errors import ResourceExhausted
from zcproto.sessions.token import TOKEN_SIZE, digest_of, token_from_text, token_text

SCOPES: Final = ("metrics", "status")
"""What a token may read: /metrics, /status.json."""

MAX_TOKENS: Final = 1_000

CLOCK_STEP: Final = timedelta(days=1)
"""A last use that is further ahead was stored by a wrong clock."""

_MOMENT: Final = "a date and time with an offset, such as 2026-01-01T12:00:00Z"


class MachineToken(NamedTuple):
    """A token as stored. Times are aware, in UTC."""

    digest: bytes
    scopes: tuple[str, ...]
    added: datetime
    expires: datetime
    last_used: datetime | None = None
    """The full hour of its last use."""

    def as_dict(self, name: str) -> dict[str, Any]:
        """Return this token as lists show it."""
        return {
            "name": name,
            "scopes": list(self.scopes),
            "added": toml_moment(self.added),
            "expires": toml_moment(self.expires),
            "last_used": None if self.last_used is None else toml_moment(self.last_used),
        }

    def __repr__(self) -> str:
        return f"MachineToken(scopes={self.scopes}, expires={toml_moment(self.expires)})"


class TokenFile(RewrittenFile[MachineToken]):
    """Tokens in a file."""

    what = "file of tokens"
    kind = "token"
    keys = ("sha256", "scopes", "added", "expires", "last_used")
    max_bytes = 1 << 20
    """Enough for MAX_TOKENS."""
    header = "# The machine tokens. Written by zcproto: comments are lost.\n"

    def by_token(self, token: bytes) -> tuple[str, MachineToken] | None:
        """Return the name and the entry of a token, as of the last reading, even if it has expired."""
        digest, entries = digest_of(token), self.entries  # once: a reading in a thread may replace them
        if entries is not self._indexed:
            self._indexed = entries
            self._by_digest = {entry.digest: name for name, entry in entries.items()}
        name = self._by_digest.get(digest)
        if name is None or not hmac.compare_digest(entries[name].digest, digest):
            return None
        return name, entries[name]

    _indexed: Mapping[str, MachineToken] = {}
    _by_digest: Mapping[bytes, str] = {}

    @staticmethod
    def is_gone(before: MachineToken, now: MachineToken | None) -> bool:
        return False  # no session comes of a token

    @staticmethod
    def is_changed(before: MachineToken, now: MachineToken) -> bool:
        return before._replace(last_used=None) != now._replace(last_used=None)

    def _parse_values(self, table: dict[str, Any]) -> MachineToken | list[str]:
        text, scopes = table.get("sha256"), table.get("scopes")
        digest = token_from_text(text) if isinstance(text, str) else None
        faults = []
        if digest is None:
            faults.append("sha256 must be 43 characters of base64url, a SHA-256")
        if not isinstance(scopes, list) or not scopes or not all(scope in SCOPES for scope in scopes):
            faults.append(f"scopes must be a list of {' and '.join(SCOPES)}")
        times = {key: table[key] for key in ("added", "expires", "last_used") if key in table}
        faults += [f"{key} must be {_MOMENT}" for key in ("added", "expires") if key not in times]
        faults += [f"{key} must be {_MOMENT}" for key, value in times.items() if not is_moment(value)]
        if faults:
            return faults
        assert digest is not None
        assert scopes is not None
        moments = {key: value.astimezone(UTC) for key, value in times.items()}
        return MachineToken(digest, _sorted(scopes), **moments)

    def add(
        self,
        name: str,
        scopes: tuple[str, ...],
        added: datetime,
        expires: datetime,
        *,
        entropy: Entropy = system_entropy,
    ) -> SecretText:
        """Add a token and return it as text; it is not shown again. Raises AlreadyExists for a name in use."""
        faults = name_faults(name)
        if faults:
            raise self._fault(*(f"token {quoted(name)}: {fault}" for fault in faults))
        token = entropy(TOKEN_SIZE)
        entry = MachineToken(
            digest_of(token), _sorted(scopes), added.astimezone(UTC), expires.astimezone(UTC)
        )
        with self._changing() as tokens:
            self._add(name, entry, tokens)
            if len(tokens) > MAX_TOKENS:
                raise ResourceExhausted(f"there are {MAX_TOKENS} tokens already; revoke one first")
        return SecretText(token_text(token))

    def mark_used(self, uses: Mapping[str, tuple[bytes, datetime]]) -> None:
        """Store the last uses of tokens: by name the digest, and the time, of which the full hour is kept.

        A token that was removed or replaced meanwhile, or has a later use, stays as it is.
        """
        with self._changing() as tokens:
            for name, (digest, used) in uses.items():
                entry, hour = tokens.get(name), full_hour(used)
                if entry is not None and entry.digest == digest and is_later(hour, entry.last_used):
                    tokens[name] = entry._replace(last_used=hour)

    @staticmethod
    def _text_of(name: str, entry: MachineToken) -> str:
        used = "" if entry.last_used is None else f"last_used = {toml_moment(entry.last_used)}\n"
        scopes = ", ".join(map(toml_string, entry.scopes))
        return (
            f"\n[tokens.{toml_key(name)}]\n"
            f"sha256 = {toml_string(token_text(entry.digest))}\n"
            f"scopes = [{scopes}]\n"
            f"added = {toml_moment(entry.added)}\n"
            f"expires = {toml_moment(entry.expires)}\n{used}"
        )


def full_hour(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def is_later(hour: datetime, last_used: datetime | None) -> bool:
    """Return whether an hour of use replaces the one that is stored, which a wrong clock may have put ahead."""
    return last_used is None or hour > last_used or last_used - hour > CLOCK_STEP


def _sorted(scopes: object) -> tuple[str, ...]:
    assert isinstance(scopes, list | tuple)
    return tuple(sorted({*scopes}))
