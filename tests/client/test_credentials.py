"""What a client opens its sessions with, by what it was given."""

from __future__ import annotations

import pytest

from zcproto.client.session import ApiKey, Certificate, choose_credentials
from zcproto.errors import ConfigError


@pytest.mark.parametrize("has_certificate", [False, True])
def test_a_key_comes_first(has_certificate: bool) -> None:
    credentials = choose_credentials("ada", "secret", has_certificate=has_certificate)
    assert isinstance(credentials, ApiKey)
    assert credentials.params() == {"scheme": "api_key", "user": "ada", "key": "secret"}


def test_without_a_key_the_certificate_says_who_it_is() -> None:
    credentials = choose_credentials(None, None, has_certificate=True)
    assert credentials is not None
    assert credentials.params() == {"scheme": "tls"}


def test_with_a_user_the_certificate_must_name_that_one() -> None:
    credentials = choose_credentials("ada", None, has_certificate=True)
    assert credentials is not None
    assert credentials.params() == {"scheme": "tls", "user": "ada"}
    assert repr(credentials) == "Certificate(user='ada')" == repr(Certificate("ada"))


def test_with_nothing_there_are_no_sessions() -> None:
    assert choose_credentials(None, None, has_certificate=False) is None


@pytest.mark.parametrize("has_certificate", [False, True])
def test_a_key_needs_its_user(has_certificate: bool) -> None:
    with pytest.raises(ConfigError, match="give its user") as caught:
        choose_credentials(None, "secret", has_certificate=has_certificate)
    assert "secret" not in str(caught.value)


def test_a_user_needs_something_to_show() -> None:
    with pytest.raises(ConfigError, match="give its key, or a certificate"):
        choose_credentials("ada", None, has_certificate=False)
