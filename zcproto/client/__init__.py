"""The Python client: every call gets an answer or a clear error, whatever happens to connections.

    options -> client, blocking -> session -> credentials
                      |         -> handlers, streams
                      |         -> connections -> endpoints, dial -> protocol

`client` runs the calls of a session and retries them by the table in `retry`. `session` opens and refreshes a
session with `credentials`. `handlers` runs the functions that the server calls, and queues its events.
`connections` reconnects with `dial`, which returns a `protocol`: one connection with its calls. `endpoints` decides
which server is tried when. `typed` is the base of the modules that `zcproto stubs` writes.
"""

from zcproto.client.blocking import BlockingClient, BlockingUserSession, connect_blocking, enroll_blocking
from zcproto.client.client import Client, UserSession, connect, enroll
from zcproto.client.credentials import Device
from zcproto.client.endpoints import Endpoint
from zcproto.client.handlers import Call, Event, EventStream
from zcproto.client.options import ConnectOptions
from zcproto.client.session import ClientSession
from zcproto.client.streams import OutgoingCall

__all__ = [
    "BlockingClient",
    "BlockingUserSession",
    "Call",
    "Client",
    "ClientSession",
    "ConnectOptions",
    "Device",
    "Endpoint",
    "Event",
    "EventStream",
    "OutgoingCall",
    "UserSession",
    "connect",
    "connect_blocking",
    "enroll",
    "enroll_blocking",
]
