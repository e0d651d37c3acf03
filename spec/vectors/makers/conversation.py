"""One conversation from WELCOME to the end, as JSON and as text for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from makers.forms import KINDS, NO_TOKEN, NOW, TOKEN, Frame, pack
from makers.frames import OPENED, WELCOME
from makers.shape import typed

SUBJECT = "One conversation from WELCOME to the end. Each frame is valid after those before it."
_NAMES = {code: name for name, code in KINDS.items()}
_KEY = "c3RhbmRzIGZvciBhIGtleSBvZiAzMiBieXRlcy4uLi4"


@dataclass(frozen=True)
class Step:
    """One frame, and the content of its body."""

    sender: str
    title: str
    comment: str
    frame: Frame
    value: Any = None


def steps() -> list[Step]:
    made: list[Step] = []
    counters = {"server": -1, "client": 0}  # WELCOME has 0, the client begins with 1

    def add(
        sender: str,
        kind: str,
        after_ms: int,
        comment: str,
        *value: Any,
        stream: int = 0,
        title: str = "",
        token: bytes = NO_TOKEN,
    ) -> None:
        counters[sender] += 1
        body = pack(value[0]) if value else b""
        frame = Frame(
            KINDS[kind],
            stream=stream,
            body=body,
            counter=counters[sender],
            timestamp=NOW + after_ms,
            token=token,
        )
        made.append(Step(sender, title or kind, comment, frame, *value))

    add(
        "server",
        "WELCOME",
        0,
        "The handshake has ended. The server sends first and assigns the salt, which every later frame repeats.",
        WELCOME,
    )
    add(
        "client",
        "REQUEST",
        40,
        "The client writes the server's time: its own clock plus the offset computed from WELCOME. No token yet.",
        ["session.open", {"scheme": "api_key", "user": "ada", "key": _KEY, "client": "example/1.0"}],
        stream=1,
        title="REQUEST session.open",
    )
    add(
        "server",
        "RESPONSE",
        41,
        "The answer carries its request's token, here the zero one; the new token is in the body.",
        OPENED,
        stream=1,
    )
    add(
        "client",
        "REQUEST",
        80,
        "From here on the token is in the header. This request may take two seconds at most.",
        ["sleep", {"ms": 5000}, {"deadline_ms": 2000}],
        stream=2,
        title="REQUEST sleep",
        token=TOKEN,
    )
    add(
        "client",
        "REQUEST",
        80,
        "A second request, while the first one runs.",
        ["echo", {"text": "hi"}],
        stream=3,
        title="REQUEST echo",
        token=TOKEN,
    )
    add(
        "server",
        "RESPONSE",
        81,
        "The second is answered first: the stream identifies the request.",
        {"text": "hi"},
        stream=3,
        token=TOKEN,
    )
    add("client", "CANCEL", 500, "The client no longer needs the first result.", stream=2, token=TOKEN)
    add(
        "server",
        "ERROR",
        501,
        "A cancelled request is answered, too, exactly once.",
        [1, "cancelled by the caller"],
        stream=2,
        title="ERROR CANCELLED",
        token=TOKEN,
    )
    add("client", "PING", 30_500, "After a silence the client checks that the server is still there.")
    add("server", "PONG", 30_501, "The server answers.")
    add(
        "client",
        "REQUEST",
        61_000,
        "The client closes its session. Stream 3 is free again and could be used; a new number works as well.",
        ["session.close", None],
        stream=4,
        title="REQUEST session.close",
        token=TOKEN,
    )
    add(
        "server",
        "RESPONSE",
        61_001,
        "The token is dead from here on. The client sends close_notify, the server too, and both close.",
        {},
        stream=4,
        token=TOKEN,
    )
    return made


def as_json() -> list[dict[str, Any]]:
    return [
        {
            "from": step.sender,
            "title": step.title,
            "comment": step.comment,
            "kind": _NAMES[step.frame.kind],
            "bytes": step.frame.encode().hex(),
            "body": typed(step.value) if step.frame.body else {"empty": True},
            "now": str(step.frame.timestamp),
        }
        for step in steps()
    ]


def as_text() -> str:
    """Return the conversation as Markdown."""
    parts = []
    for number, step in enumerate(steps(), 1):
        arrow = "S -> C" if step.sender == "server" else "C -> S"
        parts.append(f"**{number}. {arrow} {step.title}**\n\n{step.comment}\n\n```text\n{_dump(step)}\n```\n")
    return "\n".join(parts)


def _dump(step: Step) -> str:
    frame = step.frame
    data = frame.encode()
    stream = "the connection" if frame.stream == 0 else f"request {frame.stream}"
    token = "none" if frame.token == bytes(32) else "the session's"
    lines = []
    for name, start, end, meaning in (
        ("length", 0, 4, str(frame.real_length)),
        ("version", 4, 5, "1"),
        ("kind", 5, 6, _NAMES[frame.kind]),
        ("flags", 6, 8, "none"),
        ("stream", 8, 12, stream),
        ("timestamp", 12, 20, str(frame.timestamp)),
        ("salt", 20, 28, "the connection's"),
        ("counter", 28, 36, str(frame.counter)),
        ("token", 36, 68, token),
        ("body", 68, len(data), _diagnose(step.value) if step.frame.body else "empty"),
    ):
        rows = [data[at : min(at + 16, end)].hex(" ") for at in range(start, end, 16)] or [""]
        if name == "body" and step.frame.body:
            lines += [f"{name:<11}{rows[0]}", *(f"{'':<11}{row}" for row in rows[1:])]
            lines += [f"{'':<11}{line}" for line in _wrap(meaning)]
        else:
            lines.append(f"{name:<11}{rows[0]:<49}{meaning}".rstrip() if rows[0] else f"{name:<11}{meaning}")
            lines += [f"{'':<11}{row}" for row in rows[1:]]
    return "\n".join(lines)


def _diagnose(value: Any) -> str:
    match value:
        case None:
            return "nil"
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case bytes():
            return f"h'{value.hex()}'"
        case list():
            return "[" + ", ".join(map(_diagnose, value)) + "]"
        case dict():
            return "{" + ", ".join(f'"{key}": {_diagnose(item)}' for key, item in value.items()) + "}"
    return str(value)


def _wrap(text: str, width: int = 78) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return [f"= {lines[0]}", *(f"  {line}" for line in lines[1:])]
