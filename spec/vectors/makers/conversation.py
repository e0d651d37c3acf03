"""One conversation from WELCOME to the end, as JSON and as text for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from makers.forms import ALL_KINDS, NO_TOKEN, NOW, TOKEN, Frame, pack
from makers.frames import OPENED, WELCOME
from makers.shape import typed

SUBJECT = "One conversation from WELCOME to the end. Each frame is valid after those before it."
STREAMING_SUBJECT = "A conversation with a stream of items and a call from the server."
_NAMES = {code: name for name, code in ALL_KINDS.items()}
_NUMBERED = {"OPEN": "stream", "ITEM": "stream", "CREDIT": "stream", "CALL": "call", "RESULT": "call"}
_KEY = "c3RhbmRzIGZvciBhIGtleSBvZiAzMiBieXRlcy4uLi4"


@dataclass(frozen=True)
class Step:
    """One frame, and the content of its body."""

    sender: str
    title: str
    comment: str
    frame: Frame
    value: Any = None


class Conversation:
    """Frames in order, each side with its own counter."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._counters = {"server": -1, "client": 0}  # WELCOME has 0, the client begins with 1

    def add(
        self,
        sender: str,
        kind: str,
        after_ms: int,
        comment: str,
        *value: Any,
        stream: int = 0,
        title: str = "",
        token: bytes = NO_TOKEN,
    ) -> None:
        self._counters[sender] += 1
        body = pack(value[0]) if value else b""
        frame = Frame(
            ALL_KINDS[kind],
            stream=stream,
            body=body,
            counter=self._counters[sender],
            timestamp=NOW + after_ms,
            token=token,
        )
        self.steps.append(Step(sender, title or kind, comment, frame, *value))


def steps() -> list[Step]:
    conversation = Conversation()
    add = conversation.add
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
    return conversation.steps


def streaming_steps() -> list[Step]:
    """Return a conversation with a stream of items and a call from the server."""
    conversation = Conversation()
    add = conversation.add
    of: dict[str, Any] = {"stream": 2, "token": TOKEN}
    announced = {"streams": {"max_open": 64, "max_item": 65_536}, "calls": {"max": 32}}
    add("server", "WELCOME", 0, "The server announces streams and calls.", WELCOME | announced)
    add(
        "client",
        "REQUEST",
        40,
        "The client shows the token of a session, and registers a method of its own for it.",
        ["session.handle", {"methods": ["approve"], "max": 4}],
        stream=1,
        title="REQUEST session.handle",
        token=TOKEN,
    )
    add("server", "RESPONSE", 41, "From here on the server may call it.", {}, stream=1, token=TOKEN)
    add(
        "client",
        "OPEN",
        80,
        "The client opens a stream and asks for two items.",
        ["tokens", {"prompt": "hi"}, {"credit": [2, 65_536]}],
        title="OPEN tokens",
        **of,
    )
    add("server", "ITEM", 95, "The first item.", "Hel", **of)
    add(
        "server",
        "ITEM",
        96,
        "The second. The credit is used up: the method waits.",
        "lo",
        **of,
    )
    add(
        "server",
        "CALL",
        97,
        "The server calls the client. Its numbers are independent of the client's: 2 is in flight in both.",
        ["approve", {"tool": "shell"}, {"deadline_ms": 120_000}],
        title="CALL approve",
        **of,
    )
    add(
        "client",
        "CREDIT",
        120,
        "The application has taken both items: four items in total, two more.",
        [4, 131_072],
        **of,
    )
    add("server", "ITEM", 121, "The third.", "!", **of)
    add(
        "server",
        "RESPONSE",
        122,
        "The method has returned: the end of the stream.",
        {"tokens": 3},
        **of,
    )
    add("client", "RESULT", 4_000, "A person has approved.", True, **of)
    return conversation.steps


def as_json(steps: list[Step]) -> list[dict[str, Any]]:
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
        for step in steps
    ]


def as_text(steps: list[Step]) -> str:
    """Return a conversation as Markdown."""
    parts = []
    for number, step in enumerate(steps, 1):
        arrow = "S -> C" if step.sender == "server" else "C -> S"
        parts.append(f"**{number}. {arrow} {step.title}**\n\n{step.comment}\n\n```text\n{_dump(step)}\n```\n")
    return "\n".join(parts)


def _dump(step: Step) -> str:
    frame = step.frame
    data = frame.encode()
    what = _NUMBERED.get(_NAMES[frame.kind], "request")
    stream = "the connection" if frame.stream == 0 else f"{what} {frame.stream}"
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
