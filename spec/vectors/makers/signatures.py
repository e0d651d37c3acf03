"""What a device signs to open a session and to attach it to another connection (Ed25519, RFC 8032)."""

from __future__ import annotations

import hashlib
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from makers.forms import SALT, TOKEN

SUBJECT = "What a device signs to open a session and to attach it to another connection (Ed25519, RFC 8032)."
NOTES = {
    "relay": "Signed for another connection or another server; catches servers that do not bind to both.",
    "context": "Signed for another purpose; catches a missing or shared prefix.",
}
SEED = bytes(range(32))
LEAF = hashlib.sha256(b"stands for a certificate in DER").digest()
OTHER_LEAF = hashlib.sha256(b"stands for another certificate in DER").digest()


def message_to_open(salt: bytes, leaf: bytes, device: str) -> bytes:
    return b"zcp/1 open\0" + salt + leaf + device.encode()


def message_to_attach(salt: bytes, leaf: bytes, token: bytes) -> bytes:
    return b"zcp/1 attach\0" + salt + leaf + token


def vectors() -> list[dict[str, Any]]:
    key = Ed25519PrivateKey.from_private_bytes(SEED)
    open_message = message_to_open(SALT, LEAF, "d-7c41")
    attach_message = message_to_attach(SALT, LEAF, TOKEN)
    by_device = {"scheme": "ed25519", "device": "d-7c41"}
    by_token = {"scheme": "attach", "token": TOKEN.hex()}

    def made(
        name: str, summary: str, subject: dict[str, str], signed: bytes, flag: str | None = None
    ) -> dict[str, Any]:
        device = subject.get("device")
        expected = attach_message if device is None else message_to_open(SALT, LEAF, device)
        return {
            "name": f"signature-{name}",
            "summary": summary,
            "flags": [flag] if flag else [],
            "private_key": SEED.hex(),
            "public_key": key.public_key().public_bytes_raw().hex(),
            "salt": SALT.hex(),
            "leaf": LEAF.hex(),
            **subject,
            "message": expected.hex(),
            "signature": key.sign(signed).hex(),
            "expect": {"valid": signed == expected},
        }

    unicode_device = {"scheme": "ed25519", "device": "d-\u00fc"}
    return [
        made("open", "session.open by a device.", by_device, open_message),
        made(
            "open-unicode",
            "The device is signed as UTF-8.",
            unicode_device,
            message_to_open(SALT, LEAF, "d-\u00fc"),
        ),
        made("attach", "session.attach of a bound token.", by_token, attach_message),
        made(
            "open-other-salt",
            "Of another connection.",
            by_device,
            message_to_open(bytes(8), LEAF, "d-7c41"),
            "relay",
        ),
        made(
            "open-other-leaf",
            "Relayed through another server.",
            by_device,
            message_to_open(SALT, OTHER_LEAF, "d-7c41"),
            "relay",
        ),
        made(
            "open-other-device",
            "Of another device.",
            by_device,
            message_to_open(SALT, LEAF, "d-7c42"),
            "context",
        ),
        made(
            "open-without-nul",
            "The prefix ends with a zero byte.",
            by_device,
            open_message.replace(b"\0", b"", 1),
            "context",
        ),
        made(
            "open-as-attach",
            "The prefix of the other purpose.",
            by_device,
            b"zcp/1 attach\0" + open_message[11:],
            "context",
        ),
        made(
            "attach-other-salt",
            "Of another connection.",
            by_token,
            message_to_attach(bytes(8), LEAF, TOKEN),
            "relay",
        ),
        made(
            "attach-other-token",
            "Of another session.",
            by_token,
            message_to_attach(SALT, LEAF, bytes(32)),
            "context",
        ),
    ]
