from __future__ import annotations

import base64
import string
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError, create_model

from zcproto.certs.names import check_name
from zcproto.config.types import (
    BINDING,
    CERTIFICATE_NAME,
    COMMAND,
    FILE_PATH,
    FLAG,
    HOST_NAME,
    NETWORK,
    PIN,
    SITE_NAME,
    STORE_URL,
    VARIABLE_NAME,
    WEBHOOK_URL,
    Accepts,
    Fault,
    duration,
    each_of,
    format_duration,
    list_of,
    one_of,
    optional,
    parse_duration,
    whole,
)
from zcproto.errors import TlsError
from zcproto.tls.pins import parse_pins

BASE64 = string.ascii_letters + string.digits + "+/"
DIGEST = "A" * 43 + "="


def accept(kind: Accepts, value: object) -> Any:
    return TypeAdapter(Annotated[Any, kind]).validate_python(value)


def errors(kind: Accepts, value: object, *, in_file: bool = False) -> list[Any]:
    """Return the errors of a field with this type."""
    model = create_model("Section", field=(Annotated[Any, kind], ...))
    try:
        model.model_validate({"field": value}, context={"text_fields": {"field"} if in_file else ()})
    except ValidationError as error:
        return list(error.errors())
    return []


LONGEST = ".".join(["a" * 63] * 3 + ["b" * 61])

OPTIONAL_PATH = optional(FILE_PATH)
TWO_OF_THREE = list_of(one_of("a", "b", "c"), 1, 2)
HOSTS = list_of(HOST_NAME, 1, 16, bare=True)


@pytest.mark.parametrize(
    ("kind", "value", "result"),
    [
        (whole(1, 9), 1, 1),
        (whole(1, 9), 9, 9),
        (whole(1, 9, "none"), 0, 0),
        (FLAG, True, True),
        (FLAG, False, False),
        (one_of("a", "b"), "b", "b"),
        (duration("1s", "1m"), "1s", 1.0),
        (duration("1s", "1m"), "60s", 60.0),
        (duration("1s", "1m"), 2, 2.0),
        (duration("1s", "1m"), 2.5, 2.5),
        (duration("1s", "1m", off=True), "off", None),
        (duration("1s", "1m", off=True), None, None),
        (HOST_NAME, "127.0.0.1", "127.0.0.1"),
        (HOST_NAME, "::", "::"),
        (HOST_NAME, "fe80::1%eth0", "fe80::1%eth0"),
        (HOST_NAME, "server.example.com", "server.example.com"),
        (NETWORK, "10.0.0.0/8", "10.0.0.0/8"),
        (NETWORK, "192.0.2.1", "192.0.2.1"),
        (NETWORK, "2001:db8::/32", "2001:db8::/32"),
        (NETWORK, "0.0.0.0/0", "0.0.0.0/0"),
        (NETWORK, "ffff:" * 6 + "255.255.255.255/128", "ffff:" * 6 + "255.255.255.255/128"),
        (CERTIFICATE_NAME, "server.example.com", "server.example.com"),
        (CERTIFICATE_NAME, "*.example.com", "*.example.com"),
        (CERTIFICATE_NAME, "bücher.example", "bücher.example"),
        (CERTIFICATE_NAME, "example.com.", "example.com."),
        (CERTIFICATE_NAME, "2001:db8::1", "2001:db8::1"),
        (SITE_NAME, "a.example.com", "a.example.com"),
        (SITE_NAME, "A.Example.COM.", "a.example.com"),
        (SITE_NAME, "*.Example.com", "*.example.com"),
        (SITE_NAME, "localhost", "localhost"),
        (SITE_NAME, "xn--bcher-kva.example", "xn--bcher-kva.example"),
        (SITE_NAME, "1.2.3.4.example", "1.2.3.4.example"),
        (SITE_NAME, f"{LONGEST}.", LONGEST),
        (PIN, f"sha256/{DIGEST}", f"sha256/{DIGEST}"),
        (PIN, f"cert-sha256/{DIGEST}", f"cert-sha256/{DIGEST}"),
        (VARIABLE_NAME, "", None),
        (VARIABLE_NAME, None, None),
        (VARIABLE_NAME, "_key_2", "_key_2"),
        (VARIABLE_NAME, "A" * 128, "A" * 128),
        (VARIABLE_NAME, "ZCPROTOTYPE", "ZCPROTOTYPE"),
        (FILE_PATH, "/var/lib/zcproto", Path("/var/lib/zcproto")),
        (FILE_PATH, Path("/var/lib"), Path("/var/lib")),
        (OPTIONAL_PATH, "", None),
        (OPTIONAL_PATH, None, None),
        (STORE_URL, "memory", "memory"),
        (STORE_URL, "sqlite", "sqlite"),
        (STORE_URL, "valkey+sentinel://a,b/service", "valkey+sentinel://a,b/service"),
        (STORE_URL, "rediss+cluster://a:1,b:2", "rediss+cluster://a:1,b:2"),
        (STORE_URL, "unix:///run/valkey.sock", "unix:///run/valkey.sock"),
        (STORE_URL, "rediss://cache:6380/0", "rediss://cache:6380/0"),
        (BINDING, "off", "off"),
        (BINDING, "exact", "exact"),
        (BINDING, "24", "24"),
        (WEBHOOK_URL, "", ""),
        (WEBHOOK_URL, "https://alerts.example.com", "https://alerts.example.com"),
        (WEBHOOK_URL, "https://192.0.2.1:8443/a?b=c&d", "https://192.0.2.1:8443/a?b=c&d"),
        (WEBHOOK_URL, "https://[2001:db8::1]/a", "https://[2001:db8::1]/a"),
        (WEBHOOK_URL, "http://localhost:9000/", "http://localhost:9000/"),
        (WEBHOOK_URL, "http://127.8.9.1/", "http://127.8.9.1/"),
        (WEBHOOK_URL, "http://[::1]:9000/", "http://[::1]:9000/"),
        (COMMAND, [], ()),
        (COMMAND, ["/bin/mail", "-s", "-s", "", 'a, "b"'], ("/bin/mail", "-s", "-s", "", 'a, "b"')),
        (TWO_OF_THREE, ["a", "c"], ("a", "c")),
        (TWO_OF_THREE, ("c",), ("c",)),
        (HOSTS, "::", ("::",)),
        (HOSTS, ["::1", "127.0.0.1"], ("::1", "127.0.0.1")),
    ],
)
def test_valid_value_is_accepted(kind: Accepts, value: object, result: object) -> None:
    assert accept(kind, value) == result
    assert type(accept(kind, value)) is type(result)
    assert accept(kind, result) == result, "a type accepts its own result"


WRONG: list[tuple[Accepts, list[object]]] = [
    (
        WEBHOOK_URL,
        [
            *(
                "alerts.example.com",
                "ftp://a",
                "https://",
                "https:///a",
                "https://a b",
                "https://a/\n",
                1,
                None,
                [],
            ),
            *(
                "https://u:p@a/",
                "https://u@a/",
                "https://a/#b",
                "https://a:0/",
                "https://a:x/",
                "https://[::1",
            ),
            *("https://a:65536/", "https://a/ü", "https://-a/", f"https://a/{'b' * 2_000}", "HTTPS://a/"),
            *(
                "http://a/",
                "http://192.0.2.1/",
                "http://localhost.example.com/",
                "http://0.0.0.0/",
                "https://a/b#",
            ),
        ],
    ),
    (
        COMMAND,
        [
            "/bin/true",
            ["mail"],
            ["./mail"],
            [""],
            [1],
            ["/a", None],
            ["/a\n"],
            ["/a", "b" * 4_097],
            ["/a"] * 65,
            None,
        ],
    ),
    (whole(1, 9), [0, 10, -1, 1.0, "1", True, None, [1], 10**100]),
    (whole(1, 9, "none"), [-1, 10, False]),
    (FLAG, [0, 1, "true", None, []]),
    (one_of("a", "b"), ["c", "", "A", 1, None, ["a"], {}]),
    (
        duration("1s", "1m"),
        ["999ms", "61s", "1", "off", "", True, None, [], 0.5, 61, float("nan"), float("inf")],
    ),
    (HOST_NAME, ["", "a b", "a\n", "-a", "http://a", "a/b", "a" * 254, 1, None, "::g", "fe80::1%\n"]),
    (
        NETWORK,
        [
            *(
                "",
                "10.0.0.1/8",
                "10.0.0.0/33",
                "10.0.0.0/-1",
                "10/8",
                "a.example",
                "2001:db8::1/32",
                "::/129",
            ),
            *(
                "fe80::1%eth0",
                "10.0.0.0/8\n",
                " 10.0.0.0/8",
                "1" * 100_000,
                1,
                None,
                ["10.0.0.0/8"],
                "\u0661.0.0.0",
            ),
        ],
    ),
    (
        CERTIFICATE_NAME,
        ["", "a b", "a..b", "*", "*.", "a.*.b", "-", "http://a", "a_b", "a" * 255, 1, "a\n.b", "."],
    ),
    (
        FILE_PATH,
        [
            "",
            "relative",
            "./x",
            "~unknown-user/x",
            "/a\n",
            "/a\x00",
            "/" + "a" * 4096,
            1,
            None,
            Path("x"),
        ],
    ),
    (
        SITE_NAME,
        [
            *(
                "",
                ".",
                "a..b",
                ".a",
                "a b",
                "a_b",
                "-a.b",
                "a-.b",
                "a.b\n",
                "bücher.example",
                "http://a",
                "a/b",
            ),
            *("*", "*.com", "*.", "a.*.b", "*a.example.com", "**.example.com", "*.*.example.com"),
            *("127.0.0.1", "a.1", "a.0x1f", "1", "::1", "[::1]", "2001:db8::1", "1.2.3.4."),
            *(f"{LONGEST}c", f"a.{'b' * 64}", "a" * 100_000, 1, None, ["a.example"], b"a.example"),
        ],
    ),
    (
        PIN,
        [
            *(
                "",
                DIGEST,
                "sha256/",
                f"SHA256/{DIGEST}",
                f"sha1/{DIGEST}",
                f"sha256/{DIGEST}\n",
                f" sha256/{DIGEST}",
            ),
            *(
                f"sha256/{DIGEST[:-1]}",
                f"sha256/{'A' * 42}B=",
                f"sha256/{'A' * 42}-=",
                f"sha256/{'A' * 46}==",
            ),
            *(1, None, f"sha256/{DIGEST}".encode()),
        ],
    ),
    (VARIABLE_NAME, ["1A", "A-B", "A B", "A=B", "A\n", "A" * 129, "Ä", "ZCPROTO_KEY", 1, ["A"]]),
    (STORE_URL, ["", "mysql://x", "redis://", "memory ", 1, None, "redis:///" + "x" * 1001]),
    (STORE_URL, ["redis+unix+cluster://x", "valkeys+unix://x", "redis://a\nb", "sqlite://x", "redis:/x"]),
    (BINDING, ["", "0", "129", "on", "exactly", 24, None]),
    (TWO_OF_THREE, [[], ["a", "b", "c"], ["a", "a"], ["d"], "a", None, {"a": 1}, [["a"]]]),
    (HOSTS, [[], "", [""], ["::", "::"], ["::"] * 17, 1]),
]


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in WRONG for value in values])
def test_invalid_value_is_refused_with_what_would_be_right(kind: Accepts, value: object) -> None:
    (error,) = errors(kind, value)
    assert error["msg"] == f"must be {kind.words}"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            whole(1, 65_535, "any free port"),
            "a whole number from 1 to 65535, or 0 for any free port",
        ),
        (whole(1, 9), "a whole number from 1 to 9"),
        (one_of("a"), '"a"'),
        (one_of("a", "b", "c"), '"a", "b" or "c"'),
        (duration("1s", "10m"), 'text with a unit (ms, s, m, h, d), from "1s" to "10m"'),
        (
            duration("1s", "1m", off=True),
            'text with a unit (ms, s, m, h, d), from "1s" to "1m", or "off"',
        ),
        (
            list_of(whole(1, 9), 0, 3),
            "a list of up to 3 different values, each a whole number from 1 to 9",
        ),
        (
            list_of(whole(1, 9), 1, 3),
            "a list of 1 to 3 different values, each a whole number from 1 to 9",
        ),
        (
            list_of(whole(1, 9), 1, 3, bare=True),
            "a whole number from 1 to 9, or a list of up to 3 of them, all different",
        ),
    ],
)
def test_valid_values_are_described_in_words(kind: Accepts, words: str) -> None:
    assert kind.words == words


@pytest.mark.parametrize("value", [30, 30.0, True])
def test_duration_in_a_file_needs_a_unit(value: object) -> None:
    kind = duration("1s", "1m")
    (error,) = errors(kind, value, in_file=True)
    assert error["msg"] == f"must be {kind.words}"
    assert not errors(kind, "30s", in_file=True)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (whole(1, 9), "7443", 7443),
        (whole(1, 9), " -1 ", -1),
        (whole(1, 9), "7x", "7x"),
        (whole(1, 9), "1_000", "1_000"),
        (whole(1, 9), "9" * 5000, "9" * 5000),
        (FLAG, "true", True),
        (FLAG, "FALSE", False),
        (FLAG, "yes", "yes"),
        (one_of("a"), "a", "a"),
        (TWO_OF_THREE, "a, b", ["a", "b"]),
        (TWO_OF_THREE, '["a", "b"]', ["a", "b"]),
        (TWO_OF_THREE, '["a", "b"', '["a", "b"'),
        (TWO_OF_THREE, "[" * 5000, "[" * 5000),
        (TWO_OF_THREE, "", []),
        (list_of(whole(1, 9), 0, 3), "3,1", [3, 1]),
        (list_of(whole(1, 9), 0, 3), " [3, 1]", [3, 1]),
    ],
)
def test_text_of_a_variable_becomes_a_value_of_the_type(kind: Accepts, text: str, value: object) -> None:
    assert kind.from_variable(text) == value


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (whole(1, 9), 3, "3"),
        (FLAG, True, "true"),
        (FLAG, False, "false"),
        (one_of("a"), "a", '"a"'),
        (duration("1s", "1m"), 30.0, '"30s"'),
        (duration("1s", "1m", off=True), None, '"off"'),
        (FILE_PATH, Path('/a"b\\c'), '"/a\\"b\\\\c"'),
        (OPTIONAL_PATH, None, '""'),
        (VARIABLE_NAME, None, '""'),
        (VARIABLE_NAME, "A_B", '"A_B"'),
        (TWO_OF_THREE, ("a", "b"), '["a", "b"]'),
        (HOSTS, ("::",), '"::"'),
        (HOSTS, ("::", "::1"), '["::", "::1"]'),
    ],
)
def test_value_is_written_as_toml(kind: Accepts, value: Any, text: str) -> None:
    assert kind.write(value) == text


def test_tilde_is_the_home_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    assert accept(FILE_PATH, "~/x") == Path("/home/alice/x")


def test_long_list_reports_each_fault_with_its_place() -> None:
    kind = each_of(whole(1, 9), 0, 5)
    (error,) = errors(kind, [1, 0, 1, "x"])
    assert error["ctx"]["error"].faults == [
        Fault("[1]", 0, "must be a whole number from 1 to 9"),
        Fault("[2]", 1, "is the same as [0]; each may appear once"),
        Fault("[3]", "x", "must be a whole number from 1 to 9"),
    ]
    (error,) = errors(kind, [1] * 6)
    assert error["ctx"]["error"].faults == [Fault("", [1] * 6, f"must be {kind.words}")]
    assert accept(kind, [3, 1]) == (3, 1)


def tls_accepts(pin: str) -> bool:
    try:
        parse_pins([pin])
    except TlsError:
        return False
    return True


def config_accepts(pin: str) -> bool:
    return not errors(PIN, pin)


@given(
    st.sampled_from(["sha256/", "cert-sha256/", "sha1/", ""]),
    st.binary(min_size=31, max_size=33).map(lambda digest: base64.b64encode(digest).decode())
    | st.text("AB+/-=08\n", min_size=43, max_size=45)
    | st.sampled_from(BASE64).map(lambda last: "A" * 42 + last + "="),
)
def test_pin_is_accepted_if_the_tls_endpoint_accepts_it(prefix: str, digest: str) -> None:
    assert config_accepts(prefix + digest) == tls_accepts(prefix + digest)


LABELS = st.sampled_from(["a", "B", "*", "xn--a", "-a", "a_b", "1", "0x1f", "", "ü", "a" * 63, "a" * 64])


@given(st.lists(LABELS, min_size=1, max_size=5).map(".".join))
def test_every_site_name_is_a_valid_certificate_name(name: str) -> None:
    if not errors(SITE_NAME, name):
        assert accept(SITE_NAME, name) == check_name(name)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0),
        ("500ms", 0.5),
        ("10s", 10),
        ("5m", 300),
        ("24h", 86_400),
        ("30d", 2_592_000),
        ("1h30m", 5_400),
        ("1d2h3m4s5ms", 93_784.005),
        ("0.5s", 0.5),
        ("1.5h", 5_400),
        ("0.1s", 0.1),
        ("90m", 5_400),
    ],
)
def test_duration_is_parsed(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "5", "s", "5 s", " 5s", "5s ", "5s\n", "-5s", "+5s", "1e3s", ".5s", "5.s", "5S", "5w", "5sec", "30m1h",
     "1s1s", "1m1m", "1ms1s", "9999999999999s", "inf", "nans", "off", "\u0665s"],
)  # fmt: skip
def test_any_other_text_is_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (1.5, "1500ms"),
        (86_400, "24h"),
        (172_800, "2d"),
        (129_600, "36h"),
        (5_400, "90m"),
    ],
)
def test_duration_is_written_in_one_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 365 * 86_400_000))
def test_written_duration_is_parsed_to_the_same_value(ms: int) -> None:
    assert parse_duration(format_duration(ms / 1000)) == ms / 1000
