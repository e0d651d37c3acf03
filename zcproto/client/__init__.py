"""The Python client: every call gets an answer or a clear error, whatever happens to connections.

    options -> client, blocking -> session -> credentials
                      |         -> registration -> handlers
                      |         -> connections -> dial -> protocol

`client` runs calls and retries them by the table in `retry`. `session` opens and refreshes the session with
`credentials`. `connections` reconnects with `dial`, which returns a `protocol`: one connection with its calls.
`handlers` runs the functions that the server calls, `registration` keeps them registered.
`known_hosts` stores `sts` policies, `events` queues the server's events, `address` parses HOST:PORT.
"""

from zcproto.client.blocking import BlockingClient, connect_blocking, enroll_blocking
from zcproto.client.client import Client, connect, enroll
from zcproto.client.credentials import Device
from zcproto.client.events import Event, EventStream
from zcproto.client.handlers import Call
from zcproto.client.options import ConnectOptions
from zcproto.client.session import ClientSession

__all__ = [
    "BlockingClient",
    "Call",
    "Client",
    "ClientSession",
    "ConnectOptions",
    "Device",
    "Event",
    "EventStream",
    "connect",
    "connect_blocking",
    "enroll",
    "enroll_blocking",
]
