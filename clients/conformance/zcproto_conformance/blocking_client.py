"""The program that drives the blocking Python client: `python -m zcproto_conformance.blocking_client`.

It has the steps of zcproto_conformance/blocking.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import zcproto.client
from zcproto.client.blocking import BlockingClient, BlockingStream
from zcproto.client.client import default_client
from zcproto.client.handlers import Call
from zcproto.errors import CallError
from zcproto_conformance.blocking import Api, BlockingConform, Failure, Hold, Step, Wait
from zcproto_conformance.python_client import KNOWN, describe

_MS: Final = 1000


class OpenStream(NamedTuple):
    """A stream, which its first item opens."""

    stream: BlockingStream
    items: Iterator[Any]


class PythonApi(Api):
    """The blocking client, without steps that send items, cancel or cut."""

    name = default_client()

    def connect(self, step: Step) -> BlockingClient:
        names = {"ca_file": "ca_file", "user": "user", "key": "key", "server_name": "server_hostname"}
        options: dict[str, Any] = {option: step[name] for name, option in names.items() if name in step}
        if "timeout_ms" in step:
            options["timeout"] = step["timeout_ms"] / _MS
        client = zcproto.client.connect_blocking(step["address"], home=Path(step["home"]), **options)
        client.open()
        return client

    def call(self, client: BlockingClient, method: str, params: Any, step: Step) -> Wait:
        options: dict[str, Any] = {}
        if "timeout_ms" in step:
            options["timeout"] = step["timeout_ms"] / _MS
        return lambda: client.call(method, params, idempotency_key=step.get("idempotency_key"), **options)

    def open(self, client: BlockingClient, method: str, params: Any, step: Step) -> OpenStream:
        stream = client.stream(method, params)
        return OpenStream(stream, iter(stream))

    def next(self, stream: OpenStream) -> dict[str, Any]:
        for item in stream.items:
            return {"item": item}
        return {"end": stream.stream.result}

    def handle(self, client: BlockingClient, method: str, hold: Hold) -> None:
        @client.handler(method)
        def _(call: Call, tool: str | None = None, number: int | None = None) -> Any:
            params = {"tool": tool, "number": number}
            given = {name: value for name, value in params.items() if value is not None}
            try:
                return hold(call.method, call.user, given)()
            except Failure as failure:
                raise CallError.from_wire(failure.code, str(failure), {}) from None

    def session(self, client: BlockingClient) -> dict[str, Any] | None:
        session = client.session
        if session is None:
            return None
        return {"id": session.id, "user": session.user, "expires_at": session.expires_at}

    def open_session(self, client: BlockingClient) -> None:
        client.open_session()

    def close(self, client: BlockingClient) -> None:
        client.close()

    def describe(self, error: Exception) -> dict[str, Any]:
        if not isinstance(error, KNOWN):
            raise error
        return describe(error)


def main() -> None:
    BlockingConform(PythonApi()).run()


if __name__ == "__main__":
    main()
