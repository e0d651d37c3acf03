from __future__ import annotations

import re
from pathlib import Path

import tomli

from zcproto.config import Config, config_as_toml, default_config_file, load_config
from zcproto.config.model import rules, split_key


def read(home: Path, toml: str) -> Config:
    (home / "config.toml").write_text(toml)
    return load_config(None, home=home, environ={})


def test_the_settings_in_force_are_read_again_as_the_same(tmp_path: Path) -> None:
    toml = """
        [server]
        host = ["::", "127.0.0.1"]
        port = 0
        [certificates]
        directory = '/a b/"c"\\d'
        names = ["*.example.com"]
        [sessions]
        idle_timeout = "off"
        refresh = false
        [store]
        timeout = "1500ms"
        [log]
        file = "/var/log/zcproto.log"
    """
    config = read(tmp_path, toml)
    assert read(tmp_path, config_as_toml(config)) == config


def test_durations_are_shown_as_text(tmp_path: Path) -> None:
    shown = tomli.loads(config_as_toml(load_config(None, home=tmp_path, environ={})))
    assert shown["sessions"]["lifetime"] == "24h"
    assert shown["store"]["timeout"] == "250ms"


def test_all_keys_are_shown(tmp_path: Path) -> None:
    shown = tomli.loads(config_as_toml(load_config(None, home=tmp_path, environ={})))
    assert [f"{section}.{name}" for section, table in shown.items() for name in table] == list(rules())


def test_the_file_to_begin_with_changes_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, default_config_file(tmp_path)) == load_config(None, home=tmp_path, environ={})


def test_each_key_of_the_file_to_begin_with_can_be_uncommented(tmp_path: Path) -> None:
    text = re.sub(r"^#(?! )", "", default_config_file(tmp_path), flags=re.MULTILINE)
    assert [f"{s}.{name}" for s, table in tomli.loads(text).items() for name in table] == list(rules())
    assert read(tmp_path, text) == load_config(None, home=tmp_path, environ={})


def test_the_file_to_begin_with_says_what_each_key_accepts_and_why(tmp_path: Path) -> None:
    text = default_config_file(tmp_path)
    words = " ".join(line.removeprefix("# ") for line in text.splitlines())
    for key, rule in rules().items():
        assert f"Must be {rule.range()}. #{split_key(key)[1]} = " in words


def test_the_file_to_begin_with_fits_a_screen(tmp_path: Path) -> None:
    lines = default_config_file(tmp_path).splitlines()
    assert max(len(line) for line in lines if line.startswith("# ")) <= 102
