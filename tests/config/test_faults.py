"""The words in which faults are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zcproto.config.load import MAX_FAULTS

from .helpers import faults, load

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
        "server.zzz = 1 (config.toml): unknown key; [server] has host, port, drain_timeout",
    ),
    ("[sever]\nport = 1", "[sever] (config.toml): unknown section; did you mean [server]?"),
    (
        "[zzz]",
        "[zzz] (config.toml): unknown section;"
        " there are server, tls, certificates, sessions, store, freshness, limits, log",
    ),
    ("port = 7443", "port = 7443 (config.toml): stands in no section; did you mean server.port?"),
    (
        "zzz = 7443",
        "zzz = 7443 (config.toml): stands in no section;"
        " the sections are server, tls, certificates, sessions, store, freshness, limits, log",
    ),
    ("server = 5", "server = 5 (config.toml): is a section: write [server], and its keys below that"),
    (
        "[[server]]",
        "server = [(a table)] (config.toml): is a section: write [server], and its keys below that",
    ),
    (
        "[server.port]\nx = 1",
        "server.port = (a table) (config.toml): must be a whole number from 1 to 65535, or 0 for any free port",
    ),
    (
        "[http]\nenabled = false",
        "[http] (config.toml): not in this version; remove the section; the server speaks zcp/1 alone",
    ),
    (
        "[alerts]",
        "[alerts] (config.toml): not in this version;"
        " remove the section; what would be an alert is in the log, see [log]",
    ),
    (
        "[[certificates.site]]",
        "certificates.site = [(a table)] (config.toml): not in this version;"
        " use certificates.names: one certificate with all the names",
    ),
]


@pytest.mark.parametrize(("toml", "fault"), UNKNOWN)
def test_what_does_not_exist_is_told_with_the_nearest_name(home: Path, toml: str, fault: str) -> None:
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
            " there are server, tls, certificates, sessions, store, freshness, limits, log",
        ),
        ("ZCPROTO_SERVER_PORT", "server.port = 1 (…): two underscores must follow the section"),
        (
            "ZCPROTO_HTTP__ENABLED",
            "http.enabled = 1 (…): not in this version; remove the section; the server speaks zcp/1 alone",
        ),
        ("ZCPROTO_SERVER__", "server. = 1 (…): unknown key; [server] has host, port, drain_timeout"),
    ],
)
def test_a_variable_that_names_no_key_is_a_fault(home: Path, variable: str, fault: str) -> None:
    assert faults(home, environ={variable: "1"}) == [fault.replace("…", variable).replace("= 1", '= "1"')]


def test_an_override_that_names_no_key_is_a_fault(home: Path) -> None:
    assert faults(home, overrides={"server.prot": 1}) == [
        "server.prot = 1 (command line): unknown key; did you mean server.port?"
    ]


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
            'sessions.when_full = true (config.toml): must be "refuse" or "evict_oldest"',
        ),
        (
            "[log]\nlevel = 1979-05-27",
            'log.level = 1979-05-27 (config.toml): must be "debug", "info", "warning" or "error"',
        ),
    ],
)
def test_a_wrong_value_is_told_with_what_would_be_right(home: Path, toml: str, fault: str) -> None:
    assert faults(home, toml) == [fault]


def test_the_source_of_a_wrong_value_is_named(home: Path) -> None:
    (fault,) = faults(home, "[server]\nport = 1", {"ZCPROTO_SERVER__PORT": "70000"})
    assert fault.startswith(
        "server.port = 70000 (ZCPROTO_SERVER__PORT): must be a whole number from 1 to 65535"
    )
    (fault,) = faults(home, overrides={"server.port": 70_000})
    assert fault.startswith("server.port = 70000 (command line): must be")


@pytest.mark.parametrize(
    ("toml", "use"),
    [
        ('[tls]\nclient_auth = "required"', 'use "off"'),
        ('[certificates]\nmode = "files"', 'use "own"'),
        ('[certificates]\ncertificate = ["/a.crt"]', "leave it empty"),
        ('[certificates]\nkey = ["/a.key"]', "leave it empty"),
        ('[store]\nurl = "sqlite"', 'use "memory"'),
        ('[store]\nurl = "valkey://cache"', 'use "memory"'),
        ('[sessions]\nbind_address = "exact"', 'use "off"'),
        ('[sessions]\nbind_address = "24"', 'use "off"'),
        ("[sessions]\nbind_client = true", "use false"),
    ],
)
def test_a_value_of_a_later_version_is_refused_with_what_can_be_used(home: Path, toml: str, use: str) -> None:
    (fault,) = faults(home, toml)
    assert f"not in this version; {use}" in fault


@pytest.mark.parametrize(
    ("toml", "fault"),
    [
        (
            "[limits]\nmax_frame_bytes = 2048",
            "limits.max_frame_bytes_before_session = 16384 (default): must be at most limits.max_frame_bytes,"
            " which is 2048 (config.toml)",
        ),
        (
            '[certificates]\nlifetime = "720h"',
            'certificates.renew_before = "30d" (default): must be less than certificates.lifetime,'
            ' which is "30d" (config.toml)',
        ),
        (
            '[sessions]\nlifetime = "31d"',
            'sessions.lifetime = "31d" (config.toml): must, while sessions.refresh is true, be at most'
            ' sessions.refresh_lifetime, which is "30d" (default)',
        ),
    ],
)
def test_settings_that_do_not_fit_each_other_are_told(home: Path, toml: str, fault: str) -> None:
    assert faults(home, toml) == [fault]


@pytest.mark.parametrize(
    "toml",
    [
        "[limits]\nmax_frame_bytes = 16384",
        '[certificates]\nlifetime = "30d"\nrenew_before = "719h"',
        '[sessions]\nlifetime = "31d"\nrefresh = false',
        '[sessions]\nlifetime = "30d"',
        '[certificates]\nlifetime = "397d"',
    ],
)
def test_settings_at_the_edge_of_what_fits_are_sound(home: Path, toml: str) -> None:
    load(home, toml)


def test_all_faults_are_told_at_once(home: Path) -> None:
    toml = """
        port = 3
        [server]
        prot = 7443
        port = 70000
        [sever]
        [http]
        [certificates]
        lifetime = "20d"
        mode = "files"
        [limits]
        max_frame_bytes = "many"
    """
    told = faults(
        home, toml, {"ZCPROTO_TLS__SUITE": "x", "ZCPROTO_LOG__LEVEL": "loud"}, {"limits.max_streams": 0}
    )
    assert [fault.split(" ")[0] for fault in told] == [
        "port",
        "server.prot",
        "[sever]",
        "[http]",
        "tls.suite",
        "server.port",
        "certificates.mode",
        "limits.max_frame_bytes",
        "limits.max_streams",
        "log.level",
        "certificates.renew_before",
    ]


def test_a_pair_is_not_measured_by_a_value_that_is_wrong_itself(home: Path) -> None:
    (fault,) = faults(home, "[limits]\nmax_frame_bytes = 1")
    assert fault.startswith("limits.max_frame_bytes = 1 ")


def test_no_more_faults_are_told_than_anyone_reads(home: Path) -> None:
    told = faults(home, "[server]\n" + "\n".join(f"k{number} = 1" for number in range(20_000)))
    assert len(told) == MAX_FAULTS + 1
    assert told[-1] == "and more; the first 100 are shown"


@pytest.mark.parametrize(
    "toml",
    [
        '[server]\napi_key = "hunter2"',
        '[server]\ntoken = "hunter2"',
        '[server]\nkeys = ["hunter2"]',
        '[server]\ndb-password = "hunter2"',
        '[store]\nurl = "redis://user:hunter2@cache"',
        '[store]\nurl = ["redis://user:hunter2@cache"]',
        '[store]\nuri = "redis://user:hunter2@cache"',
        '[alerts]\nwebhook_secret = "hunter2"',
        'passphrase = "hunter2"',
        '[server.host]\nx = "hunter2"',
        '[zzz]\nx = "hunter2"',
    ],
)
def test_a_secret_is_never_told(home: Path, toml: str) -> None:
    assert "hunter2" not in str(faults(home, toml))


def test_a_secret_in_a_variable_is_never_told(home: Path) -> None:
    environ = {"ZCPROTO_STORE__URL": "valkey://:hunter2@cache", "ZCPROTO_ALERTS__WEBHOOK_SECRET": "hunter2"}
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
def test_a_value_is_shown_in_bounds_on_one_line(home: Path, value: str, shown: str) -> None:
    (fault,) = faults(home, f"[log]\nlevel = {value}")
    assert fault.split(" = ", 1)[1].split(" (config.toml)")[0] == shown


def test_a_key_is_shown_in_bounds_on_one_line(home: Path) -> None:
    (fault,) = faults(home, '[server]\n"' + "\\u001b\\n" * 500 + '" = 1')
    assert "\n" not in fault
    assert "\x1b" not in fault
    assert len(fault) < 500


def test_an_undecodable_name_of_a_variable_is_shown_escaped(home: Path) -> None:
    (fault,) = faults(home, environ={os.fsdecode(b"ZCPROTO_SERVER__\xff"): "1"})
    assert "\\udcff" in fault
