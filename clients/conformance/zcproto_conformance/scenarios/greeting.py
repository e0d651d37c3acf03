"""WELCOME: when it comes, how it comes, and what is wrong with it."""

from __future__ import annotations

from typing import Any, Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.errors import expect
from zcproto_conformance.link import MIN_LENGTH, QUIET, pack
from zcproto_conformance.stage import USER, Joined, Stage

scenario: Final = Scenarios(SCRIPTED)

_BAD_GREETING: Final = ("closed", "connect", "tls")
"""As what a connection fails that ended before its WELCOME was taken."""


async def _refused(stage: Stage, data: bytes | None = None, **changes: Any) -> None:
    """The client ends a connection that is greeted like this, and tells its application."""
    _, connected = await stage.connecting(connect_timeout_ms=int(stage.patience * 500))
    link = await stage.link()
    link.write(link.welcome_bytes(**changes) if data is None else data)
    await link.ended_by_client("after a greeting that it must refuse")
    await stage.refusal(connected, "connect", *_BAD_GREETING)


@scenario("greeting-is-awaited", "6.2: a client sends nothing before it has read WELCOME")
async def _(stage: Stage) -> None:
    _, connected = await stage.connecting(user=USER, key=stage.key)
    link = await stage.link()
    await link.quiet("before WELCOME")
    link.welcome()
    await stage.open_session(link)
    await stage.answer(connected, "connect")


@scenario("greeting-in-pieces", "5.5: however WELCOME is cut, it is the same")
async def _(stage: Stage) -> None:
    client, connected = await stage.connecting()
    link = await stage.link()
    await link.write_in_pieces(link.welcome_bytes())
    await stage.answer(connected, "connect")
    await Joined(client, link).exchange()


@scenario("greeting-with-unknown-keys", "6.2, 15: keys that a client does not know are ignored")
async def _(stage: Stage) -> None:
    joined = await stage.joined(welcome={"motto": [1, {"a": b"\0"}], "max_dreams": 2**64 - 1})
    await joined.exchange()


@scenario("greeting-with-a-frame-behind", "5.5: a frame in the same read as WELCOME is not lost")
async def _(stage: Stage) -> None:
    client, connected = await stage.connecting()
    link = await stage.link()
    link.write(link.welcome_bytes() + link.bytes_of("EVENT", 0, pack(["early", 1])))
    await stage.answer(connected, "connect")
    event = await client.event()
    expect(event == ("early", 1), f"the application was told {event}")
    await Joined(client, link).exchange()


@scenario("greeting-without-version-1", "6.2: a server that does not speak this version is left")
async def _(stage: Stage) -> None:
    await _refused(stage, versions=[2, 3])


@scenario("greeting-without-a-key", "6.2: a WELCOME in which a key is missing is refused")
async def _(stage: Stage) -> None:
    await _refused(stage, max_streams=None)


@scenario("greeting-with-a-wrong-type", "6.2: a WELCOME in which a key is of another type is refused")
async def _(stage: Stage) -> None:
    await _refused(stage, max_frame="1048576")


@scenario("greeting-not-first", "6.2: a first frame that is no WELCOME is refused")
async def _(stage: Stage) -> None:
    _, connected = await stage.connecting(connect_timeout_ms=int(stage.patience * 500))
    link = await stage.link()
    link.send("PING")
    await link.ended_by_client("after a first frame that is no WELCOME")
    await stage.refusal(connected, "connect", *_BAD_GREETING)


@scenario("greeting-with-a-counter", "6.2: a WELCOME whose counter is not 0 is refused")
async def _(stage: Stage) -> None:
    await _refused(stage, header={"counter": 1})


@scenario("greeting-twice", "6.2: a second WELCOME is refused")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    await joined.link.request("echo")
    joined.link.welcome(header={"counter": 1})
    await joined.link.ended_by_client("after a second WELCOME")
    await call.lost()


@scenario("greeting-unreadable", "6.2, 12.2: a WELCOME that is no msgpack map is refused")
async def _(stage: Stage) -> None:
    _, connected = await stage.connecting(connect_timeout_ms=int(stage.patience * 500))
    link = await stage.link()
    link.send("WELCOME", 0, b"\xc1", counter=0)
    await link.ended_by_client("after a WELCOME that cannot be read")
    await stage.refusal(connected, "connect", *_BAD_GREETING)


@scenario("greeting-too-large", "5.3: a WELCOME above the first limit is refused from its header alone")
async def _(stage: Stage) -> None:
    _, connected = await stage.connecting(connect_timeout_ms=int(stage.patience * 500))
    link = await stage.link()
    link.send("WELCOME", 0, b"", counter=0, length=MIN_LENGTH + 64 * 1_048_576)
    await link.ended_by_client("after a header whose length is above the limit")
    await stage.refusal(connected, "connect", *_BAD_GREETING)


@scenario("greeting-never-comes", "11: an attempt to connect has an end, also without WELCOME")
async def _(stage: Stage) -> None:
    _, connected = await stage.connecting(connect_timeout_ms=int(QUIET * 1000))
    await stage.link()
    await stage.refusal(connected, "connect", *_BAD_GREETING)


@scenario("max-streams-is-kept", "6.2, 6.3: no more requests are in flight than WELCOME allows")
async def _(stage: Stage) -> None:
    joined = await stage.joined(welcome={"max_streams": 2})
    calls = await joined.client.calls("echo", 5)
    waiting = await joined.link.requests("echo", 2)
    await joined.link.quiet("beyond max_streams")
    for number in range(len(calls)):
        request = waiting.pop(0)
        joined.link.answer(request, request.params)
        if number + 2 < len(calls):
            waiting.append(await joined.link.request("echo"))
    for number, call in enumerate(calls):
        await call.gives({"n": number})
