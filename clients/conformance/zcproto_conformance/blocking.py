"""Steps of the kit for clients whose functions block: each step runs in a thread of its own.

A client is driven through an `Api`. There are no steps for vectors, which do not depend on whether a client blocks,
and none that send items, cancel or cut.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, Protocol

from zcproto_conformance.values import typed, untyped

KIT: Final = 1
THREAD_BYTES: Final = 256 * 1024
"""Stack of a thread: there are as many as steps that wait."""

Step = Mapping[str, Any]
Hold = Callable[[str, str, Mapping[str, Any]], Any]
"""Called with the method, the user and the params of a call of the server. Waits, and returns the answer."""


class Api(Protocol):
    """A blocking client. Values are those of Python; errors are of the client."""

    name: str
    """Product and version."""

    def connect(self, step: Step) -> Any:
        """Return a client with the options of the step `connect`."""

    def call(self, client: Any, method: str, params: Any, step: Step) -> Any:
        """Return the result of a call with the options of the step `call`."""

    def open(self, client: Any, method: str, params: Any) -> Any:
        """Return a stream."""

    def next(self, stream: Any) -> dict[str, Any]:
        """Return `item` with the next item of a stream, or `end` with its result."""

    def handle(self, client: Any, method: str, hold: Hold) -> None:
        """Let the server call a method."""

    def session(self, client: Any) -> dict[str, Any] | None:
        """Return id, user and expires_at of the open session."""

    def open_session(self, client: Any) -> None:
        """Open another session."""

    def close(self, client: Any) -> None:
        """Close a client."""

    def describe(self, error: Exception) -> dict[str, Any]:
        """Return an error of the client in the form of the kit. Raises any other error."""


class BlockingConform:
    """The steps, each a method named after its step that returns the value of `ok`."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._clients: dict[str, Any] = {}
        self._calls: dict[str, Outcome] = {}
        self._streams: dict[str, Any] = {}
        self._held: dict[str, HeldCalls] = {}
        self._output = threading.Lock()

    def hello(self, _: Step) -> Any:
        return {"kit": KIT, "client": self._api.name}

    def connect(self, step: Step) -> Any:
        client = self._clients[step["client"]] = self._api.connect(step)
        session = self._api.session(client)
        return {"session": None if session is None else session["id"]}

    def call(self, step: Step) -> None:
        outcome = self._calls[step["call"]] = Outcome()
        client = self._clients[step["client"]]
        arguments = (client, step["method"], untyped(step.get("params")), step)
        start(lambda: outcome.settle(lambda: self._api.call(*arguments)))

    def expect(self, step: Step) -> Any:
        return typed(self._calls.pop(step["call"]).result())

    def open(self, step: Step) -> None:
        client = self._clients[step["client"]]
        self._streams[step["stream"]] = self._api.open(client, step["method"], untyped(step.get("params")))

    def next(self, step: Step) -> Any:
        return {name: typed(value) for name, value in self._api.next(self._streams[step["stream"]]).items()}

    def handle(self, step: Step) -> None:
        held = self._held.setdefault(step["client"], HeldCalls())
        self._api.handle(self._clients[step["client"]], step["method"], held.hold)

    def called(self, step: Step) -> Any:
        return self._held[step["client"]].seen.get()

    def answer(self, step: Step) -> None:
        self._held[step["client"]].answers[step["call"]].settle(lambda: untyped(step["value"]))

    def session(self, step: Step) -> Any:
        return self._api.session(self._clients[step["client"]])

    def open_session(self, step: Step) -> Any:
        client = self._clients[step["client"]]
        self._api.open_session(client)
        session = self._api.session(client)
        return {"session": None if session is None else session["id"]}

    def close(self, step: Step) -> None:
        client = self._clients.pop(step["client"], None)
        if client is not None:  # None: its connect step failed
            self._api.close(client)

    # --- the program --------------------------------------------------------------------------------

    def run(self) -> None:
        """Execute the steps from standard input until it ends."""
        threading.stack_size(THREAD_BYTES)
        for line in sys.stdin:
            step = json.loads(line)
            if step["step"] in AT_ONCE:
                self._execute(step)
            else:
                start(partial(self._execute, step))
        for client in self._clients.values():
            self._api.close(client)
        sys.stdout.flush()
        os._exit(0)  # steps may still wait in their threads

    def _execute(self, step: Step) -> None:
        if step["step"] not in STEPS:
            answer: dict[str, Any] = {"unsupported": f"unknown step {step['step']!r}"}
        else:
            try:
                answer = {"ok": getattr(self, step["step"])(step)}
            except Exception as error:  # `describe` raises any that is not of the client
                answer = {"error": self._api.describe(error)}
        with self._output:
            sys.stdout.write(json.dumps({"id": step["id"], **answer}) + "\n")
            sys.stdout.flush()


AT_ONCE: Final = frozenset({"call", "open", "answer"})
"""Steps that do not wait, and on which later steps depend."""

STEPS: Final = AT_ONCE | {
    "hello",
    "connect",
    "expect",
    "next",
    "handle",
    "called",
    "session",
    "close",
    "open_session",
}


class Outcome:
    """A result or an error, which threads can wait for."""

    def __init__(self) -> None:
        self._settled = threading.Event()
        self._result: Any = None
        self._error: Exception | None = None

    def settle(self, work: Callable[[], Any]) -> None:
        try:
            self._result = work()
        except Exception as error:  # raised again by `result`
            self._error = error
        self._settled.set()

    def result(self) -> Any:
        self._settled.wait()
        if self._error is not None:
            raise self._error
        return self._result


class HeldCalls:
    """Calls of the server to one client, held until a step answers them."""

    def __init__(self) -> None:
        self.answers: list[Outcome] = []  # by the number of the call
        self.seen: queue.Queue[dict[str, Any]] = queue.Queue()
        self._lock = threading.Lock()

    def hold(self, method: str, user: str, params: Mapping[str, Any]) -> Any:
        answer = Outcome()
        with self._lock:
            self.answers.append(answer)
            call = len(self.answers) - 1
        self.seen.put({"call": call, "method": method, "user": user, "params": typed(dict(params))})
        return answer.result()


def start(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()
