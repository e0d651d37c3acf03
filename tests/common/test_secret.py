"""Secrets hide wherever a value is turned into text, and are otherwise what they were."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import logging
import pickle
import traceback
from typing import Any

import msgpack
import pytest

from zcproto.common.secret import Secret, SecretBytes, SecretText

BYTES = SecretBytes(b"hunter2")
TEXT = SecretText("hunter2")


@pytest.mark.parametrize("secret", [Secret("hunter2"), BYTES, TEXT], ids=type)
def test_secret_is_masked_wherever_it_is_printed(secret: Any) -> None:
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret:>30}",
        f"{secret!r}",
        f"{secret!a}",
        "{:s}".format(secret),  # noqa: UP032 - the form is what is tried
        "%s %r" % (secret, secret),  # noqa: UP031 - as well
        repr([secret]),
        repr({"key": (secret,)}),
        logging.LogRecord("x", 0, "", 0, "%s", (secret,), None).getMessage(),
    ]
    assert not [text for text in shown if "hunter2" in text]
    assert "hunter2" not in "".join(traceback.format_exception(ValueError(secret)))


def test_secret_is_revealed_explicitly() -> None:
    assert Secret("hunter2").reveal() == "hunter2"


def test_secret_cannot_be_pickled_or_copied() -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(Secret("a"))
    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.deepcopy(Secret("a"))


def test_secret_bytes_and_text_behave_as_bytes_and_text() -> None:
    assert BYTES == b"hunter2"
    assert TEXT == "hunter2"
    assert {b"hunter2": 1}[BYTES] == {"hunter2": 1}[TEXT] == 1
    assert msgpack.packb([BYTES, TEXT]) == msgpack.packb([b"hunter2", "hunter2"])
    assert json.dumps([TEXT]) == '["hunter2"]'
    assert hashlib.sha256(BYTES).digest() == hashlib.sha256(b"hunter2").digest()
    assert hmac.compare_digest(BYTES, b"hunter2")
    assert TEXT.encode() == b"hunter2"


def test_secret_of_a_secret_is_equal() -> None:
    assert SecretBytes(BYTES) == b"hunter2"
    assert SecretText(TEXT) == "hunter2"
    assert pickle.loads(pickle.dumps([BYTES, TEXT])) == [b"hunter2", "hunter2"]
    assert copy.deepcopy(TEXT) == "hunter2"


def test_revealed_value_is_plain() -> None:
    assert (repr(BYTES[:]), repr(TEXT.reveal())) == ("b'hunter2'", "'hunter2'")
