"""`zcproto login`: log a person in at an identity provider, and keep the tokens for `zcproto call --login`.

Rules:
- The device authorization grant (RFC 8628): the person confirms a code in any browser; no password and no redirect
  comes here.
- The tokens are in `login.json` of the home folder, of mode 0600. They are in no message.
- What the provider sends is bounded and escaped before it is shown.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import click

from zcproto.auth.jwt import read_json
from zcproto.auth.oidc import KeysFailed, Provider
from zcproto.cli import Instance, file_option, instance_options
from zcproto.common.clock import MS_PER_SECOND, system_clock
from zcproto.common.files import UnusableFileError, locked, read_file, replace_file
from zcproto.common.home import Home
from zcproto.common.https import verifying_context
from zcproto.common.text import escape_text
from zcproto.config.types import is_issuer
from zcproto.errors import ConfigError

DEVICE_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"
FILE: Final = "login.json"
MAX_FILE: Final = 131_072
TIMEOUT_S: Final = 10.0
MAX_WAIT_S: Final = 1_800
"""A code is not awaited for longer, whatever the provider says."""

INTERVAL_S: Final = 5
MAX_INTERVAL_S: Final = 60
SPARE_S: Final = 30
"""A token that expires within this time is replaced."""

_LOCK_S: Final = 30.0
_SHOWN: Final = 400
_OK: Final = 200

Sleep = Callable[[float], Awaitable[None]]


@click.command()
@click.option("--issuer", metavar="URL", required=True, help="The identity provider.")
@click.option(
    "--client-id", metavar="ID", required=True, help="The name of this client there; it has no secret."
)
@click.option(
    "--scope", metavar="TEXT", default="openid offline_access", show_default=True, help="What to ask for."
)
@click.option(
    "--resource",
    metavar="URI",
    help="The server that the token is for, if the provider needs that (RFC 8707).",
)
@click.option(
    "--id-token", is_flag=True, help="Use the ID token: for providers whose access tokens are no JWT."
)
@file_option("--ca", text="The CA of the provider. [default: those of the system]")
@instance_options
def login(
    instance: Instance,
    issuer: str,
    client_id: str,
    scope: str,
    resource: str | None,
    id_token: bool,
    ca: Path | None,
) -> None:
    """Log in at an identity provider with a browser, here or on another machine.

    `zcproto call --login` then opens sessions as you, until the provider ends the login.
    """
    instance.home.ensure()
    provider = _provider(issuer, ca)
    ask = {"client_id": client_id, "scope": scope, **({} if resource is None else {"resource": resource})}
    answer = asyncio.run(device_login(provider, ask))
    kind = "id_token" if id_token else "access_token"
    kept = {"issuer": issuer, "ca": None if ca is None else str(ca.absolute()), "kind": kind, "ask": ask}
    _keep(instance.home, {**kept, **_tokens(answer, kind, {})})
    click.echo("logged in; use it with: zcproto call HOST:PORT METHOD --login", err=True)


def _provider(issuer: str, ca: Path | None) -> Provider:
    if not is_issuer(issuer):
        raise ConfigError(
            ["--issuer must be the address of an identity provider, such as https://login.example.com"]
        )
    return Provider(issuer, verifying_context(ca, "--ca"), TIMEOUT_S)


async def device_login(
    provider: Provider, ask: Mapping[str, str], sleep: Sleep = asyncio.sleep
) -> dict[str, Any]:
    """Show the code of a login, and return the tokens when a person has confirmed it. Raises ConfigError."""
    status, begun = await _post(provider, "device_authorization_endpoint", ask)
    code, user_code = begun.get("device_code"), begun.get("user_code")
    page = begun.get("verification_uri_complete") or begun.get("verification_uri")
    if (
        status != _OK
        or not isinstance(code, str)
        or not isinstance(user_code, str)
        or not isinstance(page, str)
    ):
        raise _refused(begun)
    click.echo(
        f"Open {escape_text(page, _SHOWN)}\nand confirm the code {escape_text(user_code, _SHOWN)}", err=True
    )
    interval = _seconds(begun.get("interval"), INTERVAL_S, MAX_INTERVAL_S)
    left = _seconds(begun.get("expires_in"), MAX_WAIT_S, MAX_WAIT_S)
    form = {"grant_type": DEVICE_GRANT, "device_code": code, "client_id": ask["client_id"]}
    while left > 0:
        await sleep(interval)
        left -= interval
        status, answer = await _post(provider, "token_endpoint", form)
        if status == _OK:
            return answer
        error = answer.get("error")
        if error == "slow_down":
            interval = min(interval + INTERVAL_S, MAX_INTERVAL_S)
        elif error != "authorization_pending":
            raise _refused(answer)
    raise ConfigError(["the code was not confirmed in time; run zcproto login again"])


def stored_login(home: Home) -> Callable[[], Awaitable[dict[str, Any]]]:
    """Return a function for `login=` of `connect`, with a token that is refreshed when it expires.

    Raises ConfigError without a login; the function too, if the provider has ended it.
    """
    _kept(home)

    async def fresh() -> dict[str, Any]:
        kept = await asyncio.to_thread(_kept, home)
        if system_clock.wall() >= kept["expires_at"] - SPARE_S * MS_PER_SECOND:
            kept = await _refresh(home, kept)
        return {"scheme": "jwt", "token": kept["token"]}

    return fresh


async def _refresh(home: Home, kept: dict[str, Any]) -> dict[str, Any]:
    if not kept["refresh_token"]:
        raise ConfigError(["the login has expired; run zcproto login again"])
    ca = None if kept["ca"] is None else Path(kept["ca"])
    form = {**kept["ask"], "grant_type": "refresh_token", "refresh_token": kept["refresh_token"]}
    status, answer = await _post(_provider(kept["issuer"], ca), "token_endpoint", form)
    if status != _OK:
        raise _refused(answer)
    renewed = {**kept, **_tokens(answer, kept["kind"], kept)}
    await asyncio.to_thread(_keep, home, renewed)
    return renewed


async def _post(provider: Provider, endpoint: str, form: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    try:
        response = await provider.post(await provider.address(endpoint), urlencode(form).encode())
        return response.status, read_json(response.body)
    except ValueError:
        raise ConfigError([f"the answer of the provider's {endpoint} is not JSON"]) from None
    except KeysFailed as error:
        raise ConfigError([f"the identity provider cannot be used: {error}"]) from error


def _tokens(answer: Mapping[str, Any], kind: str, before: Mapping[str, Any]) -> dict[str, Any]:
    token, refresh_token = answer.get(kind), answer.get("refresh_token", before.get("refresh_token", ""))
    if not isinstance(token, str) or not isinstance(refresh_token, str):
        raise ConfigError([f"the provider has issued no {kind}; try another --scope"])
    life_s = _seconds(answer.get("expires_in"), SPARE_S, 365 * 86_400)
    return {
        "token": token,
        "refresh_token": refresh_token,
        "expires_at": system_clock.wall() + life_s * MS_PER_SECOND,
    }


def _refused(answer: Mapping[str, Any]) -> ConfigError:
    """Return the error that the provider has answered with, which has no token."""
    shown = ": ".join(str(answer[name]) for name in ("error", "error_description") if name in answer)
    return ConfigError(
        [f"the identity provider refused the login: {escape_text(shown or 'no reason', _SHOWN)}"]
    )


def _seconds(value: object, default: int, most: int) -> int:
    return (
        min(value, most) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default
    )


def _kept(home: Home) -> dict[str, Any]:
    path = home.path / FILE
    try:
        found = read_json(read_file(path, MAX_FILE)[0])
    except FileNotFoundError:
        raise ConfigError(["there is no login; run zcproto login"]) from None
    except (OSError, UnusableFileError, ValueError) as error:
        raise ConfigError(
            [f"{escape_text(str(path))}: cannot be used: {error}; run zcproto login again"]
        ) from None
    return found


def _keep(home: Home, found: Mapping[str, Any]) -> None:
    path = home.path / FILE
    with locked(path.with_name(f".{FILE}.lock"), _LOCK_S):
        replace_file(path, json.dumps(found).encode())
