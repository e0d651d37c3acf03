"""Check the identity providers of `auth.oidc`, as a server uses them: reachable, with usable keys, clocks alike."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from zcproto.auth.jwt import fits
from zcproto.auth.oidc import KeysFailed
from zcproto.cli.doctor.finding import FAULT, OK, WARNING, Result, from_message
from zcproto.common.clock import MS_PER_SECOND, system_clock
from zcproto.common.home import Home
from zcproto.common.text import counted
from zcproto.config import Config, OidcConfig
from zcproto.errors import ConfigError
from zcproto.runtime.oidc import provider_of


def check(config: Config, home: Home) -> Iterator[Result]:
    """Fetch the keys of each provider."""
    if config.auth.oidc and importlib.util.find_spec("jwt") is None:
        yield FAULT, "PyJWT is not installed", 'run: pip install "zcproto[oidc]"'
        return
    for number, each in enumerate(config.auth.oidc):
        yield from _issuer(each, f"auth.oidc[{number}]")


def _issuer(config: OidcConfig, key: str) -> Iterator[Result]:
    try:
        provider = provider_of(config, key)
        keys = asyncio.run(provider.keys())
    except ConfigError as error:
        yield from map(from_message, error.faults)
        return
    except KeysFailed as error:
        cure = f"check the provider and {key}; logins go on for keys_stale where its keys are known"
        yield FAULT, f"{config.issuer}: {error}", cure
        return
    usable = sum(any(fits(each, algorithm) for algorithm in config.algorithms) for each in keys)
    if not usable:
        found = f"{config.issuer}: none of its keys is for {', '.join(config.algorithms)}"
        yield FAULT, found, f"set {key}.algorithms to those of the provider's tokens"
        return
    yield OK, f"{config.issuer}: {counted(usable, 'usable key')}"
    ahead_s = _ahead_s(provider.date)
    if ahead_s is not None and abs(ahead_s) > config.leeway:
        direction = "behind" if ahead_s > 0 else "ahead of"
        found = f"the clock of this machine is {abs(ahead_s):.0f} s {direction} that of {config.issuer}"
        yield WARNING, found, f"check NTP: tokens are refused beyond {key}.leeway = {config.leeway:g} s"


def _ahead_s(date: str) -> float | None:
    """Return by how many seconds the clock of a server is ahead, by its header Date; None without a valid one."""
    try:
        return parsedate_to_datetime(date).timestamp() - system_clock.wall() / MS_PER_SECOND
    except (ValueError, OverflowError):
        return None
