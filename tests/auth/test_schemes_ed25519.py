"""Devices that sign for their connection: who is let in, what they may attach, and one answer for all others."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.auth.helpers import directory, identified, write
from tests.helpers import drive
from zcproto.auth import DeviceFile, Identity, Login, Throttle, UserFile, schemes
from zcproto.auth.devices import is_public_key, is_signed
from zcproto.auth.identity import Channel
from zcproto.auth.schemes import ApiKeyAuthenticator, DeviceAuthenticator
from zcproto.common.roles import OPERATORS
from zcproto.errors import InvalidArgument, ResourceExhausted, Unauthenticated
from zcproto.wire.message import attach_message, open_message

ADDRESS = "192.0.2.1"
NOW = 50.0
SALT, OTHER_SALT = b"saltsalt", b"SALTSALT"
LEAF, OTHER_LEAF = b"l" * 32, b"L" * 32
TOKEN = b"t" * 32
CHANNEL = Channel(salt=SALT, leaves=lambda: frozenset({LEAF}))
VECTORS = json.loads((Path(__file__).parents[2] / "spec" / "vectors" / "signatures.json").read_text())[
    "vectors"
]
KEYS = {n: Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(3)}


def public(number: int) -> bytes:
    return KEYS[number].public_key().public_bytes_raw()


def opening(number: int = 0, name: str = "laptop", salt: bytes = SALT, leaf: bytes = LEAF) -> bytes:
    return KEYS[number].sign(open_message(salt, leaf, name))


def attaching(number: int = 0, token: bytes = TOKEN, salt: bytes = SALT, leaf: bytes = LEAF) -> bytes:
    return KEYS[number].sign(attach_message(salt, leaf, token))


class Scheme:
    """The scheme with ada's laptop and root's desktop, and its reports."""

    def __init__(self, home: Path) -> None:
        self.users = UserFile(home / "users.toml")
        self.users.add("ada"), self.users.add("root", roles=OPERATORS)
        self.devices = DeviceFile(home / "devices.toml")
        for name, user, number in (("laptop", "ada", 0), ("desktop", "root", 1), ("lost", "unknown", 2)):
            self.devices.add(name, user, public(number), datetime(2026, 1, 1, tzinfo=UTC))
        self.devices.load()
        self.refused: list[tuple[str, str]] = []
        self.authenticator = DeviceAuthenticator(
            directory(self.devices),
            directory(self.users),
            on_refused=lambda reason, address: self.refused.append((reason, address)),
        )
        self.login = Login([self.authenticator], Throttle())

    def ask(
        self,
        device: Any = "laptop",
        signature: Any = b"",
        channel: Channel = CHANNEL,
        now: float = NOW,
        **more: Any,
    ) -> Identity:
        params = {"scheme": "ed25519", "device": device, "signature": signature, **more}
        return drive(identified(self.login, params, ADDRESS, now, channel))

    def attach(
        self,
        signature: bytes,
        key: str = "device:laptop",
        user: str = "ada",
        token: bytes = TOKEN,
        channel: Channel = CHANNEL,
        now: float = NOW,
    ) -> None:
        drive(self.login.attach(key, user, signature, token, ADDRESS, now, channel))


@pytest.fixture
def scheme(tmp_path: Path) -> Scheme:
    return Scheme(tmp_path / "home")


# --- opening -----------------------------------------------------------------------------------------


def test_device_opens_a_session_of_its_user_bound_to_the_device(scheme: Scheme) -> None:
    assert scheme.ask(signature=opening()) == Identity("ada", key="device:laptop")
    assert scheme.ask("desktop", opening(1, "desktop"), client="zc/1") == Identity(
        "root", OPERATORS, "device:desktop"
    )
    assert scheme.refused == []


def test_device_has_the_roles_of_its_user_that_it_is_narrowed_to(scheme: Scheme) -> None:
    scheme.users.set_roles("ada", frozenset({"admin", "billing"}))  # read: it is the object of the directory
    assert scheme.ask(signature=opening()).roles == {"admin", "billing"}
    for narrowed, left in (("billing operator", {"billing"}), ("", set()), (None, {"admin", "billing"})):
        scheme.devices.set_roles("laptop", None if narrowed is None else frozenset(narrowed.split()))
        scheme.devices.reload()
        assert scheme.ask(signature=opening()).roles == left


def test_signature_for_any_certificate_shown_to_the_connection_is_valid(scheme: Scheme) -> None:
    both = Channel(salt=SALT, leaves=lambda: frozenset({LEAF, OTHER_LEAF}))
    for leaf in (LEAF, OTHER_LEAF):
        assert scheme.ask(signature=opening(leaf=leaf), channel=both).user == "ada"


NOT_FITTING = "sent a signature by another key, or for another connection or server"


@pytest.mark.parametrize(
    ("device", "signature", "reason"),
    [
        ("laptop", opening(1), NOT_FITTING),
        ("laptop", bytes(64), NOT_FITTING),
        ("laptop", b"\xff" * 64, NOT_FITTING),
        ("laptop", opening(salt=OTHER_SALT), NOT_FITTING),
        ("laptop", opening(leaf=OTHER_LEAF), NOT_FITTING),
        ("laptop", opening(name="desktop"), NOT_FITTING),
        ("laptop", attaching(), NOT_FITTING),
        ("desktop", opening(name="desktop"), NOT_FITTING),
        ("nothing", opening(name="nothing"), "is unknown"),
        ("LAPTOP", opening(name="LAPTOP"), "is unknown"),
        ("lost", opening(2, "lost"), "belongs to 'unknown', who is not a user here"),
    ],
)
def test_all_failed_logins_get_one_answer_and_the_operator_the_reason(
    scheme: Scheme, device: str, signature: bytes, reason: str
) -> None:
    with pytest.raises(Unauthenticated) as caught:
        scheme.ask(device, signature)
    assert caught.value.message == "the login was not accepted; check the name, and the key or certificate"
    assert caught.value.details == {}
    assert scheme.refused == [(f"the device {device!r} {reason}", ADDRESS)]


def test_connection_without_salt_or_certificate_is_refused(scheme: Scheme) -> None:
    for channel in (Channel(), Channel(salt=SALT)):
        with pytest.raises(Unauthenticated):
            scheme.ask(signature=opening(), channel=channel)
    assert (
        drive(scheme.authenticator.authenticate({"device": "laptop", "signature": opening()}, ADDRESS))
        is None
    )


@pytest.mark.parametrize(
    ("device", "signature"), [("laptop", opening(1)), ("nothing", opening(1)), ("lost", opening(1))]
)
def test_wrong_signature_and_unknown_device_or_user_take_the_same_steps(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch, device: str, signature: bytes
) -> None:
    steps: list[Any] = []

    def signed(key: bytes, signature: bytes, message: bytes) -> bool:
        steps.append((len(key), len(message)))
        return is_signed(key, signature, message)

    def found(self: UserFile, name: str) -> Any:
        steps.append("user")
        return find(self, name)

    find = UserFile.find
    monkeypatch.setattr(schemes, "is_signed", signed)
    monkeypatch.setattr(UserFile, "find", found)
    with pytest.raises(Unauthenticated):
        scheme.ask(device, signature, Channel(salt=SALT, leaves=lambda: frozenset({LEAF, OTHER_LEAF})))
    assert steps == ["user", *[(32, len(open_message(SALT, LEAF, device)))] * 2]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"signature": bytes(64)}, "device: the scheme ed25519 needs a str of 1 to 128 characters"),
        ({"device": "", "signature": bytes(64)}, "device: "),
        ({"device": "x" * 129, "signature": bytes(64)}, "device: "),
        ({"device": 5, "signature": bytes(64)}, "device: "),
        ({"device": "laptop"}, "signature: the scheme ed25519 needs 64 bytes"),
        ({"device": "laptop", "signature": "x" * 64}, "signature: "),
        ({"device": "laptop", "signature": bytes(63)}, "signature: "),
        ({"device": "laptop", "signature": bytes(65)}, "signature: "),
        (
            {"device": "laptop", "signature": bytes(64), "user": "ada"},
            "takes device and signature, and nothing",
        ),
    ],
)
def test_invalid_fields_are_named(scheme: Scheme, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        drive(identified(scheme.login, {"scheme": "ed25519", **params}, ADDRESS, NOW, CHANNEL))


async def test_devices_and_users_follow_changes_of_their_files(tmp_path: Path) -> None:
    scheme = Scheme(tmp_path / "home")

    async def ask() -> Identity:
        params = {"scheme": "ed25519", "device": "laptop", "signature": opening()}
        return await identified(scheme.login, params, ADDRESS, NOW, CHANNEL)

    assert (await ask()).user == "ada"
    entry = scheme.devices.remove("laptop")
    with pytest.raises(Unauthenticated):
        await ask()
    scheme.devices.add("laptop", "ada", entry.public_key, entry.added)
    assert (await ask()).user == "ada"
    users = scheme.users.path.read_text()
    write(scheme.users.path, users.replace("[users.ada]", "[users.eve]"))
    with pytest.raises(Unauthenticated):
        await ask()


def test_refusal_callback_is_optional(scheme: Scheme, tmp_path: Path) -> None:
    authenticator = DeviceAuthenticator(directory(scheme.devices), directory(scheme.users))
    params = {"device": "laptop", "signature": bytes(64)}
    assert drive(authenticator.authenticate(params, ADDRESS, CHANNEL)) is None


# --- attaching ---------------------------------------------------------------------------------------


def test_device_proves_its_key_on_a_further_connection(scheme: Scheme) -> None:
    scheme.attach(attaching())
    scheme.attach(
        attaching(leaf=OTHER_LEAF), channel=Channel(salt=SALT, leaves=lambda: frozenset({LEAF, OTHER_LEAF}))
    )
    assert scheme.login.accepted["session.attach"] == 2
    with pytest.raises(Unauthenticated):
        scheme.attach(attaching(1))
    assert scheme.login.refused["session.attach"] == 1


@pytest.mark.parametrize(
    ("signature", "key", "user"),
    [
        (attaching(1), "device:laptop", "ada"),
        (attaching(salt=OTHER_SALT), "device:laptop", "ada"),
        (attaching(leaf=OTHER_LEAF), "device:laptop", "ada"),
        (attaching(token=bytes(32)), "device:laptop", "ada"),
        (opening(), "device:laptop", "ada"),
        (attaching(), "device:nothing", "ada"),
        (attaching(), "device:", "ada"),
        (attaching(), "laptop", "ada"),
        (attaching(), "tls:laptop", "ada"),
        (attaching(), "device:laptop", "root"),  # the name belonged to another user's device before
        (attaching(1), "device:desktop", "ada"),
    ],
)
def test_wrong_proof_of_a_key_is_refused(scheme: Scheme, signature: bytes, key: str, user: str) -> None:
    with pytest.raises(Unauthenticated, match="the key was not proved"):
        scheme.attach(signature, key, user)


def test_every_wrong_proof_takes_the_same_steps(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def signed(key: bytes, signature: bytes, message: bytes) -> bool:
        steps.append(len(message))
        return is_signed(key, signature, message)

    monkeypatch.setattr(schemes, "is_signed", signed)
    for key, user in (("device:laptop", "ada"), ("device:nothing", "ada"), ("device:laptop", "root")):
        steps.clear()
        with pytest.raises(Unauthenticated):
            scheme.attach(attaching(1), key, user)
        assert steps == [len(attach_message(SALT, LEAF, TOKEN))]


async def test_attach_is_refused_without_a_device_scheme(tmp_path: Path) -> None:
    by_key = ApiKeyAuthenticator(directory(UserFile(tmp_path / "users.toml")))
    with pytest.raises(Unauthenticated):
        await Login([by_key], Throttle()).attach(
            "device:laptop", "ada", attaching(), TOKEN, ADDRESS, NOW, CHANNEL
        )


def test_key_is_gone_when_its_device_is_removed(tmp_path: Path) -> None:
    scheme = Scheme(tmp_path / "home")
    assert not scheme.login.is_gone("device:laptop")
    assert not scheme.login.is_gone("tls:laptop")  # a key of another kind
    scheme.devices.remove("laptop")
    assert not scheme.login.is_gone("device:laptop")
    scheme.devices.load()
    assert scheme.login.is_gone("device:laptop")
    by_key = ApiKeyAuthenticator(directory(scheme.users))
    assert not Login([by_key], Throttle()).is_gone("device:laptop")


# --- throttling --------------------------------------------------------------------------------------


def test_failed_opens_and_attaches_are_counted_for_the_device(scheme: Scheme) -> None:
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            scheme.ask(signature=bytes(64))
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            scheme.attach(bytes(64))
    for attempt in (lambda: scheme.ask(signature=opening()), lambda: scheme.attach(attaching())):
        with pytest.raises(ResourceExhausted) as caught:
            attempt()
        assert caught.value.details == {"retry_after_ms": 1000}
    assert scheme.ask("desktop", opening(1, "desktop")).user == "root"
    scheme.attach(attaching(), now=NOW + 1.0)


# --- keys and signatures -----------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_vectors_of_the_specification(vector: dict[str, Any]) -> None:
    values = {
        name: bytes.fromhex(vector[name])
        for name in ("public_key", "salt", "leaf", "token", "signature")
        if name in vector
    }
    if vector["scheme"] == "ed25519":
        message = open_message(values["salt"], values["leaf"], vector["device"])
    else:
        message = attach_message(values["salt"], values["leaf"], values["token"])
    good = is_signed(values["public_key"], values["signature"], message)
    assert good is vector["expect"]["valid"]
    if good:
        assert message.hex() == vector["message"]
    assert is_public_key(values["public_key"])


SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000080",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]
NOT_CANONICAL = [
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
]
NO_POINT = "0200000000000000000000000000000000000000000000000000000000000000"


@pytest.mark.parametrize("data", [*SMALL_ORDER, *NOT_CANONICAL, NO_POINT, "00" * 31, "00" * 33, ""])
def test_invalid_and_small_order_points_are_not_public_keys(data: str) -> None:
    assert not is_public_key(bytes.fromhex(data))


def test_small_order_key_verifies_a_forged_signature() -> None:
    """Shows why they are refused: a signature that is valid for any message."""
    identity = bytes.fromhex(SMALL_ORDER[0])
    assert is_signed(identity, identity + bytes(32), b"anything")


def test_every_generated_key_is_a_public_key() -> None:
    for number in range(256):
        private = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
        assert is_public_key(private.public_key().public_bytes_raw())
