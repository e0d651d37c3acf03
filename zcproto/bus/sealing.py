"""Seal what passes through a store that others can read: AES-256-GCM, with keys derived for each process.

    sealer = Sealer(load_keys(home.store_key, entropy), entropy)   # after the fork
    data = sealer.seal(b"topic news", body)                    # sender (16 bytes), counter (8 bytes), ciphertext
    opener.open(b"topic news", data)                           # None unless it was sealed by one of the keys

Rules:
- A process draws 16 random bytes, its subkey is HKDF-SHA256 (RFC 5869) of the store's key with them, and its nonces
  are a counter: no nonce is used twice with a subkey.
- The file has a key in each line. The first one seals, all of them open: a new key is added at the end on all
  servers, then moved to the front, and the old one is removed when nothing sealed by it is kept any more.

The threat is a reader of the store. Who can write there can forge sessions already.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from zcproto.common.clock import Entropy
from zcproto.common.files import file_errors, new_file, read_file
from zcproto.errors import ConfigError

KEY_SIZE: Final = 32
SENDER_SIZE: Final = 16
COUNTER_SIZE: Final = 8
MAX_KEYS: Final = 8
MAX_FILE: Final = 4_096
MAX_SENDERS: Final = 256
"""Subkeys of other processes that are kept, about 1 KiB each."""

_INFO: Final = b"zcproto store key"
_PADDING: Final = bytes(4)  # a nonce has 12 bytes


def load_keys(path: Path, entropy: Entropy) -> tuple[bytes, ...]:
    """Return the keys in a file, which is created if it is missing. Raises ConfigError."""
    with file_errors(path, "read"):
        if not path.exists():
            with new_file(path) as file:
                file.write(base64.urlsafe_b64encode(entropy(KEY_SIZE)) + b"\n")
        data, _ = read_file(path, MAX_FILE)
    try:
        keys = tuple(base64.b64decode(line, b"-_", validate=True) for line in data.split())
    except binascii.Error:
        keys = ()
    if not 1 <= len(keys) <= MAX_KEYS or any(len(key) != KEY_SIZE for key in keys):
        raise ConfigError(
            [
                f"{path}: must have 1 to {MAX_KEYS} lines, each with {KEY_SIZE} bytes in base64url;"
                " copy it from another server of this store, or delete it on all of them"
            ]
        )
    return keys


def fingerprint(key: bytes) -> str:
    """Return eight characters by which an operator compares the keys of servers."""
    return hashlib.sha256(_INFO + key).hexdigest()[:8]


def _subkey(key: bytes, sender: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), KEY_SIZE, salt=sender, info=_INFO).derive(key))


class Sealer:
    """Seals what one process sends; to be made after its fork."""

    def __init__(self, keys: tuple[bytes, ...], entropy: Entropy) -> None:
        self.sender = entropy(SENDER_SIZE)
        self._cipher = _subkey(keys[0], self.sender)
        self._counter = 0

    def seal(self, about: bytes, data: bytes) -> bytes:
        """Return sealed data that opens with the same `about` alone."""
        counter = self._counter.to_bytes(COUNTER_SIZE)
        self._counter += 1
        return self.sender + counter + self._cipher.encrypt(_PADDING + counter, data, about)


class Opener:
    """Opens what processes have sealed by one of the keys."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self._keys = keys
        self._ciphers: OrderedDict[bytes, AESGCM] = OrderedDict()

    def open(self, about: bytes, data: bytes) -> bytes | None:
        """Return the data, or None if it was not sealed by one of the keys for this `about`."""
        sender, counter = data[:SENDER_SIZE], data[SENDER_SIZE : SENDER_SIZE + COUNTER_SIZE]
        sealed = data[SENDER_SIZE + COUNTER_SIZE :]
        known = self._ciphers.get(sender)
        for cipher in [_subkey(key, sender) for key in self._keys] if known is None else [known]:
            try:
                opened = cipher.decrypt(_PADDING + counter, sealed, about)
            except (InvalidTag, ValueError):  # ValueError: it is too short
                continue
            self._ciphers[sender] = cipher
            self._ciphers.move_to_end(sender)
            if len(self._ciphers) > MAX_SENDERS:
                self._ciphers.popitem(last=False)
            return opened
        return None
