from __future__ import annotations

import copy
import pickle
import traceback

import pytest

from zcproto.observe.secret import Secret


@pytest.mark.parametrize("value", ["hunter2", b"hunter2"])
def test_a_secret_shows_a_mask_wherever_it_is_printed(value: str | bytes) -> None:
    secret = Secret(value)
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret:>30}",
        f"{secret!r}",
        "{:s}".format(secret),  # noqa: UP032 - the form is what is tried
        repr([secret]),
    ]
    assert not [text for text in shown if "hunter2" in text]


def test_a_secret_is_not_in_an_error_about_it() -> None:
    secret = Secret("hunter2")
    assert "hunter2" not in "".join(traceback.format_exception(ValueError(secret)))


@pytest.mark.parametrize("value", ["hunter2", b"hunter2"])
def test_a_secret_is_revealed_only_when_asked(value: str | bytes) -> None:
    assert Secret(value).reveal() == value


def test_secrets_compare_by_value() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") == Secret(b"a")
    assert Secret("a") != Secret("b")
    assert Secret("\ud800") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2
    assert len(Secret("hunter2")) == 7


def test_a_secret_is_not_pickled_or_copied() -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(Secret("a"))
    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.deepcopy(Secret("a"))
