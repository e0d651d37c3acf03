"""Pairing: a code that an operator hands to somebody, once traded for a device of a user's.

    [[codes]]
    user = "alice"
    digest = "..."          scrypt of the code under `salt`, as hex
    expires_at = 1767225600000
    wrong = 0

What this file decides: what a code is, how long it is good, and how a device gets registered with one.

Rules:
- A code is 40 random bits, as two groups of four characters that cannot be taken for one another (Crockford's
  base32). Reading one takes O for 0, I and L for 1, and any case.
- A code is good once, until its time is over. Five wrong tries end every code that was open meanwhile: a wrong
  code does not say which one it was meant to be. They are counted in the file, so also across restarts.
- The file, `pairing.toml`, is its owner's alone. It holds slow digests: 40 bits could be searched through a fast
  one within the code's life by whoever gets a copy of the file.
- Tries are made one after another, in a thread, and are throttled by their address, which is told to wait.
- A used, expired, unknown and malformed code, and one for a user who is gone, get one answer.

It must not know: connections, what devices do.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import datetime, timedelta
from hashlib import scrypt
from hmac import compare_digest
from typing import Any, Final, NamedTuple

from zcproto.auth.current_users import CurrentUsers
from zcproto.auth.devices import DeviceFile
from zcproto.auth.ed25519 import is_public_key
from zcproto.auth.names import name_faults, quoted, toml_string
from zcproto.auth.private_text import LOCK_WAIT_S, PrivateText
from zcproto.auth.throttle import Throttle
from zcproto.common.clock import Entropy, system_entropy
from zcproto.common.secret import SecretText
from zcproto.errors import AlreadyExists, InvalidArgument, ResourceExhausted, Unauthenticated

MAX_WRONG: Final = 5
"""Wrong tries that end a code."""

MAX_OPEN: Final = 100
"""Codes that may be open at once."""

MAX_CODE: Final = 64
"""Longest text taken for a code, in characters: room for a typing error, no more."""

MAX_WAITING: Final = 16
"""Tries that may wait for their turn."""

MAX_FILE_BYTES: Final = 1 << 20

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


class Pairing(NamedTuple):
    """What a code was traded for."""

    user: str
    device: str


class PairingFile:
    """Open codes in a file. Making one touches nothing. Faults raise ConfigError. `wall` is milliseconds."""

    __slots__ = ("_entropy", "_file")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        entropy: Entropy = system_entropy,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        self._file = PrivateText(path, "file of codes", max_bytes=MAX_FILE_BYTES, lock_wait_s=lock_wait_s)
        self._entropy = entropy

    def __repr__(self) -> str:
        return f"PairingFile({str(self._file.path)!r})"

    def make(self, user: str, life_ms: int, wall: int) -> SecretText:
        """A new code for a device of this user, which is shown this once."""
        faults = name_faults(user)
        if faults:
            raise self._file.fault(*(f"user {quoted(user)}: {fault}" for fault in faults))
        with self._file.locked():
            salt, codes = self._open_codes(wall)
            if len(codes) >= MAX_OPEN:
                raise self._file.fault(
                    f"{MAX_OPEN} codes are open already; use them, or wait until they expire"
                )
            if not codes:
                salt = self._entropy(_SALT_BYTES)
            text = _text_of(self._entropy(_CODE_BYTES))
            self._write(salt, [*codes, _Code(user, _digest_of(text, salt), wall + life_ms, 0)])
        return SecretText(f"{text[:_GROUP]}-{text[_GROUP:]}")

    def count_open(self, wall: int) -> int:
        """How many codes are open."""
        return len(self._open_codes(wall)[1])

    def trade(self, code: str, wall: int, register: Callable[[str, Callable[[], None]], None]) -> None:
        """Take a code. One that is not good counts as a wrong try.

        For a good one `register` is called with the user, and with what spends the code. If it does not call
        that, the code stays good.
        """
        if not self.count_open(wall):
            return
        with self._file.locked():
            salt, codes = self._open_codes(wall)
            if not codes:  # they were used up meanwhile
                return
            digest = _digest_of(_read(code), salt)
            found = [each for each in codes if compare_digest(each.digest, digest)]
            if not found:
                self._write(salt, [each._replace(wrong=each.wrong + 1) for each in codes])
                return
            register(found[0].user, lambda: self._write(salt, [each for each in codes if each != found[0]]))

    def _open_codes(self, wall: int) -> tuple[bytes, list[_Code]]:
        """The salt, and the codes that are still good."""
        _, text = self._file.read()
        document = self._file.document(text)
        salt, tables = document.pop("salt", ""), document.pop("codes", [])
        if document or not _is_hex(salt, _SALT_BYTES * bool(text)) or not _are_codes(tables):
            raise self._file.fault("is damaged; remove it, and make new codes by zcproto pair")
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
        self._file.replace(f'{_HEADER}salt = "{salt.hex()}"\n{"".join(entries)}')


class Enrollment:
    """Trades codes for registered devices, for whoever may try."""

    __slots__ = ("_codes", "_devices", "_throttle", "_turn", "_users", "_waiting")

    def __init__(
        self, codes: PairingFile, devices: DeviceFile, users: CurrentUsers, throttle: Throttle
    ) -> None:
        self._codes = codes
        self._devices = devices
        self._users = users
        self._throttle = throttle
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def enroll(
        self, code: str, public_key: bytes, name: str, *, address: str, wall: int, now: float
    ) -> Pairing:
        """Register a device for the user whom the code is for. `now` is monotonic seconds.

        Raises:
            Unauthenticated: the code is not good, whatever the cause.
            AlreadyExists: the code is good, and stays so; the name is taken.
            ResourceExhausted: too many wrong codes; `details["retry_after_ms"]` says when to come back.
            InvalidArgument: the name or the public key is none, or the code is far too long.
        """
        _check(code, public_key, name)
        retry_after_ms = self._throttle.check("", address, now)
        if not retry_after_ms and self._waiting >= MAX_WAITING:
            retry_after_ms = _RETRY_MS
        if retry_after_ms:
            raise ResourceExhausted("too many tries; wait", {"retry_after_ms": retry_after_ms})
        self._waiting += 1
        try:
            async with self._turn:
                await self._users.refresh()
                user = await asyncio.to_thread(self._trade, code, public_key, name, wall)
        finally:
            self._waiting -= 1
        if user is None:
            self._throttle.failed("", address, now)
            raise Unauthenticated(
                "the code was not accepted: it was used, it has expired, or it is another; ask for a new one"
            )
        return Pairing(user, name)

    def _trade(self, code: str, public_key: bytes, name: str, wall: int) -> str | None:
        registered = None

        def register(user: str, spend: Callable[[], None]) -> None:
            nonlocal registered
            if self._users.known(user) is None:
                return
            if name in self._devices.names():
                raise AlreadyExists(f"there is a device {quoted(name)} already; choose another name")
            spend()  # first: if this process ends here, the code is gone, and not good twice
            self._devices.add(name, user, public_key, _EPOCH + timedelta(milliseconds=wall))
            registered = user

        self._codes.trade(code, wall, register)
        return registered


def _check(code: str, public_key: bytes, name: str) -> None:
    if len(code) > MAX_CODE:
        raise InvalidArgument(f"code must have at most {MAX_CODE} characters")
    faults = name_faults(name)
    if faults:
        raise InvalidArgument(f"name: {faults[0]}")
    if not is_public_key(public_key):
        raise InvalidArgument("public_key must be a public key of Ed25519, 32 bytes")


def _text_of(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    return "".join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(_CODE_LENGTH)))


def _read(code: str) -> str:
    """A code as it is written, whoever wrote it. What is none stays another text."""
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
