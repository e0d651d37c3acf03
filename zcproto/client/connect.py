"""The entry points: connect, with or without an event loop, and enroll a device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict, Unpack

from zcproto.client.blocking import BlockingClient
from zcproto.client.client import Client
from zcproto.client.credentials import Device
from zcproto.client.options import ConnectOptions, accept_options


class EnrollOptions(TypedDict, total=False):
    """The options of ConnectOptions that apply before a device can log in."""

    ca_file: str | Path | None
    pins: Iterable[str] | str
    system_store: bool
    server_hostname: str | None
    timeout: float | None
    home: str | Path | None


@accept_options(ConnectOptions)
def connect(address: str, options: ConnectOptions) -> Client:
    """Return a client of the server at `host`, `host:port` or `[::1]:port`. The default port is 7443.

        async with zcproto.connect("host:7443", user="ada", key=key, ca_file="ca.crt") as client:
            print(await client.call("echo", word="hello"))

    ConnectOptions documents the options. Raises ConfigError for options that contradict each other, TlsError for a
    malformed pin, CertificateError for an unusable device key. `async with` raises like `Client.open`.
    """
    return Client(address, options)


@accept_options(ConnectOptions)
def connect_blocking(address: str, options: ConnectOptions) -> BlockingClient:
    """Return a client for programs without an event loop; otherwise the same as `connect`.

        with zcproto.connect_blocking("host:7443", user="ada", key=key, ca_file="ca.crt") as client:
            print(client.call("echo", word="hello"))

    `on_event` is called in the client's thread.
    """
    return BlockingClient(Client(address, options))


async def enroll(address: str, code: str, device: Device, name: str, **options: Unpack[EnrollOptions]) -> str:
    """Enroll a device as `name` with a code of `zcproto pair`. Return the user whose sessions it can open.

        device = zcproto.Device.create("laptop.key")
        await zcproto.enroll("host:7443", "7D9K-X2MP", device, "laptop", ca_file="ca.crt")

    Afterwards `connect(..., device=device, device_name="laptop")` opens sessions of that user. ConnectOptions
    documents the options. Raises Unauthenticated for an invalid code, AlreadyExists for a name in use (the code
    stays valid), and like `connect` and `Client.open`.
    """
    async with connect(address, session=False, **options) as client:
        enrolled = await client.call("device.enroll", code=code, public_key=device.public_key, name=name)
    return str(enrolled["user"])


def enroll_blocking(
    address: str, code: str, device: Device, name: str, **options: Unpack[EnrollOptions]
) -> str:
    """Enroll a device like `enroll`, in a program without an event loop."""
    with connect_blocking(address, session=False, **options) as client:
        enrolled = client.call("device.enroll", code=code, public_key=device.public_key, name=name)
    return str(enrolled["user"])
