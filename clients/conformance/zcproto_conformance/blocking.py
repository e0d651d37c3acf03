"""Steps of the kit for clients whose functions block: each step runs in a thread of its own.

A client is driven through an `Api`. There are no steps for vectors, which do not depend on whether a client blocks.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from zcproto_conformance.values import typed, untyped

KIT: Final = 1
THREAD_BYTES: Final = 256 * 1024
"""Stack of a thread: there are as many as steps that wait."""

Step = Mapping[str, Any]
Wait = Callable[[], Any]
"""Waits for a result, and returns it."""
Hold = Callable[[str, str, Mapping[str, Any]], Wait]
"""Called with the method, the user and the params of a call of the server. Returns what waits for the answer."""


class Failure(Exception):
    """The answer to a call of the server is an error."""

    def __init__(self, code: int) -> None:
        super().__init__("failed by the scenario")
        self.code = code


class Api:
    """A blocking client. Values are those of Python; errors are of the client.

    Steps whose methods raise NotImplementedError are answered as unsupported.
    """

    name: str
    """Product and version."""

    def connect(self, step: Step) -> Any:
        """Return a client with the options of the step `connect`."""
        raise NotImplementedError

    def session_for(self, client: Any, step: Step) -> Any:
        """Return a client for a session of another user on the connection of a client."""
        raise NotImplementedError

    def call(self, client: Any, method: str, params: Any, step: Step) -> Wait:
        """Begin a call with the options of the step `call`."""
        raise NotImplementedError

    def cancel(self, call: str) -> None:
        """Cancel a call by its name."""
        raise NotImplementedError

    def open(self, client: Any, method: str, params: Any, step: Step) -> Any:
        """Return a stream with the options of the step `open`."""
        raise NotImplementedError

    def next(self, stream: Any) -> dict[str, Any]:
        """Return `item` with the next item of a stream, or `end` with its result."""
        raise NotImplementedError

    def send(self, stream: Any, value: Any) -> None:
        """Send an item."""
        raise NotImplementedError

    def finish(self, stream: Any) -> None:
        """Send no more items."""
        raise NotImplementedError

    def leave(self, stream: Any) -> None:
        """Give a stream up."""
        raise NotImplementedError

    def handle(self, client: Any, method: str, hold: Hold) -> None:
        """Let the server call a method."""
        raise NotImplementedError

    def event(self, client: Any) -> dict[str, Any]:
        """Return name and data of the next event."""
        raise NotImplementedError

    def session(self, client: Any) -> dict[str, Any] | None:
        """Return id, user and expires_at of the open session."""
        raise NotImplementedError

    def open_session(self, client: Any) -> None:
        """Open another session."""
        raise NotImplementedError

    def cut(self, client: Any) -> None:
        """Destroy the connection like a network failure."""
        raise NotImplementedError

    def close(self, client: Any) -> None:
        """Close a client."""
        raise NotImplementedError

    def describe(self, error: Exception) -> dict[str, Any]:
        """Return an error of the client in the form of the kit. Raises any other error."""
        raise NotImplementedError


class BlockingConform:
    """The steps, each a method named after its step that returns the value of `ok`."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._clients: dict[str, Any] = {}
        self._calls: dict[str, Outcome] = {}
        self._streams: dict[str, Any] = {}
        self._turns: dict[str, threading.Event] = {}  # by the name of the stream: its last step of IN_TURN
        self._held: dict[str, HeldCalls] = {}
        self._output = threading.Lock()

    def hello(self, _: Step) -> Any:
        return {"kit": KIT, "client": self._api.name}

    def connect(self, step: Step) -> Any:
        return self._opened(step, self._api.connect(step))

    def session_for(self, step: Step) -> Any:
        return self._opened(step, self._api.session_for(self._clients[step["of"]], step))

    def _opened(self, step: Step, client: Any) -> Any:
        self._clients[step["client"]] = client
        self._held.setdefault(step["client"], HeldCalls())
        session = self._api.session(client)
        return {"session": None if session is None else session["id"]}

    def call(self, step: Step) -> None:
        outcome = self._calls[step["call"]] = Outcome()
        client = self._clients[step["client"]]
        try:
            wait = self._api.call(client, step["method"], untyped(step.get("params")), step)
        except Exception as error:  # raised again by `expect`
            outcome.fail(error)
        else:
            start(lambda: outcome.settle(wait))

    def expect(self, step: Step) -> Any:
        return typed(self._calls[step["call"]].result())

    def cancel(self, step: Step) -> None:
        self._api.cancel(step["call"])

    def open(self, step: Step) -> None:
        arguments = self._clients[step["client"]], step["method"], untyped(step.get("params"))
        self._streams[step["stream"]] = self._api.open(*arguments, step)

    def next(self, step: Step) -> Any:
        return {name: typed(value) for name, value in self._api.next(self._streams[step["stream"]]).items()}

    def send(self, step: Step) -> None:
        self._api.send(self._streams[step["stream"]], untyped(step["value"]))

    def finish(self, step: Step) -> None:
        self._api.finish(self._streams[step["stream"]])

    def leave(self, step: Step) -> None:
        self._api.leave(self._streams[step["stream"]])

    def handle(self, step: Step) -> None:
        self._api.handle(self._clients[step["client"]], step["method"], self._held[step["client"]].hold)

    def called(self, step: Step) -> Any:
        return self._held[step["client"]].seen.get()

    def answer(self, step: Step) -> None:
        answer = self._held[step["client"]].answers[step["call"]]
        if "code" in step:
            answer.fail(Failure(step["code"]))
        else:
            answer.settle(lambda: untyped(step["value"]))

    def event(self, step: Step) -> Any:
        event = self._api.event(self._clients[step["client"]])
        return {"name": event["name"], "data": typed(event["data"])}

    def session(self, step: Step) -> Any:
        return self._api.session(self._clients[step["client"]])

    def open_session(self, step: Step) -> Any:
        client = self._clients[step["client"]]
        self._api.open_session(client)
        return self._opened(step, client)

    def cut(self, step: Step) -> None:
        self._api.cut(self._clients[step["client"]])

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
            elif step["step"] in IN_TURN:
                self._start_in_turn(step)
            else:
                start(partial(self._execute, step))
        for client in self._clients.values():
            self._api.close(client)
        sys.stdout.flush()
        os._exit(0)  # steps may still wait in their threads

    def _start_in_turn(self, step: Step) -> None:
        """Execute a step in a thread, after the earlier ones of the same stream."""
        before, done = self._turns.get(step["stream"]), threading.Event()
        self._turns[step["stream"]] = done

        def execute() -> None:
            if before is not None:
                before.wait()
            self._execute(step)
            done.set()

        start(execute)

    def _execute(self, step: Step) -> None:
        if step["step"] not in STEPS:
            answer: dict[str, Any] = {"unsupported": f"unknown step {step['step']!r}"}
        else:
            try:
                answer = {"ok": getattr(self, step["step"])(step)}
            except NotImplementedError:
                answer = {"unsupported": f"this client has no {step['step']!r}"}
            except Exception as error:  # `describe` raises any that is not of the client
                answer = {"error": self._api.describe(error)}
        with self._output:
            sys.stdout.write(json.dumps({"id": step["id"], **answer}) + "\n")
            sys.stdout.flush()


AT_ONCE: Final = frozenset({"call", "cancel", "open", "leave", "answer", "cut"})
"""Steps that do not wait, and on which later steps depend."""

IN_TURN: Final = frozenset({"send", "finish"})

STEPS: Final = (
    AT_ONCE
    | IN_TURN
    | {
        "hello",
        "connect",
        "session_for",
        "expect",
        "next",
        "handle",
        "called",
        "event",
        "session",
        "close",
        "open_session",
    }
)


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

    def fail(self, error: Exception) -> None:
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

    def hold(self, method: str, user: str, params: Mapping[str, Any]) -> Wait:
        answer = Outcome()
        with self._lock:
            self.answers.append(answer)
            call = len(self.answers) - 1
        self.seen.put({"call": call, "method": method, "user": user, "params": typed(dict(params))})
        return answer.result


def start(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()
