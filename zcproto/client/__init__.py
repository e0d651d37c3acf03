"""Clients: calls that get their answer or a clear error, whatever connections do meanwhile."""

from zcproto.client.blocking import BlockingClient
from zcproto.client.client import Client
from zcproto.client.connect import connect, connect_blocking, enroll, enroll_blocking
from zcproto.client.device import Device
from zcproto.client.events import Event, EventStream
from zcproto.client.session import ClientSession

__all__ = [
    "BlockingClient",
    "Client",
    "ClientSession",
    "Device",
    "Event",
    "EventStream",
    "connect",
    "connect_blocking",
    "enroll",
    "enroll_blocking",
]
