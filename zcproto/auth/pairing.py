"""Register devices by pairing codes, which operators create and users enter once.

    [[codes]]
    user = "alice"
    digest = "..."          scrypt of the code under `salt`, as hex
    expires_at = 1767225600000
    wrong = 0

Decides: what a code is, how long it is valid, and how it registers a device.

Rules:
- A code is 40 random bits, as two groups of four characters in Crockford's base32. Case is ignored; O reads as 0, I
  and L as 1.
- A code is valid once, until it expires. Five wrong attempts end all codes that were open meanwhile: a wrong code
  does not show which one was intended. Attempts are counted in the file, and so across restarts.
- The private file `pairing.toml` holds slow digests: with a fast digest, a copy of the file would give up 40 bits
  within the code's lifetime.
- Attempts run one after another, in a thread, and are throttled by address.
- A used, expired, unknown or malformed code, and one for an unknown user, get the same answer.

Must not know: connections, what devices do.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import scrypt
from hmac import compare_digest
from typing import Any, Final, NamedTuple

from zcproto.auth.devices import DeviceFile, is_public_key
from zcproto.auth.directory import Directory
from zcproto.auth.files import PrivateFile, name_faults, quoted
from zcproto.auth.throttle import LoginThrottle
from zcproto.auth.users import User
from zcproto.common.clock import Entropy, system_entropy
from zcproto.common.secret import SecretText
from zcproto.common.text import toml_string
from zcproto.errors import AlreadyExists, InvalidArgument, ResourceExhausted, Unauthenticated

MAX_WRONG: Final = 5
"""Wrong attempts that end a code."""

MAX_OPEN: Final = 100
"""Codes that may be open at the same time."""

MAX_CODE: Final = 64
"""Longest text accepted as a code, in characters: room for a typing error."""

MAX_WAITING: Final = 16
"""Attempts that may wait for their turn."""

_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_CODE_BYTES: Final = 5
_CODE_LENGTH: Final = 8
_GROUP: Final = 4
_READ_AS: Final = str.maketrans("OIL", "011", "- \t")
_SALT_BYTES: Final = 16
_DIGEST_BYTES: Final = 32
_COST: Final = 2**14  # 16 MiB and about 50 ms
_RETRY_MS: Final = 1000
_HEADER: Final = "# One-time codes of `zcproto pair`, as digests. Written by zcproto.\n"
_CODE_KEYS: Final = {"user": str, "digest": str, "expires_at": int, "wrong": int}
_EPOCH: Final = datetime.fromisoformat("1970-01-01T00:00:00+00:00")


class _Code(NamedTuple):
    user: str
    digest: bytes
    expires_at: int
    wrong: int


class PairingFile(PrivateFile):
    """Open codes in a file. `wall` is in ms."""

    what = "file of codes"
    max_bytes = 1 << 20

    def __init__(self, path: str | os.PathLike[str], *, entropy: Entropy = system_entropy) -> None:
        super().__init__(path)
        self._entropy = entropy

    def make(self, user: str, life_ms: int, wall: int) -> SecretText:
        """Return a new code for a device of this user; it is not shown again."""
        faults = name_faults(user)
        if faults:
            raise self._fault(*(f"user {quoted(user)}: {fault}" for fault in faults))
        with self._locked():
            salt, codes = self._open_codes(wall)
            if len(codes) >= MAX_OPEN:
                raise self._fault(f"{MAX_OPEN} codes are open already; use them or wait until they expire")
            if not codes:
                salt = self._entropy(_SALT_BYTES)
            text = _text_of(self._entropy(_CODE_BYTES))
            self._write(salt, [*codes, _Code(user, _digest_of(text, salt), wall + life_ms, 0)])
        return SecretText(f"{text[:_GROUP]}-{text[_GROUP:]}")

    def count_open(self, wall: int) -> int:
        """Return the number of open codes."""
        return len(self._open_codes(wall)[1])

    @contextmanager
    def redeem(self, code: str, wall: int) -> Iterator[tuple[str, Callable[[], None]] | None]:
        """Yield the user of a valid code, and a function that spends the code. It stays valid until that is called.

        Yield None for an invalid code, which counts as a wrong attempt. The file is locked inside the body.
        """
        if not self.count_open(wall):
            yield None
            return
        with self._locked():
            salt, codes = self._open_codes(wall)  # another process may have spent them
            digest = _digest_of(_normalized(code), salt)
            found = [each for each in codes if compare_digest(each.digest, digest)]
            if found:
                others = [each for each in codes if each != found[0]]
                yield found[0].user, lambda: self._write(salt, others)
                return
            if codes:
                self._write(salt, [each._replace(wrong=each.wrong + 1) for each in codes])
            yield None

    def _open_codes(self, wall: int) -> tuple[bytes, list[_Code]]:
        """Return the salt and the codes that are still valid."""
        _, text = self._read_text()
        document = self._document(text)
        salt, tables = document.pop("salt", ""), document.pop("codes", [])
        if document or not _is_hex(salt, _SALT_BYTES * bool(text)) or not _are_codes(tables):
            raise self._fault("is damaged; remove it and create new codes with zcproto pair")
        codes = [_Code(**{**table, "digest": bytes.fromhex(table["digest"])}) for table in tables]
        return bytes.fromhex(salt), [
            code for code in codes if wall < code.expires_at and code.wrong < MAX_WRONG
        ]

    def _write(self, salt: bytes, codes: list[_Code]) -> None:
        entries = [
            f"\n[[codes]]\nuser = {toml_string(code.user)}\n"
            f'digest = "{code.digest.hex()}"\nexpires_at = {code.expires_at}\nwrong = {code.wrong}\n'
            for code in codes
            if code.wrong < MAX_WRONG
        ]
        self._replace_text(f'{_HEADER}salt = "{salt.hex()}"\n{"".join(entries)}')


@dataclass(slots=True, eq=False)
class Enrollment:
    """Registers devices of clients that send a valid code."""

    codes: PairingFile
    devices: DeviceFile
    users: Directory[User]
    throttle: LoginThrottle
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _waiting: int = 0

    async def enroll(
        self, code: str, public_key: bytes, name: str, *, address: str, wall: int, now: float
    ) -> str:
        """Register a device for the user of a code, and return the user. `now` is monotonic seconds.

        Raises:
            Unauthenticated: the code is not valid, whatever the cause.
            AlreadyExists: the name is in use; the code stays valid.
            ResourceExhausted: too many wrong codes; `details["retry_after_ms"]` is the time to wait.
            InvalidArgument: the name or the public key is not valid, or the code is far too long.
        """
        _check(code, public_key, name)
        wait_ms = self.throttle.check("", address, now)
        retry_after_ms = wait_ms if isinstance(wait_ms, int) else await wait_ms
        if not retry_after_ms and self._waiting >= MAX_WAITING:
            retry_after_ms = _RETRY_MS
        if retry_after_ms:
            raise ResourceExhausted("too many tries; wait", {"retry_after_ms": retry_after_ms})
        self._waiting += 1
        try:
            async with self._turn:
                await self.users.refresh()
                user = await asyncio.to_thread(self._register, code, public_key, name, wall)
        finally:
            self._waiting -= 1
        if user is None:
            counted = self.throttle.failed("", address, now)
            if counted is not None:
                await counted
            raise Unauthenticated(
                "the code was not accepted: it is wrong, used or expired; ask for a new one"
            )
        return user

    def _register(self, code: str, public_key: bytes, name: str, wall: int) -> str | None:
        with self.codes.redeem(code, wall) as found:
            if found is None:
                return None
            user, spend = found
            if not self.users.is_known(user):
                return None
            if name in self.devices.read_names():
                raise AlreadyExists(f"a device is named {quoted(name)} already; choose another name")
            spend()  # first, so that a crash here cannot leave the code valid
            self.devices.add(name, user, public_key, _EPOCH + timedelta(milliseconds=wall))
            return user


def _check(code: str, public_key: bytes, name: str) -> None:
    if len(code) > MAX_CODE:
        raise InvalidArgument(f"code must have at most {MAX_CODE} characters")
    faults = name_faults(name)
    if faults:
        raise InvalidArgument(f"name: {faults[0]}")
    if not is_public_key(public_key):
        raise InvalidArgument("public_key must be an Ed25519 public key of 32 bytes")


def _text_of(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    return "".join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(_CODE_LENGTH)))


def _normalized(code: str) -> str:
    """Normalize a code as typed by a person. A malformed code stays a different text."""
    return code.upper().translate(_READ_AS)


def _digest_of(text: str, salt: bytes) -> bytes:
    return scrypt(text.encode("utf-8", "surrogatepass"), salt=salt, n=_COST, r=8, p=1, dklen=_DIGEST_BYTES)


def _is_hex(value: Any, size: int) -> bool:
    return (
        isinstance(value, str)
        and len(value) == 2 * size
        and all(digit in "0123456789abcdef" for digit in value)
    )


def _are_codes(tables: Any) -> bool:
    return isinstance(tables, list) and all(
        isinstance(table, dict)
        and {key: type(value) for key, value in table.items()} == _CODE_KEYS
        and _is_hex(table["digest"], _DIGEST_BYTES)
        and not name_faults(table["user"])
        for table in tables
    )
