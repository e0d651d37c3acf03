"""Tests of the keys of an issuer: fetched once, rotated, and served while the provider is down, with bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from tests.auth.issuer import Published, jwk
from zcproto.auth.jwt import IssuerKey
from zcproto.auth.oidc import IssuerKeys
from zcproto.errors import Unavailable


def of(kid: str) -> Callable[[Sequence[IssuerKey]], list[IssuerKey]]:
    return lambda keys: [key for key in keys if key.kid == kid]


async def found(keys: IssuerKeys, kid: str = "one") -> bool:
    return bool(await keys.find(of(kid), kid))


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_keys_are_fetched_once_for_all_logins() -> None:
    published = Published()
    keys = published.issuer_keys()
    assert keys.age() is None
    assert all(await asyncio.gather(*(found(keys) for _ in range(20))))
    assert (published.fetches, published.events, keys.age()) == (1, ["loaded one"], 0.0)


async def test_new_key_is_found_by_its_first_token() -> None:
    published = Published()
    keys = published.issuer_keys()
    assert await found(keys)
    published.keys = [jwk("RS256", "two", 1), jwk("RS256")]
    published.now += 30
    assert await found(keys, "two")
    assert await found(keys)
    assert published.events == ["loaded one", "loaded two one"]
    published.keys = [jwk("RS256", "two", 1)]
    published.now += 3600
    assert await found(keys)  # in the background
    await settled()
    with pytest.raises(Unavailable):  # it may be new again
        await found(keys)
    published.now += 30
    assert not await found(keys)
    assert published.fetches == 4


async def test_invented_key_ids_cause_one_fetch_in_an_interval_and_are_undecided_until_then() -> None:
    published = Published()
    keys = published.issuer_keys()
    assert await found(keys)
    for left_s in range(27, 0, -3):
        published.now += 3
        tried = (found(keys, f"k{number}") for number in range(50))
        for error in await asyncio.gather(*tried, return_exceptions=True):
            assert isinstance(error, Unavailable)
            assert error.details == {"retry_after_ms": 1000 * left_s}
    published.now += 3
    assert not any(await asyncio.gather(*(found(keys, f"k{number}") for number in range(50))))
    assert published.fetches == 2
    assert published.events == ["loaded one"]


async def test_unknown_key_of_a_provider_that_is_down_is_undecided() -> None:
    published = Published()
    keys = published.issuer_keys()
    assert await found(keys)
    published.is_down = True
    published.now += 30
    for _ in range(2):  # the second finds that no fetch may begin
        with pytest.raises(Unavailable, match="does not answer") as error:
            await found(keys, "two")
        assert error.value.details == {"retry_after_ms": 30_000}
        assert await found(keys)


async def test_last_keys_serve_while_the_provider_is_down() -> None:
    published = Published()
    keys = published.issuer_keys()
    assert await found(keys)
    published.is_down = True
    for _ in range(23):
        published.now += 3600
        assert await found(keys)
        await settled()
    assert published.events == ["loaded one", "the provider is down; the last keys serve"]
    assert (keys.fetched, keys.failures, keys.is_failing) == (1, 23, True)
    for _ in range(3):
        published.now += 3600
        with pytest.raises(Unavailable, match="the identity provider does not answer"):
            await found(keys)
    published.is_down = False
    published.now += 30
    assert await found(keys)
    assert published.events[2:] == ["the provider is down; the last keys do not serve", "loaded one"]
    assert (keys.fetched, keys.failures, keys.is_failing) == (2, 26, False)


async def test_login_is_undecided_without_any_keys() -> None:
    published = Published()
    published.is_down = True
    keys = published.issuer_keys()
    for fetches in (1, 1, 1):
        with pytest.raises(Unavailable) as error:
            await found(keys)
        assert error.value.details == {"retry_after_ms": 30_000}
        assert published.fetches == fetches
    assert published.events == ["the provider is down; the last keys do not serve"]
    published.is_down = False
    published.now += 30
    assert await found(keys)


async def test_login_that_is_cancelled_does_not_end_the_fetch_of_others() -> None:
    published = Published()
    keys = published.issuer_keys()
    answer: asyncio.Future[list[IssuerKey]] = asyncio.get_running_loop().create_future()

    async def fetch() -> list[IssuerKey]:
        return await answer

    keys.fetch = fetch
    one, other = asyncio.create_task(found(keys)), asyncio.create_task(found(keys))
    await settled()
    one.cancel()
    await settled()
    answer.set_result(await published.fetch())
    assert await other


async def test_unexpected_exception_of_a_fetch_reaches_the_login() -> None:
    keys = Published().issuer_keys()

    async def fetch() -> list[IssuerKey]:
        raise RuntimeError("a bug")

    keys.fetch = fetch
    with pytest.raises(RuntimeError, match="a bug"):
        await found(keys)
