from __future__ import annotations

import re
from pathlib import Path

import tomli

from zcproto.config import AuthConfig, Config, SiteConfig, config_as_toml, default_config_file, load_config
from zcproto.config.checks import split_key
from zcproto.config.model import descriptions, keys, settings
from zcproto.config.types import settings_of


def read(home: Path, toml: str) -> Config:
    (home / "config.toml").write_text(toml)
    return load_config(None, home=home, environ={})


def test_written_settings_are_read_as_the_same(tmp_path: Path) -> None:
    toml = """
        [server]
        host = ["::", "127.0.0.1"]
        port = 0
        [certificates]
        directory = '/a b/"c"\\d'
        names = ["*.example.com"]
        certificate = ["/a.pem", "/b.pem"]
        mode = "files"
        announce_key = "3d"
        key_passphrase_variable = "PASSPHRASE"
        [tls]
        client_auth = "optional"
        client_ca_file = "/ca.pem"
        client_pins = ["sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="]
        [[certificates.site]]
        names = ["a.example", "*.A.example"]
        certificate = ["/a.pem"]
        [[certificates.site]]
        names = ["b.example"]
        certificate = ["/b \\"c\\".pem", "/c.pem"]
        key = ["/b.key", "/c.key"]
        key_passphrase_file = "/b.pass"
        [sessions]
        idle_timeout = "off"
        refresh = false
        [store]
        timeout = "1500ms"
        [[auth.role]]
        name = "billing"
        allow = ["invoice.*"]
        deny = ["invoice.delete", "server.*"]
        [[auth.role]]
        name = "guest"
        [log]
        file = "/var/log/zcproto.log"
    """
    config = read(tmp_path, toml)
    assert read(tmp_path, config_as_toml(config)) == config


def test_durations_are_written_as_text(tmp_path: Path) -> None:
    shown = tomli.loads(config_as_toml(load_config(None, home=tmp_path, environ={})))
    assert shown["sessions"]["lifetime"] == "24h"
    assert shown["store"]["timeout"] == "250ms"


def test_all_keys_are_written(tmp_path: Path) -> None:
    shown = tomli.loads(config_as_toml(load_config(None, home=tmp_path, environ={})))
    assert [f"{section}.{name}" for section, table in shown.items() for name in table] == list(settings())


def test_default_file_changes_nothing(tmp_path: Path) -> None:
    defaults = load_config(None, home=tmp_path, environ={})
    assert read(tmp_path, default_config_file(tmp_path)) == defaults


def test_sites_are_written_as_tables(tmp_path: Path) -> None:
    toml = """
        [[certificates.site]]
        names = ["a.example"]
        certificate = ["/a.pem"]
        [[certificates.site]]
        names = ["b.example"]
        certificate = ["/b.pem"]
        key_passphrase_variable = "B_PASSPHRASE"
    """
    shown = config_as_toml(read(tmp_path, toml))
    assert (
        """
[[certificates.site]]
names = ["a.example"]
certificate = ["/a.pem"]
key = []
key_passphrase_file = ""
key_passphrase_variable = ""

[[certificates.site]]
names = ["b.example"]
certificate = ["/b.pem"]
key = []
key_passphrase_file = ""
key_passphrase_variable = "B_PASSPHRASE"

[acme]
"""
        in shown
    )


def test_sites_can_be_written_on_one_line(tmp_path: Path) -> None:
    sites = (
        SiteConfig(names=("a.example",), certificate=(Path("/a.pem"),), key=(Path('/a "b".key'),)),
        SiteConfig(names=("b.example", "*.b.example"), certificate=(Path("/b.pem"),)),
    )
    line = f"[certificates]\nsite = {settings()['certificates.site'].write(sites)}"
    assert read(tmp_path, line).certificates.site == sites


TABLES = {key: split_key(key) for key, accepts in settings().items() if accepts.tables is not None}


def uncommented(home: Path) -> str:
    return re.sub(r"^#(?! )", "", default_config_file(home), flags=re.MULTILINE)


def test_each_key_of_the_default_file_can_be_uncommented(tmp_path: Path) -> None:
    tables = tomli.loads(uncommented(tmp_path))
    assert [f"{s}.{name}" for s, table in tables.items() for name in table] == list(settings())
    of_tables = [(key, tables[section][name][0]) for key, (section, name) in TABLES.items()]
    assert {f"{key}.{name}" for key, table in of_tables for name in table} == keys() - set(settings())
    defaults = load_config(None, home=tmp_path, environ={})
    config = read(tmp_path, uncommented(tmp_path))
    assert config.certificates.site[0].names == ("a.example.com", "*.a.example.com")
    without = config.certificates.model_copy(update={"site": ()})
    assert config.model_copy(update={"certificates": without, "auth": AuthConfig()}) == defaults


def test_default_file_documents_each_key(tmp_path: Path) -> None:
    text = default_config_file(tmp_path)
    words = " ".join(line.removeprefix("# ") for line in text.splitlines())
    for key, accepts in settings().items():
        line = f"#[[{key}]]" if key in TABLES else f"#{split_key(key)[1]} = "
        assert f"Must be {accepts.words}. {line}" in words
    for key in TABLES:
        model = settings()[key].tables
        assert model is not None
        for name, accepts in settings_of(model).items():
            assert f"{descriptions(model)[name]} Must be {accepts.words}. #{name} = " in words


def test_default_file_fits_a_screen(tmp_path: Path) -> None:
    lines = default_config_file(tmp_path).splitlines()
    assert max(len(line) for line in lines if line.startswith("# ")) <= 102
