"""The secret watch finds every leak, and a run with a leak fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.secrets_watch import PLACES, SECRETS_PER_TEST, SecretWatch, watch
from zcproto.sessions.token import token_text

ROOT = Path(__file__).resolve().parents[1]
TOKEN = bytes.fromhex("e31f4122c05b7d099afa5c1e0b6627d8914c3e72a5f0188b6dd42a97c3b10e5f")

FORMS: dict[str, Callable[[bytes], object]] = {
    "raw": lambda token: token,
    "hex": lambda token: token.hex(),
    "capitals": lambda token: token.hex().upper(),
    "an odd place": lambda token: f"f{token.hex()}",
    "hex in pairs": lambda token: token.hex(":"),
    "base64": b64encode,
    "base64url": urlsafe_b64encode,
    "as tokens are shown": token_text,
    "repr": repr,
    "repr of repr": lambda token: repr(repr(token)),
    "in a map": lambda token: {"token": token},
    "a bytearray": bytearray,
    "numbers": list,
    "JSON of text": lambda token: json.dumps(token.decode("latin-1")),
    "text": lambda token: token.decode("latin-1"),
    "escaped text": lambda token: token.decode("utf-8", "backslashreplace"),
    "within what is encoded": lambda token: b64encode(b"xy" + token + b"z"),
    "behind letters": lambda token: f"abc{token_text(token)}",
    "the first half": lambda token: token_text(token)[:22],
    "the second half": lambda token: token[16:].hex(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_token_is_found_in_every_form(form: Callable[[bytes], object]) -> None:
    mine = SecretWatch()
    mine.add_secret(TOKEN)
    mine.add_output(
        "the log", b"before it " + form(TOKEN) if form is FORMS["raw"] else f"before {form(TOKEN)!s} behind"
    )
    assert mine.search()
    assert mine.search() == []


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_other_token_is_not_reported(form: Callable[[bytes], object]) -> None:
    mine = SecretWatch()
    mine.add_secret(TOKEN)
    mine.add_output("the log", f"{form(bytes(byte ^ 0x55 for byte in TOKEN))!s}")
    assert mine.search() == []
    assert mine.searched > 0


def test_text_is_found_as_a_whole() -> None:
    mine = SecretWatch()
    mine.add_secret("7QK2-M9XD")
    mine.add_output("an error", "no device for 7QK2-M9XE")
    assert mine.search() == []
    mine.add_output("an error", "no device for 7QK2-M9XD")
    (found,) = mine.search()
    assert found.startswith("an error: as it is, after 'no device for '")


def test_found_secret_is_not_shown() -> None:
    mine = SecretWatch()
    mine.add_secret(TOKEN)
    mine.add_output("the log", f"x {TOKEN.hex()}")
    (found,) = mine.search()
    assert TOKEN.hex()[:8] not in found


def test_each_secret_is_counted_once_and_each_test_is_limited() -> None:
    mine = SecretWatch()
    for number in range(2 * SECRETS_PER_TEST):
        for _ in range(2):
            mine.add_secret(TOKEN[:24] + number.to_bytes(8, "big"))
    for empty in (
        None,
        b"",
        bytes(32),
        "short",
        "a" * 40,
        b"a token of this protocol",
        bytes(range(32)),
        "protocol",
    ):
        mine.add_secret(empty)
    assert mine.created == SECRETS_PER_TEST
    mine.begin_test()
    mine.add_secret(TOKEN)
    assert mine.created == SECRETS_PER_TEST + 1


def test_tokens_of_the_package_are_watched() -> None:
    from zcproto.common.clock import system_clock, system_entropy
    from zcproto.sessions import SessionRegistry, SessionSettings

    before = watch.created
    registry = SessionRegistry(SessionSettings(), system_entropy)
    registry.open("ada", client="x/1", address="192.0.2.1", wall=system_clock.wall())
    assert watch.created - before in (2, 3)  # both tokens, and the random part of one


# --- a whole run -------------------------------------------------------------------------------------------------

BEGINNING = """
import logging, sys
import pytest
from zcproto.common.clock import system_entropy
from zcproto.errors import InvalidArgument
from zcproto.observe.log import get_logger
from zcproto.common.secret import Secret
from zcproto.sessions.token import token_text

log = get_logger("zcproto.test")
"""

TEST = """
def test_number_{number}(capsys):
    token = system_entropy(32)
    text = token_text(token)
    {body}
"""

LEAKS = {
    "the log": 'log.warning("a.b", name="x" + text)',
    "logging": 'logging.getLogger("x").warning("%s", token.hex())',
    "standard error": "print(text, file=sys.stderr)\n    capsys.readouterr()",
    "Captured stderr": "print(text, file=sys.stderr)",
    "an exception": 'pytest.raises(InvalidArgument, lambda: (_ for _ in ()).throw(InvalidArgument(f"{token}")))',
    "a Secret in an exception": 'InvalidArgument(Secret("Correct horse 7").reveal())',
}


def run(tmp_path: Path, bodies: Iterable[str], *options: str) -> subprocess.CompletedProcess[str]:
    tests = [TEST.format(number=number, body=body) for number, body in enumerate(bodies)]
    (tmp_path / "test_leak.py").write_text(BEGINNING + "".join(tests))
    command = [sys.executable, "-m", "pytest", "-p", "tests.secrets_watch", "--rootdir", str(tmp_path)]
    return subprocess.run(
        [*command, "-c", os.devnull, str(tmp_path), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_each_leaking_test_fails_and_names_the_place(tmp_path: Path) -> None:
    done = run(tmp_path, LEAKS.values())
    assert done.returncode == 1, done.stdout
    for number, where in enumerate(LEAKS):
        _, _, section = done.stdout.partition(f"ERROR at teardown of test_number_{number} ")
        section = section.partition(" ERROR at teardown of ")[0]
        assert "a secret is in " in section, (where, done.stdout)
        assert where.removeprefix("a Secret in ") in section, (where, done.stdout)


def test_run_without_leaks_passes_if_it_created_enough_secrets(tmp_path: Path) -> None:
    shown_only = ['log.warning("a.b", token=token, name=Secret(text)); print(text)']
    done = run(tmp_path, shown_only, "--secrets-at-least", "1")
    assert done.returncode == 0, done.stdout
    assert "created (at least 1 expected), 0 found" in done.stdout
    assert run(tmp_path, shown_only, "--secrets-at-least", "1000").returncode == 1


def test_every_watched_place_exists() -> None:
    import importlib

    for module, name, _ in PLACES:
        owner = importlib.import_module(module)
        for part in name.split("."):
            owner = getattr(owner, part)
        assert callable(owner)
