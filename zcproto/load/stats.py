"""The operator's connection: the server's own count, read from `server.stats`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple, Self

from zcproto.common.text import escape_text
from zcproto.errors import CallError, ConfigError, ConnectionClosed, PermissionDenied, ZcprotoError
from zcproto.load.caller import Caller, Place
from zcproto.load.plan import Credential
from zcproto.wire.frame import NO_TOKEN


class Stats(NamedTuple):
    """The server's figures at one moment."""

    connections: int
    sessions: int
    requests: int
    """All since its start, the `server.stats` that tells it included."""
    cpu_s: float
    rss_bytes: int
    longest_pause_s: float
    """Of its loop, since the call before."""
    handshakes: int

    @classmethod
    def of(cls, value: Any) -> Self:
        """From the map that `server.stats` returns. Raises ZcprotoError if something is missing."""
        try:
            return cls(
                int(value["connections"]),
                int(value["sessions"]),
                int(value["requests"]),
                float(value["cpu_s"]),
                int(value["rss_bytes"]),
                float(value["longest_pause_s"]),
                int(value["handshakes_completed"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ZcprotoError("this server's server.stats does not tell what is needed here") from error


class Operator(Caller):
    """One connection with one session that may call `server.stats`. `asked` are requests that the server counts."""

    __slots__ = ("_place",)

    def __init__(self, place: Place) -> None:
        super().__init__(place.wheel)
        self._place = place

    @classmethod
    async def connect(
        cls, host: str, address: str, port: int, ca_file: Path | None, credential: Credential
    ) -> Operator:
        """Connect and open the session.

        Raises ConfigError if the user is unknown or no operator; nothing else was connected yet then.
        """
        place = Place(host, address, port, ca_file)
        operator = await place.join(cls(place))
        try:
            await operator._open(credential)
        except BaseException:
            await operator.leave()
            raise
        return operator

    async def _open(self, credential: Credential) -> None:
        params = {
            "scheme": "api_key",
            "user": credential.user,
            "key": credential.key,
            "client": "zcproto-bench/1",
        }
        try:
            opened = await self.call("session.open", params)
        except CallError as error:
            raise ConfigError(
                [f"the operator {escape_text(credential.user)!r} got no session: {error}"]
            ) from error
        self.token = opened["token"]
        try:
            await self.stats()
        except PermissionDenied as error:
            raise ConfigError(
                [
                    f"the server's count is for operators, and {escape_text(credential.user)!r} is not one; create "
                    "one: zcproto user add ops --operator --count 1 --keys-out ops.keys, and use "
                    "--operator-key-file ops.keys"
                ]
            ) from error

    async def stats(self) -> Stats:
        return Stats.of(await self.call("server.stats", {}))

    def lost(self, cause: str) -> None:
        self._fail_all(ConnectionClosed(f"the operator's connection is gone: {cause}"))

    async def leave(self) -> None:
        """Close the session and the connection; whether that succeeds changes nothing any more."""
        if self.token != NO_TOKEN and not self.ended:
            with contextlib.suppress(ZcprotoError):  # the server is gone, and the session with it
                await self.call("session.close", {})
        await super().leave()
        self._place.close()
