from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from zcproto.config import AuthConfig, Config, OidcConfig, RoleConfig
from zcproto.config.checks import CHECKS, SITE_CHECKS, split_key, value_of
from zcproto.config.model import (
    AlertsConfig,
    CertificatesConfig,
    LimitsConfig,
    SiteConfig,
    StoreConfig,
    descriptions,
    keys,
    sections,
    settings,
)
from zcproto.config.types import settings_of

DEFAULTS = {
    "server.host": ("127.0.0.1",),
    "server.port": 7443,
    "server.drain_timeout": 30.0,
    "server.lifespan_timeout": 30.0,
    "server.upgrade_timeout": 60.0,
    "server.hang_timeout": 30.0,
    "server.workers": 1,
    "server.proxy_protocol_from": (),
    "tls.handshake_timeout": 5.0,
    "tls.max_handshakes": 256,
    "tls.max_pending": 4096,
    "tls.client_auth": "off",
    "tls.client_ca_file": None,
    "tls.client_crl_file": None,
    "tls.client_pins": (),
    "tls.client_name": "dns",
    "acme.directory": "https://acme-v02.api.letsencrypt.org/directory",
    "acme.terms_agreed": False,
    "acme.contact": (),
    "acme.challenge": "tls-alpn-01",
    "acme.ca_file": None,
    "acme.eab_kid": "",
    "acme.eab_key_file": None,
    "certificates.directory": Path("/home/alice/.zeroclaw/certs"),
    "certificates.mode": "own",
    "certificates.key_types": ("rsa-4096", "ecdsa-p256"),
    "certificates.names": (),
    "certificates.lifetime": 7_776_000.0,
    "certificates.renew_before": 2_592_000.0,
    "certificates.renew_key": False,
    "certificates.repair": True,
    "certificates.announce_key": 604_800.0,
    "certificates.certificate": (),
    "certificates.key": (),
    "certificates.key_passphrase_file": None,
    "certificates.key_passphrase_variable": None,
    "certificates.watch_interval": 0.25,
    "certificates.alert_days": (30, 14, 7, 3, 1),
    "certificates.site": (),
    "sessions.lifetime": 86_400.0,
    "sessions.idle_timeout": 3_600.0,
    "sessions.per_user": 5,
    "sessions.when_full": "evict_disconnected",
    "sessions.refresh": True,
    "sessions.refresh_lifetime": 2_592_000.0,
    "sessions.refresh_grace": 10.0,
    "sessions.open_timeout": 10.0,
    "sessions.bind_address": "off",
    "sessions.bind_client": False,
    "store.url": "sqlite",
    "store.password_file": None,
    "store.ca_file": None,
    "store.certificate_file": None,
    "store.key_file": None,
    "store.timeout": 0.25,
    "store.grace": 300.0,
    "idempotency.keep": 600.0,
    "idempotency.max_bytes": 67_108_864,
    "idempotency.per_user": 10_000,
    "idempotency.running_per_user": 256,
    "freshness.tolerance": 30.0,
    "streams.max_open": 64,
    "streams.max_item_bytes": 65_536,
    "streams.window_items": 32,
    "streams.window_bytes": 65_536,
    "streams.memory_bytes": 67_108_864,
    "streams.stall_timeout": 300.0,
    "streams.durable_per_user": 16,
    "streams.durable_bytes": 268_435_456,
    "streams.durable_keep": 900.0,
    "streams.durable_abandon_after": 900.0,
    "streams.durable_drain": 300.0,
    "calls.max": 32,
    "calls.per_user": 256,
    "calls.total": 16_384,
    "calls.pending_per_user": 256,
    "calls.pending_total": 16_384,
    "limits.max_connections": 20_000,
    "limits.connections_per_address": 1_000,
    "limits.failed_handshakes_per_network": 200,
    "limits.max_frame_bytes": 1_048_576,
    "limits.max_frame_bytes_before_session": 16_384,
    "limits.partial_frame_bytes": 50_331_648,
    "limits.partial_frame_bytes_per_user": 16_777_216,
    "limits.max_streams": 128,
    "limits.idle_timeout": 300.0,
    "limits.frame_timeout": 300.0,
    "limits.write_buffer_bytes": 1_048_576,
    "limits.write_timeout": 20.0,
    "limits.requests_per_user": 0,
    "limits.requests_per_address": 0,
    "limits.public_requests_per_address": 1000,
    "limits.running_per_user": 0,
    "limits.running_per_address": 0,
    "limits.threads": 16,
    "limits.waiting_for_thread": 64,
    "limits.login_failures": 5,
    "limits.login_timeout": 8.0,
    "limits.logins_pending": 1024,
    "http.enabled": True,
    "http.metrics": "session",
    "http.allow": ("127.0.0.1/32", "::1/128"),
    "http.redirect_port": 0,
    "auth.role": (),
    "auth.oidc": (),
    "alerts.webhook": "",
    "alerts.webhook_secret_file": None,
    "alerts.webhook_ca_file": None,
    "alerts.command": (),
    "alerts.repeat": 86_400.0,
    "alerts.tls_failures": 100,
    "alerts.throttled_logins": 100,
    "alerts.internal_errors": 10,
    "alerts.stale_frames": 100,
    "alerts.revocation_rate": 100,
    "alerts.refused_connections": 10,
    "alerts.revocations": "operators",
    "log.level": "info",
    "log.format": "auto",
    "log.exceptions": "full",
    "log.file": None,
    "log.audit_file": None,
    "telemetry.traces": False,
    "telemetry.metrics": False,
    "telemetry.logs": False,
    "telemetry.endpoint": "",
    "telemetry.headers_file": None,
    "telemetry.ca_file": None,
    "telemetry.service_name": "",
    "telemetry.sample_ratio": 1.0,
    "telemetry.trust": "sessions",
    "telemetry.metrics_interval": 60.0,
}


@pytest.mark.requirement("key_size", "expiration", "per_user")
def test_each_key_has_its_documented_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    config = Config()
    assert {key: value_of(config, key) for key in settings()} == DEFAULTS


@pytest.mark.parametrize("key", [key for key in DEFAULTS if key != "certificates.directory"])
def test_each_default_is_valid(key: str) -> None:
    section, name = split_key(key)
    validated = sections()[section].model_validate({name: DEFAULTS[key]})
    assert getattr(validated, name) == DEFAULTS[key]


@pytest.mark.parametrize("key", DEFAULTS)
def test_each_key_is_described(key: str) -> None:
    section, name = split_key(key)
    description = descriptions(sections()[section])[name]
    assert description.endswith(".")


@pytest.mark.parametrize("key", DEFAULTS)
def test_each_key_has_words_for_what_it_accepts(key: str) -> None:
    assert settings()[key].words


def test_settings_can_be_created_in_python() -> None:
    config = Config(limits=LimitsConfig(idle_timeout=2.5, max_streams=3))
    assert (config.limits.idle_timeout, config.limits.max_streams) == (2.5, 3)


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().server.port = 1
    with pytest.raises(ValidationError):
        Config().server = Config().server


def test_invalid_value_in_python_is_refused_and_not_shown() -> None:
    with pytest.raises(ValidationError, match="must be a whole number from 1 to 65535") as caught:
        LimitsConfig(max_streams=987_654_321)
    assert "987654321" not in str(caught.value)


def test_misspelt_key_in_python_is_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        LimitsConfig.model_validate({"max_stream": 1})


def test_contradicting_settings_in_python_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"lifetime must, .* be at most sessions\.refresh_lifetime"):
        Config.model_validate({"sessions": {"lifetime": "31d"}})


def test_keys_of_all_checks_exist() -> None:
    assert {key for check in CHECKS for key in check.keys} <= set(settings())
    assert {key for check in SITE_CHECKS for key in check.keys} <= set(settings_of(SiteConfig))


@pytest.mark.parametrize("name", settings_of(SiteConfig))
def test_each_key_of_a_site_is_described(name: str) -> None:
    description = descriptions(SiteConfig)[name]
    assert description.endswith(".")


def test_keys_of_tables_are_keys() -> None:
    models = {"certificates.site": SiteConfig, "auth.role": RoleConfig, "auth.oidc": OidcConfig}
    assert keys() - set(settings()) == {
        f"{key}.{name}" for key, model in models.items() for name in settings_of(model)
    }


A, B = Path("/a.pem"), Path("/b.pem")


def test_sites_can_be_created_in_python() -> None:
    site = SiteConfig(names=("A.example", "*.b.example."), certificate=(A,))
    made = CertificatesConfig(site=(site,))
    assert made.site == (site,)
    assert site.names == ("a.example", "*.b.example")
    assert made == CertificatesConfig.model_validate(
        {"site": [{"names": ["a.example", "*.b.example"], "certificate": ["/a.pem"]}]}
    )
    with pytest.raises(ValidationError):
        site.names = ("c.example",)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"key": (A, B)}, "key must be empty, if the files of certificates hold the keys too, or have"),
        (
            {"key_passphrase_file": A, "key_passphrase_variable": "PASSPHRASE"},
            "key_passphrase_file must be empty, since the passphrase comes from one place, with key_passphrase_var",
        ),
        ({"names": ()}, "must be a list of 1 to 100 different values"),
        ({"certificate": ()}, "must be a list of 1 to 2 different values"),
    ],
)
def test_invalid_site_in_python_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SiteConfig.model_validate({"names": ("a.example",), "certificate": (A,)} | fields)


def test_two_sites_with_one_name_in_python_are_refused() -> None:
    site = SiteConfig(names=("a.example",), certificate=(A,))
    with pytest.raises(ValidationError, match=r"\[1\]\.names\[0\] is a name of certificates\.site\[0\]"):
        CertificatesConfig(site=(site, site))


def test_repr_has_no_address_that_may_hold_a_secret() -> None:
    config = Config(
        certificates=CertificatesConfig(directory=Path("/certs")),
        store=StoreConfig(url="redis://ada:hunter2@localhost:6379/0"),
        alerts=AlertsConfig(webhook="https://hooks.example.com/hunter2"),
    )
    assert "hunter2" not in repr(config) + str(config)
    assert "port=7443" in repr(config)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "a b"}, "must be the name of a role"),
        ({"name": "a", "allow": ["A"]}, r"allow\[0\] must be the name of a method"),
        ({"name": "a", "allow": ["x.*y"]}, r"allow\[0\] must be the name of a method"),
        ({"name": "a", "deny": ["**"]}, r"deny\[0\] must be the name of a method"),
        ({"name": "a", "deny": [""]}, r"deny\[0\] must be the name of a method"),
        ({"name": "a", "deny": ["x", "x"]}, r"deny\[1\] is the same as"),
    ],
)
def test_invalid_role_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AuthConfig(role=(fields,))  # type: ignore[arg-type]


def test_two_tables_of_one_role_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"\[1\]\.name is the role of auth\.role\[0\] too"):
        AuthConfig(role=(RoleConfig(name="a"), RoleConfig(name="a")))
    assert AuthConfig(role=(RoleConfig(name="a", allow=("*", "x", "x.*")),)).role[0].allow == (
        "*",
        "x",
        "x.*",
    )
