"""Configuration, files, log and alerts of a server, as its operator sees them."""

from __future__ import annotations

import base64
import json
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from bench.requirements.certificate_checks import alert_command, alerts, until
from bench.requirements.finding import Facts, Finding
from bench.requirements.hello import ask, client_hello
from bench.requirements.homes import HOST, NAME, House, Served, Workshop, zcproto
from bench.requirements.session_checks import CLIENT, THIEF, code_of, opened
from zcproto.load.caller import Caller, Place
from zcproto.load.stats import Operator
from zcproto.wire.frame import NO_TOKEN

FAULTY: Final = """
[server]
prot = 7443
drain_timeout = "soon"
[sessions]
per_user = 0
[tls]
suites = ["TLS_AES_128_GCM_SHA256"]
"""
FAULTS: Final = ("server.prot", "server.drain_timeout", "sessions.per_user", "tls.suites")
PAYLOAD: Final = "a payload that nobody logs"
CLOSED: Final = b'"session.closed"'


def configuration(workshop: Workshop) -> Finding:
    """All faults at once, before anything is started, each with its key and what would be right."""
    facts = Facts()
    house = workshop.house("faulty", FAULTY, certificates=False)
    for words in (("config", "check"), ("serve", "--port", "0")):
        ended = zcproto(house.home, *words)
        name = " ".join(words[:2])
        facts.note(f"`{name}` ends with an error", ended.code not in (0, None), ended.code)
        for key in FAULTS:
            facts.note(f"`{name}` names {key}", key in ended.said, ended.said)
        facts.note(f"`{name}` says what would be right", "did you mean server.port" in ended.said, ended.said)
    facts.note("nothing was made", not house.home.certs.exists())
    good = workshop.house("sound", certificates=False)
    facts.equal("a sound one: exit code of `config check`", zcproto(good.home, "config", "check").code, 0)
    return facts.finding(f"{len(FAULTS)} of {len(FAULTS)} faults at once, each with its key")


def first_run(workshop: Workshop) -> Finding:
    """A server in an empty folder makes certificates where the configuration says, and private files."""
    facts = Facts()
    elsewhere = workshop.folder / "elsewhere"
    config = f"[certificates]\ndirectory = {json.dumps(str(elsewhere))}\nkey_types = ['ecdsa-p256']\n"
    house = workshop.house("first-run", config, certificates=False)
    with house.serve("sqlite"):
        made = {each.name for each in elsewhere.glob("*.crt")}
        facts.note("certificates were made there", {"ca.crt", "server-ecdsa.crt"} <= made, made)
        facts.note("and nowhere else", not house.home.certs.exists())
        files = [
            each for folder in (elsewhere, house.home.path) for each in folder.rglob("*") if each.is_file()
        ]
        modes = {each.name: _mode(each) for each in files if each.suffix in (".key", ".db", ".toml")}
        facts.note(
            "keys, databases, users and settings are their owner's", set(modes.values()) == {0o600}, modes
        )
        facts.equal("the folder", _mode(elsewhere), 0o700)
        facts.note("there is a key and a database", {"ca.key", "sessions.db"} <= set(modes), sorted(modes))
    return facts.finding(
        f"made on first start, in the folder configured; {len(modes)} private files, all 0600"
    )


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def alerting(workshop: Workshop) -> Finding:
    """What somebody has to know of: TLS failures, revocations, stolen refresh tokens, certificates that end."""
    folder = workshop.folder / "alerts"
    folder.mkdir()
    config = alert_command(folder) + "tls_failures = 1\n"
    house = workshop.house("alerting", config)

    async def steal(place: Place) -> None:
        caller = await place.caller()
        first = await opened(caller, house.users[0])
        params = {"refresh_token": first["refresh_token"], "client": CLIENT}
        await caller.call("session.refresh", params, NO_TOKEN)
        await code_of(caller, "session.refresh", {**params, "client": THIEF}, NO_TOKEN)
        await caller.leave()

    async def revoke(place: Place) -> None:
        operator = await Operator.connect(NAME, HOST, served.port, served.ca_file, house.operator)
        caller = await place.caller()
        await opened(caller, house.users[1])
        await operator.call("server.revoke", {"user": house.users[1].user})
        await caller.leave()
        await operator.leave()

    causes: dict[str, Callable[[], object]] = {
        "tls.failures": lambda: [ask(served.port, client_hello(suites=(0x1301,))) for _ in range(20)],
        "session.revoked": lambda: served.talk(revoke),
        "session.refresh_reused": lambda: served.talk(steal),
    }
    facts = Facts()
    with house.serve() as served:
        facts.equal("before", alerts(folder), [])
        for kind, cause in causes.items():
            cause()
            seconds = until(lambda kind=kind: any(each["kind"] == kind for each in alerts(folder)))  # type: ignore[misc]
            facts.note(f"{kind} arrives", seconds is not None, [each["kind"] for each in alerts(folder)])
    return facts.finding(f"{', '.join(causes)} arrived; certificate.expiry: the row of expiry monitoring")


def logs(served: Served, house: House) -> Finding:
    """Each line is one JSON object, and nothing secret is in the log or in the files of the home folder."""
    secrets: list[bytes] = [who.key.encode() for who in (*house.users, house.operator)]
    tokens: list[bytes] = []

    async def use(place: Place) -> None:
        caller = await place.caller()
        for who in house.users[7:]:
            tokens.extend(await _use(caller, who))
        await caller.leave()

    log = served.home.path / "server.log"
    before = log.read_bytes().count(CLOSED)
    served.talk(use)
    facts = Facts()
    written = until(lambda: log.read_bytes().count(CLOSED) >= before + len(house.users[7:]))
    facts.note("what was done is in the log", written is not None)
    lines = log.read_text().splitlines()
    events: list[dict[str, Any]] = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            facts.note("a line is JSON", False, line[:100])
    facts.note("each line is a JSON object", len(events) == len(lines) and len(lines) > 10, len(lines))
    lacking = [each for each in events if not {"timestamp", "level", "event"} <= set(each)]
    facts.equal("lines without a time, a level or an event", lacking, [])
    facts.note("sessions are told of", any(each["event"] == "session.opened" for each in events))
    text = served.log().encode()
    private = list(_private_keys(served.home.path))
    searched = [*secrets, *(form for token in tokens for form in _forms(token)), *private]
    facts.equal("secrets in the log", [each[:6] for each in searched if each in text], [])
    facts.note("payloads in the log: none", PAYLOAD.encode() not in text)
    kept = b"".join(each.read_bytes() for each in served.home.path.rglob("*") if _is_searched(each))
    facts.equal(
        "keys and tokens in files", [each[:6] for each in (*searched[: -len(private)],) if each in kept], []
    )
    return facts.finding(f"{len(lines)} lines of JSON; none of {len(searched)} forms of secrets is in them")


async def _use(caller: Caller, who: Any) -> list[bytes]:
    answer = await opened(caller, who)
    await caller.call("echo", {"word": PAYLOAD}, answer["token"])
    await code_of(caller, "echo", {"word": PAYLOAD}, answer["token"][::-1])
    await caller.call("session.close", {}, answer["token"])
    return [answer["token"], answer["refresh_token"]]


def _forms(token: bytes) -> Iterable[bytes]:
    """As which a token could be written down."""
    yield token
    yield token.hex().encode()
    yield base64.b64encode(token)
    yield base64.urlsafe_b64encode(token).rstrip(b"=")
    yield repr(token)[2:-1].encode()


def _private_keys(folder: Path) -> Iterable[bytes]:
    """A line from the middle of each private key."""
    for each in folder.rglob("*.key"):
        lines = each.read_bytes().splitlines()
        yield lines[len(lines) // 2]


def _is_searched(path: Path) -> bool:
    return path.is_file() and path.suffix != ".key"
