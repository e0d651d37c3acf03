"""What a new configuration changes, and which of it can be applied while a server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zcproto.config import Config, load_config
from zcproto.config.changes import (
    MAX_SHOWN,
    TAKES_EFFECT,
    WAIT_FOR,
    Effect,
    changes_between,
    effective,
)
from zcproto.config.checks import CHECKS, value_of
from zcproto.config.model import settings

HOME = Path("/home/of/a/test")


def config(**values: Any) -> Config:
    overrides = {name.replace("__", "."): value for name, value in values.items()}
    return load_config(None, home=HOME, environ={}, overrides=overrides)


def test_every_key_has_an_effect() -> None:
    assert set(TAKES_EFFECT) == set(settings())


def test_keys_of_one_check_take_effect_together() -> None:
    """Else a part of a new configuration could be applied that contradicts what stays of the old one."""
    for check in CHECKS:
        restart = {key for key in check.keys if TAKES_EFFECT[key] is Effect.RESTART}
        live = set(check.keys) - restart
        for key in live if restart else ():
            assert all(key in WAIT_FOR.get(each, ()) for each in restart), check.keys


def test_equal_configurations_have_no_changes() -> None:
    assert changes_between(config(), config()) == []
    assert effective(config(), config()) == config()


def test_each_change_has_its_values_and_its_effect() -> None:
    old = config()
    new = config(limits__max_streams=4, server__port=7000, sessions__lifetime="2h", log__level="debug")
    assert [each.as_dict() for each in changes_between(old, new)] == [
        {"key": "server.port", "old": "7443", "new": "7000", "effect": "restart"},
        {"key": "sessions.lifetime", "old": '"24h"', "new": '"2h"', "effect": "new sessions"},
        {"key": "limits.max_streams", "old": "128", "new": "4", "effect": "new connections"},
        {"key": "log.level", "old": '"info"', "new": '"debug"', "effect": "live"},
    ]
    force = effective(old, new)
    assert (force.server.port, force.limits.max_streams, force.log.level) == (7443, 4, "debug")
    assert [each.key for each in changes_between(force, new)] == ["server.port"]


def test_fixed_keys_are_kept_until_a_restart() -> None:
    old, new = config(), config(log__level="debug", limits__max_streams=4)
    fixed = frozenset({"log.level"})
    assert [each.effect for each in changes_between(old, new, fixed)] == [
        Effect.NEW_CONNECTIONS,
        Effect.RESTART,
    ]
    assert effective(old, new, fixed).log.level == "info"


@pytest.mark.parametrize(
    "settings",
    [
        {"store__url": "valkey://user:hunter2@store.example"},
        {"alerts__webhook": "https://hooks.example/hunter2"},
        {"alerts__command": ["/bin/tell", "--password", "hunter2"]},
    ],
)
def test_possible_secrets_are_not_shown(settings: dict[str, Any]) -> None:
    (change,) = changes_between(config(), config(**settings))
    assert change.key == next(iter(settings)).replace("__", ".")
    assert "hunter2" not in str(change.as_dict())


def test_long_value_is_truncated() -> None:
    (change,) = changes_between(
        config(), config(certificates__names=[f"host-{n}.example" for n in range(90)])
    )
    assert len(change.new) == MAX_SHOWN + 3


def test_client_files_wait_for_client_auth() -> None:
    """With client_auth off they would be refused in the file, so they must not become active before it."""
    old = config()
    new = config(tls__client_auth="optional", tls__client_ca_file="/etc/ca.pem")
    assert {each.key: each.effect for each in changes_between(old, new)} == {
        "tls.client_auth": Effect.RESTART,
        "tls.client_ca_file": Effect.RESTART,
    }
    assert effective(old, new) == old
    on = config(tls__client_auth="optional")
    assert effective(on, new).tls.client_ca_file == Path("/etc/ca.pem")


def test_guide_lists_every_key_that_takes_a_restart() -> None:
    """By itself, or with all others of its section."""
    guide = (Path(__file__).parents[2] / "docs" / "control.md").read_text(encoding="utf-8")
    (row,) = [line for line in guide.splitlines() if line.startswith("| after a restart")]
    sections = {key.partition(".")[0] for key in TAKES_EFFECT}
    whole = {
        section
        for section in sections
        if all(
            effect is Effect.RESTART for key, effect in TAKES_EFFECT.items() if key.startswith(f"{section}.")
        )
    }
    for key, effect in TAKES_EFFECT.items():
        section = key.partition(".")[0]
        named = f"`{key}`" in row or (section in whole and f"`[{section}]`" in row)
        assert named == (effect is Effect.RESTART), key


def test_value_is_found_by_its_key() -> None:
    assert value_of(config(), "server.port") == 7443
