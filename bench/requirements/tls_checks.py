"""What a running server does with TLS, asked by ClientHellos of every kind."""

from __future__ import annotations

import socket

from bench.requirements.finding import Facts, Finding
from bench.requirements.hello import (
    HANDSHAKE_FAILURE,
    NO_APPLICATION_PROTOCOL,
    OLD_SUITES,
    PROTOCOL_VERSION,
    SUITES,
    TLS_1_0,
    TLS_1_1,
    TLS_1_2,
    TLS_1_3,
    Answer,
    ask,
    client_hello,
)
from bench.requirements.homes import HOST, NAME, TIMEOUT, House, Served
from zcproto.load.caller import Place
from zcproto.load.stats import Operator
from zcproto.tls.suites import SUITES as OURS

CONNECTIONS = 20
"""Handshakes whose key shares must all be different."""

LEAKS = ("Traceback", "/usr", "/home", "/tmp", ".py", "Python", "OpenSSL", "zcproto/0", "zcproto/1")  # noqa: S108 - looked for, not used
"""What no answer to a stranger may hold."""


def tls_version(served: Served) -> Finding:
    facts = Facts()
    for name, version in (("1.0", TLS_1_0), ("1.1", TLS_1_1), ("1.2", TLS_1_2)):
        answer = ask(served.port, client_hello((version,), OLD_SUITES))
        facts.note(f"TLS {name} alone is refused by alert 70", answer.alert == PROTOCOL_VERSION, answer)
    both = ask(served.port, client_hello((TLS_1_2, TLS_1_3), (*OLD_SUITES, 0x1302)))
    facts.note("offered 1.2 and 1.3, it takes 1.3", both.version == TLS_1_3, both)
    unknown = ask(served.port, client_hello((0x0A0A, 0x7F1C, TLS_1_3)))
    facts.note("unknown versions are passed over", unknown.version == TLS_1_3, unknown)
    with (
        socket.create_connection((HOST, served.port), TIMEOUT) as raw,
        served.context().wrap_socket(raw, server_hostname=NAME) as tls,
    ):
        facts.equal("a whole handshake", tls.version(), "TLSv1.3")
    return facts.finding("1.3; 1.0, 1.1 and 1.2 get alert 70")


def cipher_suites(served: Served) -> Finding:
    facts = Facts()
    for number, name in SUITES.items():
        answer = ask(served.port, client_hello(suites=(number,)))
        if name in OURS:
            facts.note(f"{name} alone is taken", answer.suite == number, answer)
        else:
            facts.note(f"{name} alone is refused by alert 40", answer.alert == HANDSHAKE_FAILURE, answer)
    ours = [number for number, name in SUITES.items() if name in OURS]
    for order in (tuple(SUITES), tuple(reversed(SUITES))):
        answer = ask(served.port, client_hello(suites=order))
        facts.note("of all five, it takes one of the two", answer.suite in ours, answer)
    others = tuple(number for number in SUITES if number not in ours)
    answer = ask(served.port, client_hello(suites=others))
    facts.note("all but the two are refused by alert 40", answer.alert == HANDSHAKE_FAILURE, answer)
    return facts.finding("both alone; the other three get alert 40")


def forward_secrecy(served: Served) -> Finding:
    facts = Facts()
    shares = [ask(served.port, client_hello()).key_share for _ in range(CONNECTIONS)]
    facts.note("every ServerHello has a key share", all(shares), shares.count(None))
    facts.equal(f"key shares of {CONNECTIONS} handshakes, different ones", len(set(shares)), CONNECTIONS)
    answer = ask(served.port, client_hello(psk_modes=b"\x00"))
    fresh = answer.key_share is not None or answer.alert is not None
    facts.note("who offers resumption without (EC)DHE gets none", fresh, answer)
    facts.equal("tickets given in a whole handshake", _tickets(served), 0)
    keys = [each for each in served.home.path.rglob("*") if "ticket" in each.name.lower()]
    facts.equal("ticket keys on the disk", len(keys), 0)
    return facts.finding(f"{CONNECTIONS} handshakes, {CONNECTIONS} key shares; no tickets")


def _tickets(served: Served) -> int:
    with (
        socket.create_connection((HOST, served.port), TIMEOUT) as raw,
        served.context().wrap_socket(raw, server_hostname=NAME) as tls,
    ):
        tls.recv(65_536)  # WELCOME, which comes after them
        session = tls.session
        return int(session is not None and session.has_ticket)


def errors(served: Served, house: House) -> Finding:
    """Failures of every kind: the right alert, nothing told, each counted."""

    async def counts(place: Place) -> dict[str, int]:
        operator = await Operator.connect(NAME, HOST, served.port, served.ca_file, house.operator)
        try:
            failures: dict[str, int] = (await operator.call("server.stats", {}))["tls_failures"]
            return failures
        finally:
            await operator.leave()

    before = served.talk(counts)
    cases: list[tuple[str, bytes, str, int | None]] = [
        ("TLS 1.2", client_hello((TLS_1_2,), OLD_SUITES), "unsupported_version", PROTOCOL_VERSION),
        ("other suites", client_hello(suites=(0x1301,)), "no_shared_suite", HANDSHAKE_FAILURE),
        ("another protocol", client_hello(alpn=(b"h2",)), "no_application_protocol", NO_APPLICATION_PROTOCOL),
        ("plain HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "", None),
        ("garbage", b"\x00\xff" * 200, "", None),
    ]
    facts, answers = Facts(), []
    for what, data, _, alert in cases:
        answer = ask(served.port, data)
        answers.append((what, answer))
        if alert is not None:
            facts.note(f"{what}: alert {alert}", answer.alert == alert, answer)
    said = dict(answers)
    facts.note(
        "plain HTTP gets 400 and is closed",
        said["plain HTTP"].plain.startswith(b"HTTP/1.1 400 "),
        said["plain HTTP"],
    )
    facts.note(
        "garbage is closed", said["garbage"] == Answer() or said["garbage"].alert is not None, said["garbage"]
    )
    for what, answer in answers:
        text = answer.plain.decode("latin-1")
        facts.note(f"{what}: nothing is told", not any(word in text for word in LEAKS), answer)
    after = served.talk(counts)
    grown = {cause: count - before.get(cause, 0) for cause, count in after.items()}
    for _, _, cause, _ in cases[:3]:
        facts.note(f"counted as {cause}", grown.get(cause, 0) >= 1, grown)
    facts.note("all were counted", sum(grown.values()) >= len(cases), grown)
    facts.note("the server goes on", bool(served.leaf()))
    return facts.finding(f"{len(cases)} kinds, each with its alert, counted by cause")
