"""The Python client: every call gets an answer or a clear error, whatever happens to connections.

    options -> client, blocking -> session_client -> session -> credentials
                      |                           -> registration -> handlers
                      |         -> connections -> endpoints, further, dial -> protocol

`session_client` runs the calls of one session and retries them by the table in `retry`; `client` is one, and has
one for each other user. `session` opens and refreshes a session with `credentials`. `handlers` runs the functions
that the server calls, `registration` keeps them registered. `connections` reconnects with `dial`, which returns a
`protocol`: one connection with its calls. `endpoints` decides which server is tried when, `further` adds
connections for calls that have no room on the first. `known_hosts` stores `sts` policies, `events` queues the
server's events, `middleware` runs the application's functions around calls, `address` parses HOST:PORT.
"""

from zcproto.client.address import Endpoint
from zcproto.client.blocking import BlockingClient, BlockingUserSession, connect_blocking, enroll_blocking
from zcproto.client.client import Client, UserSession, connect, enroll
from zcproto.client.credentials import Device
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
