"""Several servers in threads, with clients, for tests of what one leaves to the next.

one = servers.start()
client = servers.client(one, "ada")
end(one, client)
again = servers.client(servers.start(), token=client.token)
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.server.helpers import NO_TOKEN, AnsweredError, Client, ServerThread


class Servers:
    """Servers with the same settings, and their clients, which end with `stack`."""

    def __init__(self, folder: Path, certs: Path, stack: ExitStack, **settings: Any) -> None:
        self._folder = folder
        self._certs = certs
        self._stack = stack
        self._settings = settings

    def start(self, home: str = "home", **settings: Any) -> ServerThread:
        """Start a server with a home folder of this name."""
        settings = {**self._settings, **settings}
        return self._stack.enter_context(ServerThread(self._folder / home, self._certs, **settings))

    def client(self, server: ServerThread, user: str | None = None, token: bytes | None = None) -> Client:
        client = self._stack.enter_context(server.client(user))
        client.token = token or client.token
        return client


def end(server: ServerThread, *clients: Client) -> None:
    """Drain a server and close its clients."""
    server.begin_drain()
    for client in clients:
        client.rest_until_closed()
        client.close()
    server.join()


def refresh_params(client: Client) -> dict[str, Any]:
    return {"refresh_token": client.opened["refresh_token"], "client": "test/1"}


def refresh(client: Client) -> dict[str, Any]:
    """Refresh the session of a client, which uses the new token from now on."""
    client.opened = client.call("session.refresh", refresh_params(client), token=NO_TOKEN)
    client.token = client.opened["token"]
    return client.opened


def refused_with(client: Client, token: bytes) -> int | None:
    """Return the code by which a token is refused; None if it is accepted."""
    try:
        client.call("echo", {"n": 1}, token=token)
    except AnsweredError as answered:
        return answered.code
    return None
