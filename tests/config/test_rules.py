from __future__ import annotations

import base64
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcproto.certs.names import check_name
from zcproto.config.rules import (
    Arguments,
    Binding,
    CertificateName,
    Choice,
    Duration,
    FilePath,
    Flag,
    HostName,
    ListOf,
    NetworkAddress,
    Pin,
    Refusal,
    RefusedError,
    Rule,
    SiteName,
    StoreUrl,
    VariableName,
    WebhookUrl,
    Whole,
)
from zcproto.errors import TlsError
from zcproto.tls.pins import parse_pins

BASE64 = string.ascii_letters + string.digits + "+/"
DIGEST = "A" * 43 + "="
LONGEST = ".".join(["a" * 63] * 3 + ["b" * 61])

TWO_OF_THREE = ListOf(Choice(("a", "b", "c")), 1, 2)
HOSTS = ListOf(HostName(), 1, 16, bare=True)


@pytest.mark.parametrize(
    ("rule", "value", "result"),
    [
        (Whole(1, 9), 1, 1),
        (Whole(1, 9), 9, 9),
        (Whole(1, 9, "none"), 0, 0),
        (Flag(), True, True),
        (Flag(), False, False),
        (Choice(("a", "b")), "b", "b"),
        (Duration("1s", "1m"), "1s", 1.0),
        (Duration("1s", "1m"), "60s", 60.0),
        (Duration("1s", "1m"), 2, 2.0),
        (Duration("1s", "1m"), 2.5, 2.5),
        (Duration("1s", "1m", off=True), "off", None),
        (Duration("1s", "1m", off=True), None, None),
        (HostName(), "127.0.0.1", "127.0.0.1"),
        (HostName(), "::", "::"),
        (HostName(), "fe80::1%eth0", "fe80::1%eth0"),
        (HostName(), "server.example.com", "server.example.com"),
        (NetworkAddress(), "10.0.0.0/8", "10.0.0.0/8"),
        (NetworkAddress(), "192.0.2.1", "192.0.2.1"),
        (NetworkAddress(), "2001:db8::/32", "2001:db8::/32"),
        (NetworkAddress(), "0.0.0.0/0", "0.0.0.0/0"),
        (NetworkAddress(), "ffff:" * 6 + "255.255.255.255/128", "ffff:" * 6 + "255.255.255.255/128"),
        (CertificateName(), "server.example.com", "server.example.com"),
        (CertificateName(), "*.example.com", "*.example.com"),
        (CertificateName(), "bücher.example", "bücher.example"),
        (CertificateName(), "example.com.", "example.com."),
        (CertificateName(), "2001:db8::1", "2001:db8::1"),
        (SiteName(), "a.example.com", "a.example.com"),
        (SiteName(), "A.Example.COM.", "a.example.com"),
        (SiteName(), "*.Example.com", "*.example.com"),
        (SiteName(), "localhost", "localhost"),
        (SiteName(), "xn--bcher-kva.example", "xn--bcher-kva.example"),
        (SiteName(), "1.2.3.4.example", "1.2.3.4.example"),
        (SiteName(), f"{LONGEST}.", LONGEST),
        (Pin(), f"sha256/{DIGEST}", f"sha256/{DIGEST}"),
        (Pin(), f"cert-sha256/{DIGEST}", f"cert-sha256/{DIGEST}"),
        (VariableName(), "", None),
        (VariableName(), None, None),
        (VariableName(), "_key_2", "_key_2"),
        (VariableName(), "A" * 128, "A" * 128),
        (VariableName(), "ZCPROTOTYPE", "ZCPROTOTYPE"),
        (FilePath(), "/var/lib/zcproto", Path("/var/lib/zcproto")),
        (FilePath(), Path("/var/lib"), Path("/var/lib")),
        (FilePath(empty=True), "", None),
        (FilePath(empty=True), None, None),
        (StoreUrl(), "memory", "memory"),
        (StoreUrl(), "sqlite", "sqlite"),
        (StoreUrl(), "valkey+sentinel://a,b/service", "valkey+sentinel://a,b/service"),
        (StoreUrl(), "rediss+cluster://a:1,b:2", "rediss+cluster://a:1,b:2"),
        (StoreUrl(), "unix:///run/valkey.sock", "unix:///run/valkey.sock"),
        (StoreUrl(), "rediss://cache:6380/0", "rediss://cache:6380/0"),
        (Binding(), "off", "off"),
        (Binding(), "exact", "exact"),
        (Binding(), "24", "24"),
        (WebhookUrl(), "", ""),
        (WebhookUrl(), "https://alerts.example.com", "https://alerts.example.com"),
        (WebhookUrl(), "https://192.0.2.1:8443/a?b=c&d", "https://192.0.2.1:8443/a?b=c&d"),
        (WebhookUrl(), "https://[2001:db8::1]/a", "https://[2001:db8::1]/a"),
        (WebhookUrl(), "http://localhost:9000/", "http://localhost:9000/"),
        (WebhookUrl(), "http://127.8.9.1/", "http://127.8.9.1/"),
        (WebhookUrl(), "http://[::1]:9000/", "http://[::1]:9000/"),
        (Arguments(), [], ()),
        (Arguments(), ["/bin/mail", "-s", "-s", "", 'a, "b"'], ("/bin/mail", "-s", "-s", "", 'a, "b"')),
        (TWO_OF_THREE, ["a", "c"], ("a", "c")),
        (TWO_OF_THREE, ("c",), ("c",)),
        (HOSTS, "::", ("::",)),
        (HOSTS, ["::1", "127.0.0.1"], ("::1", "127.0.0.1")),
    ],
)
def test_a_right_value_is_accepted(rule: Rule, value: object, result: object) -> None:
    assert rule.accept(value) == result
    assert type(rule.accept(value)) is type(result)
    assert rule.accept(result) == result, "a rule accepts its own result"


WRONG: list[tuple[Rule, list[object]]] = [
    (
        WebhookUrl(),
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
        Arguments(),
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
    (Whole(1, 9), [0, 10, -1, 1.0, "1", True, None, [1], 10**100]),
    (Whole(1, 9, "none"), [-1, 10]),
    (Flag(), [0, 1, "true", None, []]),
    (Choice(("a", "b")), ["c", "", "A", 1, None, ["a"], {}]),
    (
        Duration("1s", "1m"),
        ["999ms", "61s", "1", "off", "", True, None, [], 0.5, 61, float("nan"), float("inf")],
    ),
    (HostName(), ["", "a b", "a\n", "-a", "http://a", "a/b", "a" * 254, 1, None, "::g", "fe80::1%\n"]),
    (
        NetworkAddress(),
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
        CertificateName(),
        ["", "a b", "a..b", "*", "*.", "a.*.b", "-", "http://a", "a_b", "a" * 255, 1, "a\n.b", "."],
    ),
    (
        FilePath(),
        [
            "",
            "relative",
            "./x",
            "~nobody-by-this-name/x",
            "/a\n",
            "/a\x00",
            "/" + "a" * 4096,
            1,
            None,
            Path("x"),
        ],
    ),
    (
        SiteName(),
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
        Pin(),
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
    (VariableName(), ["1A", "A-B", "A B", "A=B", "A\n", "A" * 129, "Ä", "ZCPROTO_KEY", 1, ["A"]]),
    (StoreUrl(), ["", "mysql://x", "redis://", "memory ", 1, None, "redis:///" + "x" * 1001]),
    (StoreUrl(), ["redis+unix+cluster://x", "valkeys+unix://x", "redis://a\nb", "sqlite://x", "redis:/x"]),
    (Binding(), ["", "0", "129", "on", "exactly", 24, None]),
    (TWO_OF_THREE, [[], ["a", "b", "c"], ["a", "a"], ["d"], "a", None, {"a": 1}, [["a"]]]),
    (HOSTS, [[], "", [""], ["::", "::"], ["::"] * 17, 1]),
]


@pytest.mark.parametrize(("rule", "value"), [(rule, value) for rule, values in WRONG for value in values])
def test_a_wrong_value_is_refused_with_what_would_be_right(rule: Rule, value: object) -> None:
    with pytest.raises(RefusedError) as caught:
        rule.accept(value)
    assert str(caught.value) == f"must be {rule.expects()}"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Whole(1, 65_535, "any free port"), "a whole number from 1 to 65535, or 0 for any free port"),
        (Whole(1, 9), "a whole number from 1 to 9"),
        (Choice(("a",)), '"a"'),
        (Choice(("a", "b", "c")), '"a", "b" or "c"'),
        (Duration("1s", "10m"), 'text with a unit (ms, s, m, h, d), from "1s" to "10m"'),
        (Duration("1s", "1m", off=True), 'text with a unit (ms, s, m, h, d), from "1s" to "1m", or "off"'),
        (ListOf(Whole(1, 9), 0, 3), "a list of up to 3 different values, each a whole number from 1 to 9"),
        (ListOf(Whole(1, 9), 1, 3), "a list of 1 to 3 different values, each a whole number from 1 to 9"),
        (
            ListOf(Whole(1, 9), 1, 3, bare=True),
            "a whole number from 1 to 9, or a list of up to 3 of them, all different",
        ),
    ],
)
def test_what_is_right_is_said_in_words(rule: Rule, words: str) -> None:
    assert rule.expects() == words


@pytest.mark.parametrize("value", [30, 30.0, True])
def test_a_file_gives_a_duration_only_with_its_unit(value: object) -> None:
    with pytest.raises(RefusedError, match="text with a unit"):
        Duration("1s", "1m").load(value)
    assert Duration("1s", "1m").load("30s") == 30.0


def test_a_value_of_a_later_version_is_refused_with_what_to_use() -> None:
    rule = Choice(("off", "required"), only="off", instead='use "off"')
    assert rule.accept("off") == "off"
    with pytest.raises(RefusedError, match=r'^not in this version; use "off"$'):
        rule.accept("required")
    with pytest.raises(RefusedError, match=r'^must be "off"; no other value is in this version$'):
        rule.accept("of")


@pytest.mark.parametrize(
    ("rule", "text", "value"),
    [
        (Whole(1, 9), "7443", 7443),
        (Whole(1, 9), " -1 ", -1),
        (Whole(1, 9), "7x", "7x"),
        (Whole(1, 9), "1_000", "1_000"),
        (Whole(1, 9), "9" * 5000, "9" * 5000),
        (Flag(), "true", True),
        (Flag(), "FALSE", False),
        (Flag(), "yes", "yes"),
        (Choice(("a",)), "a", "a"),
        (TWO_OF_THREE, "a, b", ["a", "b"]),
        (TWO_OF_THREE, '["a", "b"]', ["a", "b"]),
        (TWO_OF_THREE, '["a", "b"', '["a", "b"'),
        (TWO_OF_THREE, "[" * 5000, "[" * 5000),
        (TWO_OF_THREE, "", []),
        (ListOf(Whole(1, 9), 0, 3), "3,1", [3, 1]),
        (ListOf(Whole(1, 9), 0, 3), " [3, 1]", [3, 1]),
    ],
)
def test_the_text_of_a_variable_becomes_what_the_key_takes(rule: Rule, text: str, value: object) -> None:
    assert rule.from_environ(text) == value


@pytest.mark.parametrize(
    ("rule", "value", "text"),
    [
        (Whole(1, 9), 3, "3"),
        (Flag(), True, "true"),
        (Flag(), False, "false"),
        (Choice(("a",)), "a", '"a"'),
        (Duration("1s", "1m"), 30.0, '"30s"'),
        (Duration("1s", "1m", off=True), None, '"off"'),
        (FilePath(), Path('/a"b\\c'), '"/a\\"b\\\\c"'),
        (FilePath(empty=True), None, '""'),
        (VariableName(), None, '""'),
        (VariableName(), "A_B", '"A_B"'),
        (TWO_OF_THREE, ("a", "b"), '["a", "b"]'),
        (HOSTS, ("::",), '"::"'),
        (HOSTS, ("::", "::1"), '["::", "::1"]'),
    ],
)
def test_a_value_is_written_as_toml(rule: Rule, value: Any, text: str) -> None:
    assert rule.write(value) == text


def test_a_path_begins_at_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    assert FilePath().accept("~/x") == Path("/home/alice/x")


def test_a_list_tells_each_fault_with_its_place() -> None:
    rule = ListOf(Whole(1, 9), 0, 5, each=True)
    with pytest.raises(RefusedError, match=rf"^must be {rule.expects()}$") as caught:
        rule.accept([1, 0, 1, "x"])
    assert caught.value.refusals == (
        Refusal("[1]", 0, "must be a whole number from 1 to 9"),
        Refusal("[2]", 1, "is the same as [0]; each may stand once"),
        Refusal("[3]", "x", "must be a whole number from 1 to 9"),
    )
    with pytest.raises(RefusedError) as caught:
        rule.accept([1] * 6)
    assert caught.value.refusals == ()


def tls_takes(pin: str) -> bool:
    try:
        parse_pins([pin])
    except TlsError:
        return False
    return True


def config_takes(pin: str) -> bool:
    try:
        Pin().accept(pin)
    except RefusedError:
        return False
    return True


@given(
    st.sampled_from(["sha256/", "cert-sha256/", "sha1/", ""]),
    st.binary(min_size=31, max_size=33).map(lambda digest: base64.b64encode(digest).decode())
    | st.text("AB+/-=08\n", min_size=43, max_size=45)
    | st.sampled_from(BASE64).map(lambda last: "A" * 42 + last + "="),
)
def test_a_pin_is_what_the_tls_endpoint_takes(prefix: str, digest: str) -> None:
    assert config_takes(prefix + digest) == tls_takes(prefix + digest)


LABELS = st.sampled_from(["a", "B", "*", "xn--a", "-a", "a_b", "1", "0x1f", "", "ü", "a" * 63, "a" * 64])


@given(st.lists(LABELS, min_size=1, max_size=5).map(".".join))
def test_a_name_of_a_site_is_one_for_a_certificate_too(name: str) -> None:
    try:
        read = SiteName().accept(name)
    except RefusedError:
        return
    assert read == check_name(name)
