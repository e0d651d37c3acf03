"""URLs of Valkey and Redis servers."""

from __future__ import annotations

import pytest

from zcproto.errors import ConfigError
from zcproto.stores.valkey.link import Target
from zcproto.stores.valkey.store import ValkeyStore
from zcproto.stores.valkey.url import ServerKind, ServerUrl, parse_url

SECRET = "hunter2"

GOOD: dict[str, tuple[ServerUrl, str]] = {
    "redis://cache": (ServerUrl(ServerKind.SINGLE, (("cache", 6379),)), "redis://cache:6379/0"),
    "valkey://cache/": (ServerUrl(ServerKind.SINGLE, (("cache", 6379),)), "redis://cache:6379/0"),
    "redis://cache:7000/5": (
        ServerUrl(ServerKind.SINGLE, (("cache", 7000),), database=5),
        "redis://cache:7000/5",
    ),
    "redis://cache?db=5": (
        ServerUrl(ServerKind.SINGLE, (("cache", 6379),), database=5),
        "redis://cache:6379/5",
    ),
    "valkeys://[fd00::1]:7000": (
        ServerUrl(ServerKind.SINGLE, (("fd00::1", 7000),), tls=True),
        "rediss://[fd00::1]:7000/0",
    ),
    "rediss://[::1]/1": (
        ServerUrl(ServerKind.SINGLE, (("::1", 6379),), tls=True, database=1),
        "rediss://[::1]:6379/1",
    ),
    f"redis://ann:{SECRET}@cache": (
        ServerUrl(ServerKind.SINGLE, (("cache", 6379),), username="ann", password=SECRET),
        "redis://ann@cache:6379/0",
    ),
    f"redis://:{SECRET}@cache": (
        ServerUrl(ServerKind.SINGLE, (("cache", 6379),), password=SECRET),
        "redis://cache:6379/0",
    ),
    "redis://ann@cache": (
        ServerUrl(ServerKind.SINGLE, (("cache", 6379),), username="ann"),
        "redis://ann@cache:6379/0",
    ),
    "redis://a%3Ab:%40%2F%3F%23%25@cache": (
        ServerUrl(ServerKind.SINGLE, (("cache", 6379),), username="a:b", password="@/?#%"),
        "redis://a:b@cache:6379/0",
    ),
    "redis://ann:p@s/s?w:o#rd@cache": (
        ServerUrl(ServerKind.SINGLE, (("cache", 6379),), username="ann", password="p@s/s?w:o#rd"),
        "redis://ann@cache:6379/0",
    ),
    "unix:///run/valkey.sock": (
        ServerUrl(ServerKind.SINGLE, path="/run/valkey.sock"),
        "unix:///run/valkey.sock/0",
    ),
    "redis+unix:///run/a%20b@c?db=2": (
        ServerUrl(ServerKind.SINGLE, path="/run/a b@c", database=2),
        "unix:///run/a b@c/2",
    ),
    f"valkey+unix://ann:{SECRET}@/run/x": (
        ServerUrl(ServerKind.SINGLE, path="/run/x", username="ann", password=SECRET),
        "unix://ann@/run/x/0",
    ),
    "redis+sentinel://a,b:7000,[::1]/sessions": (
        ServerUrl(ServerKind.SENTINEL, (("a", 26379), ("b", 7000), ("::1", 26379)), service="sessions"),
        "redis+sentinel://a:26379,b:7000,[::1]:26379/sessions/0",
    ),
    f"valkeys+sentinel://ann:{SECRET}@a/my%20name/3": (
        ServerUrl(
            ServerKind.SENTINEL,
            (("a", 26379),),
            tls=True,
            username="ann",
            password=SECRET,
            service="my name",
            database=3,
        ),
        "rediss+sentinel://ann@a:26379/my name/3",
    ),
    "rediss+cluster://a,b:7000": (
        ServerUrl(ServerKind.CLUSTER, (("a", 6379), ("b", 7000)), tls=True),
        "rediss+cluster://a:6379,b:7000/0",
    ),
    "valkey+cluster://a/0": (ServerUrl(ServerKind.CLUSTER, (("a", 6379),)), "redis+cluster://a:6379/0"),
}


@pytest.mark.parametrize("text", GOOD)
def test_valid_urls_are_parsed(text: str) -> None:
    url, shown = GOOD[text]
    found = parse_url(text)
    assert found == url
    assert str(found) == shown


BAD = {
    "": "is not the URL",
    "cache": "is not the URL",
    "http://cache": "is not the URL",
    "redis:cache": "is not the URL",
    "redis+other://cache": "is not the URL",
    "rediss+unix:///x": "is not the URL",
    "redis://": "no valid host and port",
    "redis://:1": "no valid host and port",
    "redis://cache:0": "no valid host and port",
    "redis://cache:65536": "no valid host and port",
    "redis://cache:x": "no valid host and port",
    "redis://a b": "no valid host and port",
    "redis://::1": "no valid host and port",
    "redis://a\nb": "no valid host and port",
    "redis://a,b": "names several servers",
    "redis://a/x": "a database that is not a number",
    "redis://a/1/2": "more in its path",
    "redis://a/1?db=1": "more in its path",
    "redis://a/-1": "a database that is not a number",
    "redis://a/123456": "a database that is not a number",
    "redis://a?db=x": "a database that is not a number",
    "redis://a?timeout=3": "not db=NUMBER",
    "redis://a?db=1&db=2": "not db=NUMBER",
    "unix://run/x": "no absolute path",
    "unix:///run/%00": "no absolute path",
    "redis+sentinel://a": "name the sentinels' service",
    "redis+sentinel://a/": "name the sentinels' service",
    "redis+sentinel://a,/x": "no valid host and port",
    "redis+cluster://a/1": "a cluster has database 0 only",
    "redis+cluster://" + ",".join(65 * ["a"]): "more than 64",
}


@pytest.mark.parametrize("text", BAD)
def test_invalid_urls_are_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^store\.url: it .*; write it as redis://") as error:
        parse_url(text)
    assert BAD[text] in str(error.value)


@pytest.mark.parametrize("scheme", ["redis", "redis+unix", "redis+sentinel", "redis+cluster", "http"])
@pytest.mark.parametrize("rest", ["cache:port", "a,,b", "cache/x/y/z?q", "", "cache/9/9?db=9"])
def test_error_never_shows_the_password(scheme: str, rest: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_url(f"{scheme}://ann:{SECRET}@{rest}" if rest else f"{scheme}//ann:{SECRET}@cache")
    assert SECRET not in str(error.value)
    assert SECRET not in repr(error.value)
    assert error.value.__cause__ is None


@pytest.mark.parametrize("text", [text for text in GOOD if SECRET in text])
def test_str_and_repr_never_show_the_password(text: str) -> None:
    assert SECRET not in repr(parse_url(text))
    store = ValkeyStore(text)
    assert SECRET not in repr(store)
    assert SECRET not in str(store)
    assert SECRET not in repr(Target("cache", 1, password=SECRET))


def test_control_characters_are_escaped() -> None:
    assert "\n" not in str(parse_url("redis://a%0Ab:x@cache"))


def test_user_without_a_password_is_refused() -> None:
    with pytest.raises(ConfigError, match="without a password"):
        ValkeyStore("redis://ann@cache")
    ValkeyStore("redis://ann@cache", password=SECRET)


@pytest.mark.parametrize("prefix", ["{a}", "a}", "{"])
def test_prefix_with_braces_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="prefix"):
        ValkeyStore("redis://cache", prefix=prefix)
