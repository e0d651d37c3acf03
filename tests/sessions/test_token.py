"""Test digests and text forms of tokens and ids."""

from __future__ import annotations

import base64
import os
from hashlib import sha256

import pytest

from zcproto.sessions import TOKEN_SIZE, token_from_text, token_text
from zcproto.sessions.token import FAMILY_SIZE, ID_SIZE, digest_of, id_from_text, id_of, id_text

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
TOKEN = bytes(range(TOKEN_SIZE))
TEXT = token_text(TOKEN)
ID = bytes(range(ID_SIZE))


@pytest.mark.requirement("token_size")
def test_token_text_is_43_characters_of_unpadded_base64url() -> None:
    assert TEXT == "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
    assert len(TEXT) == 43


def test_id_text_is_22_characters_of_unpadded_base64url() -> None:
    assert id_text(ID) == "AAECAwQFBgcICQoLDA0ODw"


@pytest.mark.parametrize("byte", [0, 1, 0x3E, 0x3F, 0x7F, 0x80, 0xFB, 0xFE, 0xFF])
def test_token_text_round_trips_for_every_byte(byte: int) -> None:
    assert token_from_text(token_text(bytes([byte]) * TOKEN_SIZE)) == bytes([byte]) * TOKEN_SIZE
    assert id_from_text(id_text(bytes([byte]) * ID_SIZE)) == bytes([byte]) * ID_SIZE


def test_token_text_with_unused_bits_set_is_refused() -> None:
    texts = [TEXT[:-1] + character for character in ALPHABET]
    tokens = {text: token for text in texts if (token := token_from_text(text)) is not None}
    assert list(tokens) == texts[::4]
    assert all(token_text(token) == text for text, token in tokens.items())


def test_id_text_with_unused_bits_set_is_refused() -> None:
    texts = [id_text(ID)[:-1] + character for character in ALPHABET]
    assert [text for text in texts if id_from_text(text) is not None] == texts[::16]


@pytest.mark.requirement("token_size")
@pytest.mark.parametrize(
    "text",
    [
        "",
        TEXT[:-1],
        TEXT + "A",
        TEXT + "=",
        TEXT + "\n",
        "\n" + TEXT,
        " " + TEXT[1:],
        TEXT[:20] + "+" + TEXT[21:],
        TEXT[:20] + "/" + TEXT[21:],
        TEXT[:20] + "=" + TEXT[21:],
        TEXT[:20] + "é" + TEXT[21:],
        TEXT[:20] + "\0" + TEXT[21:],
        TEXT[:20] + "\ud800" + TEXT[21:],
        TEXT[:20] + "\N{FULLWIDTH LATIN CAPITAL LETTER A}" + TEXT[21:],
        base64.b64encode(TOKEN).decode(),
        TOKEN.hex(),
    ],
)
def test_invalid_token_text_is_refused(text: str) -> None:
    assert token_from_text(text) is None
    assert id_from_text(text) is None


def test_digest_is_sha256_of_token() -> None:
    assert digest_of(TOKEN) == sha256(TOKEN).digest()


def test_id_differs_from_plain_digest_of_family() -> None:
    family = os.urandom(FAMILY_SIZE)
    assert id_of(family) != digest_of(family)[:ID_SIZE]
    assert len(id_of(family)) == ID_SIZE
    assert id_of(family) == id_of(family)
