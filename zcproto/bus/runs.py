"""The durable runs of several servers: a hash and a list for each run in Valkey or Redis, changed by one script.

Decides: the keys and the script (runs.lua), what is sealed, when a process is missing.

Rules:
- All keys of a user are in one slot. A change publishes the id of the run on the channel of its user: after an
  append with the process, which need not be woken.
- Items and ends are sealed. An item that does not open ends its attachment with DATA_LOSS.
- Each process renews a sign of life. It costs nothing for each run.
- The bound of all users is that of each process: a script sees the keys of one slot alone. A store that is full
  starts no run.

It must not know: who reads a run, methods.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any, Final

import msgpack
from redis.exceptions import ResponseError

from zcproto.bus.connection import BusConnection, Connect, Script
from zcproto.bus.sealing import Opener, Sealer
from zcproto.errors import ConfigError, DataLoss, FailedPrecondition, NotFound, Unavailable
from zcproto.observe.log import get_logger
from zcproto.runs.log import (
    RETRY_MS,
    End,
    Gap,
    Opening,
    RunInfo,
    RunKey,
    RunLimits,
    RunState,
    Superseded,
    Taken,
    not_bound,
    out_of_range,
    too_many_runs,
)
from zcproto.runs.shared import SharedRuns
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.valkey.scripts import tag_of, utf8

LIFE_MS: Final = 6_000
RENEW_S: Final = 2.0

_SOURCE: Final = files("zcproto.bus").joinpath("runs.lua").read_text("utf-8")
# With these lines a server that is full refuses the first script, and not its first write.
_GROW: Final = Script(f"#!lua flags=\n{_SOURCE}")
_CHANGE: Final = Script(f"#!lua flags=allow-oom\n{_SOURCE}")
_GROWING: Final = ("open", "append", "restore")
_END: Final = b"end"
_BY: Final = "\0"

log = get_logger(__name__)


class ValkeyRuns:
    """The carrier of one process, whose id is `process`. `connect` returns the servers, not connected.

    `timeout` is in seconds. `time` returns milliseconds in place of the servers' clock, in tests.
    """

    def __init__(
        self,
        connect: Connect,
        prefix: bytes,
        sealer: Sealer,
        opener: Opener,
        limits: RunLimits,
        process: str,
        timeout: float,
        time: Callable[[], int] | None = None,
    ) -> None:
        self._prefix = prefix
        self._connection = BusConnection(
            connect,
            "runs",
            self._key(b""),
            [_GROW, _CHANGE],
            timeout,
            on_up=self._up,
            on_down=self._down,
            on_message=self._message,
        )
        self._sealer = sealer
        self._opener = opener
        self._process = process
        self._time = time
        self._limits = limits
        self._runs: SharedRuns | None = None
        self._watched: dict[str, set[str]] = {}  # ids by user
        self._users: dict[bytes, str] = {}  # by channel

    async def start(self, runs: SharedRuns) -> None:
        self._runs = runs
        self._connection.start()
        self._connection.begin(self._renew())

    async def stop(self) -> None:
        self._runs = None
        if self._connection.is_up:
            sign = self._sign(self._process)
            with suppress(Unavailable):  # it expires
                await self._do(lambda: self._connection.call(sign, "DEL", sign))
        await self._connection.stop()

    def reconfigure(self, limits: RunLimits) -> None:
        self._limits = limits

    # --- keys ------------------------------------------------------------------------------------------

    def _key(self, tag: bytes) -> bytes:
        return self._prefix + b"d:{" + tag + b"}"

    def _sign(self, process: str) -> bytes:
        return self._prefix + b"y:" + process.encode()

    def _about(self, key: RunKey, generation: bytes) -> Callable[[int | bytes], bytes]:
        """Return what returns for what an item at a position of a run, or its end, is sealed."""
        run: bytes = msgpack.packb([b"run", utf8(key.user), key.id.encode(), generation])

        def about(position: int | bytes) -> bytes:
            return run + (position if isinstance(position, bytes) else b"%d" % position)

        return about

    # --- commands --------------------------------------------------------------------------------------

    async def _run(self, name: str, user: str, id_: str, *arguments: Any) -> Any:
        """Run the script for a user. Raises Unavailable."""
        tag = tag_of(user)
        limits = self._limits
        bounds = (
            limits.items,
            limits.bytes,
            limits.runs_per_user,
            limits.bytes_per_user,
            int(limits.keep_s * 1000),
        )
        packed: bytes = msgpack.packb(
            [
                *(name, self._prefix, tag, id_, self._connection.command("PUBLISH")),
                *(False if self._time is None else self._time(), bounds, arguments),
            ],
            use_bin_type=False,
            unicode_errors="surrogatepass",
        )
        script = _GROW if name in _GROWING else _CHANGE
        raw = await self._do(lambda: self._connection.run(script, self._key(tag), packed))
        return msgpack.unpackb(raw, raw=True)

    async def _do(self, command: Callable[[], Any]) -> Any:
        try:
            return await command()
        except ResponseError as error:
            log.warning("runs.refused", reason=str(error))
            if str(error).startswith("READONLY"):
                self._connection.lose("the server is a replica")
            reason = str(error)
        except TimeoutError:
            reason = "no answer in time"
            self._connection.lose(reason)
        except (StoreUnavailable, ConfigError) as error:
            reason = str(error)
        raise Unavailable(f"the store of durable runs: {reason}", {"retry_after_ms": RETRY_MS}) from None

    def _state(
        self, key: RunKey, values: Sequence[Any], info: RunInfo | None = None, *, is_listed: bool = False
    ) -> RunState:
        """Return a run, perhaps with an `info` that is known.

        One that is listed may have an end that cannot be opened: its body is empty then.
        """
        packed, first, next_, taken, attachment, order, is_attached, cancel, end, is_full = values
        info = info or RunInfo(*msgpack.unpackb(packed, unicode_errors="surrogatepass"))
        opened: End | None = None
        if end:
            body = self._opener.open(self._about(key, info.generation)(_END), end[1])
            if body is None and not is_listed:
                raise DataLoss("the end of the run cannot be opened; the servers have different keys")
            opened = end[0], body or b""
        return RunState(
            *(info, first, next_, taken, attachment.decode(), order, is_attached, cancel.decode()),
            *(opened, is_full),
        )

    def _info(self, info: RunInfo) -> list[Any]:
        values = [getattr(info, name) for name in RunInfo.__slots__]
        packed = msgpack.packb(values, unicode_errors="surrogatepass")
        return [packed, info.generation, info.method, info.digest, info.is_bound]

    # --- operations ------------------------------------------------------------------------------------

    async def open(self, key: RunKey, opening: Opening) -> tuple[bool, RunState]:
        info = False if opening.info is None else self._info(opening.info)
        digest = False if opening.digest is None else opening.digest
        answer = await self._run(
            "open", *key, opening.method, digest, opening.position, opening.attachment, opening.is_bound, info
        )
        match answer:
            case [b"done", is_new, state]:
                return bool(is_new), self._state(key, state)
            case [b"missing"]:
                raise NotFound("there is no run with this id; it was never started, or is not kept any more")
            case [b"other"]:
                raise FailedPrecondition("the run with this id has another method or other params")
            case [b"unbound"]:
                raise not_bound()
            case [b"range", first, next_]:
                raise out_of_range(first, next_)
        raise too_many_runs(self._limits.runs_per_user)

    async def append(
        self,
        key: RunKey,
        info: RunInfo,
        first: int,
        bodies: Sequence[bytes],
        end: End | None,
        taken: Taken | None,
    ) -> RunState | None:
        about, seal = self._about(key, info.generation), self._sealer.seal
        sealed = [seal(about(position), body) for position, body in enumerate(bodies, first)]
        code, body = (False, b"") if end is None else end
        if end is not None:
            body = seal(about(_END), body)
        answer = await self._run(
            "append", *key, info.generation, first, sealed, code, body, taken or False, self._process
        )
        match answer:
            case [b"done", state]:
                return self._state(key, state, info)
            case [b"gap", next_]:
                raise Gap(next_)
        return None

    async def restore(self, key: RunKey, lost: RunState) -> bool:
        info = self._info(lost.info)
        return bool(
            await self._run(
                "restore", *key, info, lost.taken, lost.attachment, lost.order, lost.is_attached, lost.cancel
            )
        )

    async def read(
        self, key: RunKey, attachment: str, position: int, items: int, size: int, order: int
    ) -> tuple[RunState, Sequence[bytes]]:
        answer = await self._run("read", *key, attachment, position, items, size, order)
        match answer:
            case [b"done", values, sealed]:
                state = self._state(key, values)
            case [b"range", first, next_]:
                raise out_of_range(first, next_)
            case [b"superseded"]:
                raise Superseded
            case _:
                raise NotFound("the run has gone")
        bodies, about = [], self._about(key, state.info.generation)
        for place, body in enumerate(sealed or (), position):
            opened = self._opener.open(about(place), body)
            if opened is None:
                raise DataLoss("an item of the run cannot be opened; the servers have different keys")
            bodies.append(opened)
        return state, bodies

    async def take(self, key: RunKey, attachment: str, position: int, order: int) -> None:
        await self._run("take", *key, attachment, position, order)

    async def detach(self, key: RunKey, attachment: str) -> None:
        await self._run("detach", *key, attachment)

    async def cancel(self, key: RunKey, reason: str) -> bool:
        return bool(await self._run("cancel", *key, reason))

    async def runs(self, user: str) -> list[tuple[RunKey, RunState]]:
        found = await self._run("runs", user, "") or ()
        keys = (RunKey(user, id_.decode()) for id_, _ in found)
        return [
            (key, self._state(key, values, is_listed=True))
            for key, (_, values) in zip(keys, found, strict=True)
        ]

    async def forget(self, user: str | None) -> int:
        """Delete the runs of a user. Of all users those that this process runs or reads: no script sees all."""
        users = [*self._watched] if user is None else [user]
        return sum([int(await self._run("forget", each, "")) for each in users])

    # --- signs of life ---------------------------------------------------------------------------------

    async def missing(self, processes: Collection[str]) -> set[str]:
        async def is_missing(process: str) -> bool:
            sign = self._sign(process)
            return not await self._do(lambda: self._connection.call(sign, "EXISTS", sign))

        answers = await asyncio.gather(*map(is_missing, processes))
        return {process for process, is_gone in zip(processes, answers, strict=True) if is_gone}

    async def _renew(self) -> None:
        sign = self._sign(self._process)
        while True:
            if self._connection.is_up:
                with suppress(Unavailable):  # tried again after RENEW_S
                    await self._do(lambda: self._connection.call(sign, "SET", sign, b"", "PX", LIFE_MS))
            await asyncio.sleep(RENEW_S)

    async def restored(self, known: Iterable[RunKey]) -> None:
        """Do nothing: ids that have gone are replicated with the runs."""

    # --- wake-ups --------------------------------------------------------------------------------------

    def _up(self) -> None:
        self._watched.clear()
        self._users.clear()
        if self._runs is not None:
            self._runs.up()

    def _down(self) -> None:
        if self._runs is not None:
            self._runs.down()

    def watch(self, key: RunKey) -> None:
        ids = self._watched.setdefault(key.user, set())
        ids.add(key.id)
        channel = self._key(tag_of(key.user))
        if channel not in self._users:
            self._users[channel] = key.user
            self._connection.begin(self._follow(channel))

    def unwatch(self, key: RunKey) -> None:
        ids = self._watched.get(key.user, set())
        ids.discard(key.id)
        if not ids and self._watched.pop(key.user, None) is not None:
            channel = self._key(tag_of(key.user))
            self._users.pop(channel, None)
            self._connection.begin(self._connection.unsubscribe(channel))

    async def _follow(self, channel: bytes) -> None:
        """Subscribe to the changes of a user, and read what came before."""
        try:
            await self._do(lambda: self._connection.subscribe(channel))
        except Unavailable:
            self._connection.lose("a run cannot be watched")
        else:
            self._wake(channel)

    def _wake(self, channel: bytes) -> None:
        user = self._users.get(channel)
        if user is not None and self._runs is not None:
            for id_ in tuple(self._watched.get(user, ())):
                self._runs.woken(RunKey(user, id_))

    def _message(self, channel: bytes, message: bytes | None) -> None:
        user = self._users.get(channel)
        if user is None or self._runs is None:
            return
        if message is None:  # the slot is moved
            self._connection.begin(self._follow(channel))
            return
        id_, _, appender = message.decode("ascii", "replace").partition(_BY)
        if appender != self._process:
            self._runs.woken(RunKey(user, id_))
