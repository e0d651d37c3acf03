"""The wording of faults."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.config.helpers import faults, load
from zcproto.config.types import MAX_FAULTS

PIN = "sha256/" + "A" * 43 + "="

UNKNOWN = [
    ("[server]\nprot = 7443", "server.prot = 7443 (config.toml): unknown key; did you mean server.port?"),
    (
        "[server]\nmax_connections = 5",
        "server.max_connections = 5 (config.toml): unknown key; did you mean limits.max_connections?",
    ),
    (
        '[server]\nidle_timeout = "5m"',
        'server.idle_timeout = "5m" (config.toml): unknown key;'
        " did you mean sessions.idle_timeout or limits.idle_timeout?",
    ),
    (
        "[server]\nmax_streems = 5",
        "server.max_streems = 5 (config.toml): unknown key; did you mean limits.max_streams?",
    ),
    (
        "[server]\nzzz = 1",
        "server.zzz = 1 (config.toml): unknown key;"
        " [server] has host, port, drain_timeout, lifespan_timeout, upgrade_timeout, workers, hang_timeout,"
        " proxy_protocol_from",
    ),
    ("[sever]\nport = 1", "[sever] (config.toml): unknown section; did you mean [server]?"),
    (
        "[zzz]",
        "[zzz] (config.toml): unknown section;"
        " there are server, tls, certificates, acme, sessions, store, idempotency, freshness, limits, streams,"
        " calls, http, auth, alerts, log, telemetry",
    ),
    ("port = 7443", "port = 7443 (config.toml): must be in a section; did you mean server.port?"),
    (
        "zzz = 7443",
        "zzz = 7443 (config.toml): must be in a section;"
        " the sections are server, tls, certificates, acme, sessions, store, idempotency, freshness, limits,"
        " streams, calls, http, auth, alerts, log, telemetry",
    ),
    ("server = 5", "server = 5 (config.toml): is a section: write [server], and its keys below it"),
    (
        "[[server]]",
        "server = [(a table)] (config.toml): is a section: write [server], and its keys below it",
    ),
    (
        "[server.port]\nx = 1",
        "server.port = (a table) (config.toml): must be a whole number from 1 to 65535, or 0 for any free port",
    ),
    (
        "[alerts]\nwebhooks = 1",
        "alerts.webhooks = 1 (config.toml): unknown key; did you mean alerts.webhook?",
    ),
    (
        "[certificates]\nsites = 1",
        "certificates.sites = 1 (config.toml): unknown key; did you mean certificates.site?",
    ),
    (
        '[certificates]\nclient_ca = "/ca.pem"',
        'certificates.client_ca = "/ca.pem" (config.toml): unknown key; did you mean tls.client_ca_file?',
    ),
    (
        "[certificates]\nkey_passphrase = 1",
        "certificates.key_passphrase = (hidden) (config.toml): unknown key; did you mean"
        " certificates.key_passphrase_file or certificates.key_passphrase_variable?",
    ),
    (
        "[certificates]\nrenew = 1",
        "certificates.renew = 1 (config.toml): unknown key;"
        " did you mean certificates.renew_before or certificates.renew_key?",
    ),
    (
        '[tls]\nclient_ca = "/ca.pem"',
        'tls.client_ca = "/ca.pem" (config.toml): unknown key; did you mean tls.client_ca_file?',
    ),
]


@pytest.mark.requirement("configuration")
@pytest.mark.parametrize(("toml", "fault"), UNKNOWN)
def test_unknown_name_is_reported_with_the_nearest_one(home: Path, toml: str, fault: str) -> None:
    assert faults(home, toml) == [fault]


@pytest.mark.parametrize(
    ("variable", "fault"),
    [
        ("ZCPROTO_SERVER__PROT", "server.prot = 1 (…): unknown key; did you mean server.port?"),
        ("ZCPROTO_SEVER__PORT", "sever.port = 1 (…): unknown section; did you mean server.port?"),
        ("ZCPROTO_ZZZ__PORT", "zzz.port = 1 (…): unknown section; did you mean server.port?"),
        (
            "ZCPROTO_ZZZ__ZZZ",
            "zzz.zzz = 1 (…): unknown section;"
            " there are server, tls, certificates, acme, sessions, store, idempotency, freshness, limits, streams,"
            " calls, http, auth, alerts, log, telemetry",
        ),
        ("ZCPROTO_SERVER_PORT", "server.port = 1 (…): two underscores must follow the section"),
        ("ZCPROTO_HTTP__METRIC", "http.metric = 1 (…): unknown key; did you mean http.metrics?"),
        (
            "ZCPROTO_SERVER__",
            "server. = 1 (…): unknown key;"
            " [server] has host, port, drain_timeout, lifespan_timeout, upgrade_timeout, workers,"
            " hang_timeout, proxy_protocol_from",
        ),
    ],
)
def test_variable_of_an_unknown_key_is_a_fault(home: Path, variable: str, fault: str) -> None:
    assert faults(home, environ={variable: "1"}) == [fault.replace("…", variable).replace("= 1", '= "1"')]


def test_override_of_an_unknown_key_is_a_fault(home: Path) -> None:
    assert faults(home, overrides={"server.prot": 1}) == [
        "server.prot = 1 (command line): unknown key; did you mean server.port?"
    ]


@pytest.mark.requirement("configuration")
@pytest.mark.parametrize(
    ("toml", "fault"),
    [
        (
            "[server]\nport = 70000",
            "server.port = 70000 (config.toml): must be a whole number from 1 to 65535, or 0 for any free port",
        ),
        (
            '[server]\nport = "7443"',
            'server.port = "7443" (config.toml): must be a whole number from 1 to 65535, or 0 for any free port',
        ),
        (
            "[freshness]\ntolerance = 30",
            'freshness.tolerance = 30 (config.toml): must be text with a unit (ms, s, m, h, d), from "1s" to "10m"',
        ),
        (
            '[freshness]\ntolerance = "1h"',
            'freshness.tolerance = "1h" (config.toml): must be'
            ' text with a unit (ms, s, m, h, d), from "1s" to "10m"',
        ),
        ("[sessions]\nrefresh = 1", "sessions.refresh = 1 (config.toml): must be true or false"),
        (
            "[sessions]\nwhen_full = true",
            'sessions.when_full = true (config.toml): must be "evict_disconnected", "evict_oldest" or "refuse"',
        ),
        (
            "[log]\nlevel = 1979-05-27",
            'log.level = 1979-05-27 (config.toml): must be "debug", "info", "warning" or "error"',
        ),
    ],
)
def test_invalid_value_is_reported_with_what_would_be_right(home: Path, toml: str, fault: str) -> None:
    assert faults(home, toml) == [fault]


def test_source_of_an_invalid_value_is_named(home: Path) -> None:
    (fault,) = faults(home, "[server]\nport = 1", {"ZCPROTO_SERVER__PORT": "70000"})
    assert fault.startswith(
        "server.port = 70000 (ZCPROTO_SERVER__PORT): must be a whole number from 1 to 65535"
    )
    (fault,) = faults(home, overrides={"server.port": 70_000})
    assert fault.startswith("server.port = 70000 (command line): must be")


@pytest.mark.parametrize(
    ("toml", "fault"),
    [
        (
            "[limits]\nmax_frame_bytes = 2048",
            "limits.max_frame_bytes_before_session = 16384 (default): must be at most limits.max_frame_bytes,"
            " which is 2048 (config.toml)",
        ),
        (
            '[sessions]\nlifetime = "31d"',
            'sessions.lifetime = "31d" (config.toml): must, while sessions.refresh is true, be at most'
            ' sessions.refresh_lifetime, which is "30d" (default)',
        ),
        (
            '[certificates]\nmode = "files"',
            'certificates.certificate = [] (default): must not be empty with certificates.mode, which is "files"'
            " (config.toml); name the files of the certificates to serve",
        ),
        (
            '[certificates]\nmode = "files"\ncertificate = ["/a.pem", "/b.pem"]\nkey = ["/a.key"]',
            'certificates.key = ["/a.key"] (config.toml): must be empty, if the files of certificates hold the'
            ' keys too, or have as many paths as certificates.certificate, which is ["/a.pem", "/b.pem"]'
            " (config.toml)",
        ),
        (
            '[certificates]\ncertificate = ["/a.pem"]',
            'certificates.certificate = ["/a.pem"] (config.toml): must be empty with certificates.mode, which is'
            ' "own" (default); set mode = "files" to serve it, or list its names in'
            " [[certificates.site]]",
        ),
        (
            '[certificates]\nmode = "acme"\nnames = ["*.a.example"]\n[acme]\nterms_agreed = true',
            'certificates.names = ["*.a.example"] (config.toml): must hold the names of this server on the'
            ' internet, without a wildcard, with certificates.mode, which is "acme" (config.toml); a wildcard'
            " needs the challenge dns-01: get it with another tool",
        ),
        (
            '[certificates]\nmode = "acme"\n[acme]\nterms_agreed = true',
            "certificates.names = [] (default): must hold the names of this server on the internet, without a"
            ' wildcard, with certificates.mode, which is "acme" (config.toml); a wildcard needs the challenge'
            " dns-01: get it with another tool",
        ),
        (
            '[certificates]\nmode = "acme"\nnames = ["a.example"]',
            'acme.terms_agreed = false (default): must be true with certificates.mode, which is "acme"'
            " (config.toml); read the terms of the CA and agree to them",
        ),
        (
            '[acme]\nchallenge = "http-01"',
            'acme.challenge = "http-01" (config.toml): must be "tls-alpn-01" with http.redirect_port, which is 0'
            " (default); set the port on which the CA checks the names",
        ),
        (
            '[acme]\neab_kid = "kid"',
            'acme.eab_kid = "kid" (config.toml): must be set together with acme.eab_key_file, which is ""'
            " (default); the CA gives both, or none",
        ),
        (
            '[tls]\nclient_ca_file = "/ca.pem"',
            'tls.client_ca_file = "/ca.pem" (config.toml): must be empty with tls.client_auth, which is "off"'
            ' (default); set client_auth = "optional" or "required" to check clients with it',
        ),
        (
            '[certificates]\nmode = "files"\ncertificate = ["/a.pem"]\n'
            'key_passphrase_file = "/hunter2"\nkey_passphrase_variable = "hunter2"',
            "certificates.key_passphrase_file = (hidden) (config.toml): must be empty, since the passphrase comes"
            " from one place, with certificates.key_passphrase_variable, which is (hidden) (config.toml)",
        ),
    ],
)
def test_contradicting_settings_are_reported(home: Path, toml: str, fault: str) -> None:
    assert faults(home, toml) == [fault]


@pytest.mark.parametrize(
    "toml",
    [
        "[limits]\nmax_frame_bytes = 16384",
        '[certificates]\nlifetime = "20d"',
        '[sessions]\nlifetime = "31d"\nrefresh = false',
        '[sessions]\nlifetime = "30d"',
        '[certificates]\nlifetime = "397d"',
        '[certificates]\nlifetime = "1m"\nrenew_before = "1s"\nrenew_key = true',
        '[certificates]\nmode = "files"\ncertificate = ["/a.pem"]\nkey = ["/a.pem"]',
        '[certificates]\nmode = "files"\ncertificate = ["/a.pem", "/b.pem"]\nkey = ["/a.key", "/b.key"]',
        '[certificates]\nmode = "files"\ncertificate = ["/a.pem", "/b.pem"]\nkey = []',
        f'[tls]\nclient_auth = "optional"\nclient_crl_file = "/a.crl"\nclient_pins = ["{PIN}"]',
        '[tls]\nclient_auth = "required"\nclient_ca_file = "/ca.pem"\nclient_name = "email"',
        '[tls]\nclient_name = "uri"',
        *(f'[tls]\nclient_auth = "{value}"' for value in ("off", "optional", "required")),
    ],
)
def test_settings_at_their_limits_are_valid(home: Path, toml: str) -> None:
    load(home, toml)


@pytest.mark.requirement("configuration")
def test_all_faults_are_reported_at_once(home: Path) -> None:
    toml = """
        port = 3
        [server]
        prot = 7443
        port = 70000
        [sever]
        [htttp]
        [certificates]
        mode = "files"
        [[certificates.site]]
        names = ["a_b"]
        certificate = ["/a.pem"]
        [[certificates.site]]
        names = ["c.example"]
        key = ["c.key"]
        [limits]
        max_frame_bytes = "many"
        [sessions]
        lifetime = "31d"
    """
    reported = faults(
        home, toml, {"ZCPROTO_TLS__SUITE": "x", "ZCPROTO_LOG__LEVEL": "loud"}, {"limits.max_streams": 0}
    )
    assert [fault.split(" ")[0] for fault in reported] == [
        "port",
        "server.prot",
        "[sever]",
        "[htttp]",
        "tls.suite",
        "server.port",
        "certificates.site[0].names[0]",
        "certificates.site[1].certificate",
        "certificates.site[1].key",
        "limits.max_frame_bytes",
        "limits.max_streams",
        "log.level",
        "sessions.lifetime",
        "certificates.certificate",
    ]


SITE = '[[certificates.site]]\nnames = ["{}"]\ncertificate = ["/a.pem"]\n'
NAME = (
    'a DNS name of letters, digits and hyphens, such as "a.example.com", or "*.example.com", where any one label'
    " may stand for the star"
)
PATHS = 'a list of 1 to 2 different values, each an absolute path, such as "/var/lib/zcproto" or "~/zcproto"'
TABLES = "must be up to 100 tables, each under a line [[certificates.site]]"


@pytest.mark.parametrize(
    ("toml", "reported"),
    [
        ("[certificates.site]\nnames = []", [f"certificates.site = (a table) (config.toml): {TABLES}"]),
        ("[certificates]\nsite = 5", [f"certificates.site = 5 (config.toml): {TABLES}"]),
        (
            "[certificates]\nsite = [5]",
            ["certificates.site[0] = 5 (config.toml): must be a table under a line [[certificates.site]]"],
        ),
        (
            "[[certificates.site]]",
            [
                "certificates.site[0].names = (nothing) (config.toml):"
                f" must be a list of 1 to 100 different values, each {NAME}",
                f"certificates.site[0].certificate = (nothing) (config.toml): must be {PATHS}",
            ],
        ),
        (
            SITE.format("a.example") + 'certificates = ["/a.pem"]\nfrob = 1',
            [
                'certificates.site[0].certificates = ["/a.pem"] (config.toml): unknown key;'
                " did you mean certificate?",
                "certificates.site[0].frob = 1 (config.toml): unknown key; [[certificates.site]] has"
                " names, certificate, key, key_passphrase_file, key_passphrase_variable",
            ],
        ),
        (
            SITE.format("a.example") + SITE.format('b.example", "b_c", "10.0.0.1", "B.example'),
            [
                f'certificates.site[1].names[1] = "b_c" (config.toml): must be {NAME}',
                f'certificates.site[1].names[2] = "10.0.0.1" (config.toml): must be {NAME}',
                'certificates.site[1].names[3] = "B.example" (config.toml): is the same as [0];'
                " each may appear once",
            ],
        ),
        (
            SITE.format('a.example", "b.example') + SITE.format("c_d") + SITE.format("B.EXAMPLE."),
            [
                f'certificates.site[1].names[0] = "c_d" (config.toml): must be {NAME}',
                'certificates.site[2].names[0] = "b.example" (config.toml): is a name of certificates.site[0]'
                " too; a name is served by one site",
            ],
        ),
        (
            SITE.format("a.example") + 'key = ["/a.key", "/b.key"]\nkey_passphrase_file = "/p"\n'
            'key_passphrase_variable = "P"',
            [
                'certificates.site[0].key = ["/a.key", "/b.key"] (config.toml): must be empty, if the files of'
                " certificates hold the keys too, or have as many paths as certificate",
                "certificates.site[0].key_passphrase_file = (hidden) (config.toml): must be empty, since the"
                " passphrase comes from one place, with key_passphrase_variable",
            ],
        ),
        (
            SITE.format("a.example").replace("/a.pem", "a.pem"),
            [f'certificates.site[0].certificate = ["a.pem"] (config.toml): must be {PATHS}'],
        ),
    ],
)
def test_fault_of_a_site_has_its_place(home: Path, toml: str, reported: list[str]) -> None:
    assert faults(home, toml) == reported


def test_invalid_pin_has_its_place(home: Path) -> None:
    (fault,) = faults(home, f'[tls]\nclient_auth = "required"\nclient_pins = ["{PIN}", "{PIN[:-1]}"]')
    assert fault.startswith('tls.client_pins[1] = "sha256/AAAA')
    assert '(config.toml): must be "sha256/" and 44 characters of base64, for a public key, or' in fault


@pytest.mark.parametrize("name", ["SITE", "SITE__0__NAMES"])
def test_sites_cannot_be_set_by_a_variable(home: Path, name: str) -> None:
    variable = f"ZCPROTO_CERTIFICATES__{name}"
    assert faults(home, environ={variable: "[]"}) == [
        f'certificates.{name.lower()} = "[]" ({variable}): cannot be set by a variable;'
        " write [[certificates.site]] tables in the file"
    ]


def test_variable_below_a_plain_key_is_unknown(home: Path) -> None:
    (fault,) = faults(home, environ={"ZCPROTO_SERVER__PORT__X": "1"})
    assert fault.endswith("unknown key; did you mean server.port?")


@pytest.mark.parametrize("key", ["certificate", "key", "key_passphrase_file", "key_passphrase_variable"])
def test_settings_unused_by_managed_certificates_are_refused(home: Path, key: str) -> None:
    value = '"PASSPHRASE"' if key.endswith("variable") else '"/a"' if key.endswith("file") else '["/a"]'
    (fault,) = faults(home, f"[certificates]\n{key} = {value}")
    assert fault.startswith(f"certificates.{key} = ")
    assert 'must be empty with certificates.mode, which is "own" (default)' in fault


@pytest.mark.parametrize("key", ["client_ca_file", "client_crl_file", "client_pins"])
def test_client_checks_are_refused_without_client_auth(home: Path, key: str) -> None:
    value = f'["{PIN}"]' if key == "client_pins" else '"/a"'
    (fault,) = faults(home, f'[tls]\n{key} = {value}\nclient_auth = "off"')
    assert 'must be empty with tls.client_auth, which is "off" (config.toml)' in fault


def test_invalid_value_is_not_compared_with_other_settings(home: Path) -> None:
    for other in (512, 67_108_864):
        (fault,) = faults(home, f"[limits]\nmax_frame_bytes = 1\nmax_frame_bytes_before_session = {other}")
        assert fault.startswith("limits.max_frame_bytes = 1 ")


def test_number_of_reported_faults_is_limited(home: Path) -> None:
    reported = faults(home, "[server]\n" + "\n".join(f"k{number} = 1" for number in range(20_000)))
    assert len(reported) == MAX_FAULTS + 1
    assert reported[-1] == "and more; the first 100 are shown"


@pytest.mark.parametrize(
    "sites",
    [
        "[[certificates.site]]\n" + "\n".join(f"k{number} = 1" for number in range(20_000)),
        "[[certificates.site]]\n" * 100,
        f"[certificates]\nsite = [{'5, ' * 100}]\n[server]\nport = -1",
    ],
)
def test_number_of_reported_faults_of_sites_is_limited(home: Path, sites: str) -> None:
    reported = faults(home, sites)
    assert len(reported) == MAX_FAULTS + 1
    assert reported[-1] == "and more; the first 100 are shown"


def test_a_hundred_faults_are_all_reported(home: Path) -> None:
    reported = faults(home, "[server]\nport = 1\n" + "\n".join(f"k{number} = 1" for number in range(100)))
    assert len(reported) == MAX_FAULTS
    assert reported[-1].startswith("server.k99 = 1 ")


@pytest.mark.parametrize(
    "toml",
    [
        '[server]\napi_key = "hunter2"',
        '[server]\ntoken = "hunter2"',
        '[server]\nkeys = ["hunter2"]',
        '[server]\ndb-password = "hunter2"',
        '[store]\nurl = "redis:/user:hunter2@cache"',
        '[store]\nurl = "http://user:hunter2@cache"',
        '[store]\nurl = "redis://user:hunter2@cache\u0007"',
        '[store]\nurl = "redis://user:hunter2@cache\\n"',
        '[store]\nurl = ["redis://user:hunter2@cache"]',
        '[store]\nuri = "redis://user:hunter2@cache"',
        '[alerts]\nwebhook_secret = "hunter2"',
        '[alerts]\nwebhook = "https://example.com/hunter2#"',
        '[alerts]\nwebhook = "http://example.com/hunter2"',
        '[alerts]\nwebhook = "https://ada:hunter2@example.com/"',
        '[alerts]\nwebhook = "http://localhost/hunter2"\nwebhook_ca_file = "/ca.pem"',
        'passphrase = "hunter2"',
        '[server.host]\nx = "hunter2"',
        '[zzz]\nx = "hunter2"',
        '[certificates]\nkey_passphrase_variable = "hunter2"',
        '[certificates]\nkey_passphrase_variable = "hunter2 "',
        '[certificates]\nkey_passphrase_file = "hunter2"',
        '[certificates]\nkey_passphrase = "hunter2"',
        '[certificates]\nkey = "-----BEGIN PRIVATE KEY-----\\nhunter2"',
        '[certificates]\nkey = ["-----BEGIN PRIVATE KEY-----\\nhunter2"]',
        '[[certificates.site]]\nkey = ["-----BEGIN PRIVATE KEY-----\\nhunter2"]',
        '[[certificates.site]]\nkey_passphrase_variable = "hunter2 "',
        '[[certificates.site]]\nkey_passphrase_file = "hunter2"',
        '[[certificates.site]]\npassphrase = "hunter2"',
        '[[certificates.site]]\nkeys = ["hunter2"]',
    ],
)
def test_secret_is_never_reported(home: Path, toml: str) -> None:
    assert "hunter2" not in str(faults(home, toml))


def test_secret_in_a_variable_is_never_reported(home: Path) -> None:
    environ = {
        "ZCPROTO_STORE__URL": "valkey://:hunter2@cache",
        "ZCPROTO_ALERTS__WEBHOOK_SECRET": "hunter2",
        "ZCPROTO_CERTIFICATES__KEY_PASSPHRASE": "hunter2",
        "ZCPROTO_CERTIFICATES__KEY_PASSPHRASE_VARIABLE": "ZCPROTO_hunter2",
        "ZCPROTO_CERTIFICATES__SITE__0__KEY_PASSPHRASE_FILE": "hunter2",
    }
    assert "hunter2" not in str(faults(home, environ=environ))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ('"' + "x" * 1000 + '"', '"' + "x" * 56 + "..."),
        ("[" + "1, " * 999 + "1]", "[" + "1, " * 18 + "1," + "..."),
        ("0x" + "f" * 10_000, "(a huge number)"),
        ("[[[[1]]]]", "[[[...]]]"),
        ('"a\\u001b[31m\\u2028\\n\\"b"', '"a\\x1b[31m\\u2028\\n\\"b"'),
        ("true", "true"),
        ("1.5", "1.5"),
        ("nan", "nan"),
    ],
)
def test_value_is_shown_truncated_on_one_line(home: Path, value: str, shown: str) -> None:
    (fault,) = faults(home, f"[log]\nlevel = {value}")
    assert fault.split(" = ", 1)[1].split(" (config.toml)")[0] == shown


def test_key_is_shown_truncated_on_one_line(home: Path) -> None:
    (fault,) = faults(home, '[server]\n"' + "\\u001b\\n" * 500 + '" = 1')
    assert "\n" not in fault
    assert "\x1b" not in fault
    assert len(fault) < 500


def test_undecodable_name_of_a_variable_is_escaped(home: Path) -> None:
    (fault,) = faults(home, environ={os.fsdecode(b"ZCPROTO_SERVER__\xff"): "1"})
    assert "\\udcff" in fault
