"""The credentials that the options name."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from zcproto.client.credentials import ApiKey, CertificateLogin, Device, DeviceKey
from zcproto.client.options import ConnectOptions, choose_credentials
from zcproto.common.secret import SecretText
from zcproto.errors import ConfigError
from zcproto.wire.message import attach_message, open_message


class FakeChannel:
    """The values of a connection that a device signs."""

    salt = b"saltsalt"
    leaf = b"l" * 32


CHANNEL = FakeChannel()
DEVICE = Device(Ed25519PrivateKey.from_private_bytes(bytes(32)))


@pytest.mark.parametrize("certificate", [None, "client.crt"])
@pytest.mark.parametrize("key", ["secret", SecretText("secret")])
def test_key_takes_precedence(certificate: str | None, key: str) -> None:
    credentials = choose_credentials(ConnectOptions(user="ada", key=key, certificate=certificate))
    assert isinstance(credentials, ApiKey)
    assert credentials.params(CHANNEL) == {"scheme": "api_key", "user": "ada", "key": "secret"}


def test_certificate_identifies_the_user_without_a_key() -> None:
    credentials = choose_credentials(ConnectOptions(certificate="client.crt"))
    assert credentials is not None
    assert credentials.params(CHANNEL) == {"scheme": "tls"}


def test_certificate_with_user_must_name_that_user() -> None:
    credentials = choose_credentials(ConnectOptions(user="ada", certificate="client.crt"))
    assert credentials is not None
    assert credentials.params(CHANNEL) == {"scheme": "tls", "user": "ada"}
    assert repr(credentials) == "CertificateLogin(user='ada')" == repr(CertificateLogin("ada"))


def test_no_options_give_no_credentials() -> None:
    assert choose_credentials(ConnectOptions()) is None


@pytest.mark.parametrize("certificate", [None, "client.crt"])
def test_key_without_user_is_refused(certificate: str | None) -> None:
    with pytest.raises(ConfigError, match="user is missing") as caught:
        choose_credentials(ConnectOptions(key="secret", certificate=certificate))
    assert "secret" not in str(caught.value)


def test_user_without_key_or_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match="the key is missing; give key_file, key or certificate"):
        choose_credentials(ConnectOptions(user="ada"))


@pytest.mark.parametrize("certificate", [None, "client.crt"])
def test_device_signs_for_each_connection(certificate: str | None) -> None:
    credentials = choose_credentials(
        ConnectOptions(certificate=certificate, device=DEVICE, device_name="laptop")
    )
    assert isinstance(credentials, DeviceKey)
    signature = DEVICE.sign(open_message(b"saltsalt", b"l" * 32, "laptop"))
    assert credentials.params(CHANNEL) == {"scheme": "ed25519", "device": "laptop", "signature": signature}
    token = b"t" * 32
    signature = DEVICE.sign(attach_message(b"saltsalt", b"l" * 32, token))
    assert credentials.attach_params(CHANNEL, token) == {"signature": signature}
    assert repr(credentials) == "DeviceKey(name='laptop')"


@pytest.mark.parametrize(
    ("user", "key", "device", "name", "expected"),
    [
        ("ada", None, DEVICE, "laptop", "remove user and key"),
        (None, "secret", DEVICE, "laptop", "remove user and key"),
        (None, None, DEVICE, None, "device_name is missing"),
        ("ada", "secret", DEVICE, None, "device_name is missing"),
        (None, None, None, "laptop", "give the device"),
        ("ada", "secret", None, "laptop", "give the device"),
    ],
)
def test_device_without_name_or_with_user_is_refused(
    user: str | None, key: str | None, device: Device | None, name: str | None, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        choose_credentials(ConnectOptions(user=user, key=key, device=device, device_name=name))
