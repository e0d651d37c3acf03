from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config.helpers import faults, load
from zcproto.config import Config, load_config
from zcproto.config.load import MAX_FILE_BYTES
from zcproto.config.model import SiteConfig
from zcproto.errors import ConfigError

DOCUMENTED = """
[server]
host = "127.0.0.1"            # "::" and lists too
port = 7443
drain_timeout = "30s"

[tls]
handshake_timeout = "5s"
max_handshakes = 256
client_auth = "off"

[certificates]
directory = "~/.zeroclaw/certs"
mode = "own"
key_types = ["rsa-4096", "ecdsa-p256"]
names = []
lifetime = "90d"
renew_before = "30d"
renew_key = false
repair = true
certificate = []
key = []
alert_days = [30, 14, 7, 3, 1]

[sessions]
lifetime = "24h"
idle_timeout = "1h"
per_user = 5
when_full = "evict_disconnected"
refresh = true
refresh_lifetime = "30d"
refresh_grace = "10s"
open_timeout = "10s"
bind_address = "off"
bind_client = false

[store]
url = "sqlite"
timeout = "250ms"
grace = "5m"

[freshness]
tolerance = "30s"

[limits]
max_connections = 20000
connections_per_address = 1000
max_frame_bytes = 1048576
max_frame_bytes_before_session = 16384
partial_frame_bytes = 50331648
partial_frame_bytes_per_user = 16777216
frame_timeout = "5m"
max_streams = 128
idle_timeout = "5m"
write_buffer_bytes = 1048576
write_timeout = "20s"
login_failures = 5

[log]
level = "info"
format = "auto"
file = ""
"""


def test_without_sources_all_values_are_defaults(home: Path) -> None:
    config = load(home)
    assert config == Config.model_validate({"certificates": {"directory": home / "certs"}})


def test_empty_file_is_valid(home: Path) -> None:
    assert load(home, "") == load(home)


def test_documented_file_is_valid_and_has_the_defaults(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    config = load(home, DOCUMENTED)
    assert config == Config()
    assert config.certificates.directory == Path("/home/alice/.zeroclaw/certs")


@pytest.mark.requirement("first_run")
def test_certificates_follow_the_home_folder(home: Path) -> None:
    assert load(home).certificates.directory == home / "certs"
    assert load(home, '[certificates]\ndirectory = "/etc/zcproto"').certificates.directory == Path(
        "/etc/zcproto"
    )


def test_named_file_replaces_the_one_in_the_home_folder(home: Path) -> None:
    (home / "config.toml").write_text("[server]\nport = 1")
    other = home / "other.toml"
    other.write_text("[server]\nport = 2")
    assert load_config(other, home=home, environ={}).server.port == 2


def test_missing_named_file_is_a_fault(home: Path) -> None:
    file = home / "other.toml"
    with pytest.raises(ConfigError) as refused:
        load_config(file, home=home, environ={})
    create = f"correct the path, or create it: zcproto --config {file} config init"
    assert refused.value.faults == [f"{file}: no such file; {create}"]


def test_command_line_overrides_environment_overrides_file(home: Path) -> None:
    toml = "[server]\nport = 1\n[limits]\nmax_streams = 1\nthreads = 9"
    environ = {"ZCPROTO_SERVER__PORT": "2", "ZCPROTO_LIMITS__MAX_STREAMS": "2"}
    config = load(home, toml, environ, {"server.port": 3})
    assert (config.server.port, config.limits.max_streams, config.limits.threads) == (3, 2, 9)


def test_missing_option_overrides_nothing(home: Path) -> None:
    assert load(home, "[server]\nport = 1", overrides={"server.port": None}).server.port == 1


def test_option_may_be_a_duration_in_seconds(home: Path) -> None:
    assert load(home, overrides={"server.drain_timeout": 2.5}).server.drain_timeout == 2.5
    assert load(home, overrides={"server.drain_timeout": "2s"}).server.drain_timeout == 2.0


def test_variables_can_hold_every_kind_of_value(home: Path) -> None:
    environ = {
        "ZCPROTO_SERVER__HOST": "::1, 127.0.0.1",
        "ZCPROTO_HTTP__ALLOW": '["10.0.0.0/8", "::1/128"]',
        "ZCPROTO_CERTIFICATES__ALERT_DAYS": "7,1",
        "ZCPROTO_CERTIFICATES__NAMES": "",
        "ZCPROTO_SESSIONS__IDLE_TIMEOUT": "off",
        "ZCPROTO_SESSIONS__REFRESH": "false",
        "ZCPROTO_CERTIFICATES__ANNOUNCE_KEY": "3d",
        "ZCPROTO_CERTIFICATES__MODE": "files",
        "ZCPROTO_CERTIFICATES__CERTIFICATE": "/a.pem, /b.pem",
        "ZCPROTO_CERTIFICATES__KEY_PASSPHRASE_VARIABLE": "PASSPHRASE",
        "ZCPROTO_TLS__CLIENT_AUTH": "required",
        "ZCPROTO_LOG__FILE": "/var/log/zcproto.log",
        "ZCPROTO_HOME": "/elsewhere",
        "ZCPROTO_DEBUG": "1",
        "ZCPROTO_BENCH_ROUNDS": "3",
        "PATH": "/bin",
    }
    config = load(home, environ=environ)
    assert config.server.host == ("::1", "127.0.0.1")
    assert config.http.allow == ("10.0.0.0/8", "::1/128")
    assert config.certificates.alert_days == (7, 1)
    assert config.certificates.names == ()
    assert config.certificates.announce_key == 259_200.0
    assert config.certificates.mode == "files"
    assert config.certificates.certificate == (Path("/a.pem"), Path("/b.pem"))
    assert config.certificates.key_passphrase_variable == "PASSPHRASE"
    assert config.tls.client_auth == "required"
    assert config.sessions.idle_timeout is None
    assert config.sessions.refresh is False
    assert config.log.file == Path("/var/log/zcproto.log")


def test_sites_are_read_in_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    toml = """
        [[certificates.site]]
        names = ["A.example.", "*.b.EXAMPLE"]
        certificate = ["~/a.pem"]
        [[certificates.site]]
        names = ["c.example"]
        certificate = ["/c.pem", "/d.pem"]
        key = ["/c.key", "/d.key"]
        key_passphrase_variable = "C_PASSPHRASE"
    """
    assert load(home, toml).certificates.site == (
        SiteConfig(names=("a.example", "*.b.example"), certificate=(Path("/home/alice/a.pem"),)),
        SiteConfig(
            names=("c.example",),
            certificate=(Path("/c.pem"), Path("/d.pem")),
            key=(Path("/c.key"), Path("/d.key")),
            key_passphrase_variable="C_PASSPHRASE",
        ),
    )


def test_sites_can_be_given_as_python_values(home: Path) -> None:
    site = SiteConfig(names=("a.example",), certificate=(Path("/a.pem"),))
    other = {"names": ["b.example"], "certificate": [Path("/b.pem")]}
    config = load(home, overrides={"certificates.site": [site, other]})
    assert config.certificates.site == (site, SiteConfig.model_validate(other))


def test_a_hundred_sites_with_a_hundred_names_are_valid(home: Path) -> None:
    toml = "".join(
        f"[[certificates.site]]\ncertificate = ['/{i}.pem']\nnames = {[f'{j}.{i}.example' for j in range(100)]}\n"
        for i in range(100)
    )
    assert len({name for site in load(home, toml).certificates.site for name in site.names}) == 10_000
    (fault,) = faults(home, toml + "[[certificates.site]]\nnames = ['a']\ncertificate = ['/a.pem']")
    assert fault.endswith("(config.toml): must be up to 100 tables, each under a line [[certificates.site]]")


@pytest.mark.parametrize(
    ("toml", "fault"),
    [
        ("[server]\nport = \n", "is not TOML: Invalid value (at line 2, column 8)"),
        (
            "[server\n",
            "is not TOML: Expected ']' at the end of a table declaration (at line 1, column 8)",
        ),
        ("[server]\nhost = [", "is not TOML: Invalid value (at line 2, column 9, the end of the file)"),
        (b"[server]\n# \xff", "is not UTF-8 text (line 2)"),
    ],
)
def test_malformed_toml_is_reported_with_line_column_and_cure(
    home: Path, toml: str | bytes, fault: str
) -> None:
    (found,) = faults(home, toml)
    assert found.startswith(f"{home}/config.toml: {fault}; correct this line, or ")


@pytest.mark.parametrize("toml", ["a = " + "[" * 50_000, "a = 1" + "0" * 5_000])
def test_extreme_toml_is_a_fault_without_a_crash(home: Path, toml: str) -> None:
    (fault,) = faults(home, toml)
    assert fault.startswith(f"{home}/config.toml: ")


def test_too_large_file_is_not_parsed(home: Path) -> None:
    load(home, "#" * MAX_FILE_BYTES)
    (fault,) = faults(home, "#" * (MAX_FILE_BYTES + 1))
    assert fault.endswith("config.toml: is larger than 1048576 bytes; check the path")


def test_folder_in_place_of_the_file_is_a_fault(home: Path) -> None:
    with pytest.raises(ConfigError, match="is not a regular file; check the path"):
        load_config(home, home=home, environ={})


@pytest.mark.parametrize("mode", [0o660, 0o606, 0o666])
def test_file_that_others_can_change_is_a_fault(home: Path, mode: int) -> None:
    load(home, "[server]\nport = 1\n")
    path = home / "config.toml"
    path.chmod(mode)
    fault = f"{path}: others can change this file (mode 0{mode:o}); run: chmod go-w {path}"
    assert faults(home) == [fault]
    path.chmod(0o644)
    assert load(home).server.port == 1


def test_file_in_a_folder_that_others_can_change_is_a_fault(home: Path) -> None:
    load(home, "[server]\nport = 1\n")
    home.chmod(0o777)
    assert faults(home) == [f"{home}: others can change this folder (mode 0777); run: chmod go-w {home}"]


def test_file_of_another_user_is_a_fault(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(home, "[server]\nport = 1\n")
    owner = home.stat().st_uid
    monkeypatch.setattr("zcproto.common.files.trusted_owners", lambda: {owner + 1})
    (fault,) = faults(home)
    assert f"belongs to another user (uid {owner}); run as that user" in fault


def test_home_that_is_a_file_is_a_fault(home: Path) -> None:
    (home / "file").touch()
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        load_config(None, home=home / "file", environ={})


KEYS = st.sampled_from(
    [
        *("server", "port", "tls", "host", "lifetime", "", "\n", "x" * 500, "http", "log"),
        *("certificates", "site", "names", "certificate", "key"),
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["1s", "off", "a.example", "/a.pem"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.builds("{}.{}".format, KEYS, KEYS) | KEYS, VALUES, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_yield_a_configuration_or_faults(tmp_path: Path, values: dict[str, Any]) -> None:
    reported: list[str] | None = None
    try:
        load_config(None, home=tmp_path, environ={}, overrides=values)
    except ConfigError as error:
        reported = error.faults
    assert reported is None or (reported and all(fault.isprintable() for fault in reported))


@given(st.binary(max_size=60))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_yields_a_configuration_or_faults(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(b"[server]\n" + data)
    reported: list[str] | None = None
    try:
        load_config(None, home=tmp_path, environ={})
    except ConfigError as error:
        reported = error.faults
    assert reported is None or (reported and all(fault.isprintable() for fault in reported))
