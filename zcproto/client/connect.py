"""`connect` and `connect_blocking`: the two ways to a server; `enroll`: how a device becomes known to one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from zcproto.client.blocking import BlockingClient
from zcproto.client.client import CONNECT_TIMEOUT, DEFAULT_TIMEOUT, Client
from zcproto.client.device import Device
from zcproto.client.events import Event
from zcproto.tls.context import Passphrase


def connect(
    address: str,
    *,
    user: str | None = None,
    key: str | None = None,
    ca_file: str | Path | None = None,
    pins: Iterable[str] | str = (),
    system_store: bool = False,
    verify: bool = True,
    server_hostname: str | None = None,
    certificate: str | Path | None = None,
    key_file: str | Path | None = None,
    key_passphrase: Passphrase | None = None,
    device: Device | str | Path | None = None,
    device_name: str | None = None,
    session: bool = True,
    timeout: float | None = DEFAULT_TIMEOUT,
    connect_timeout: float = CONNECT_TIMEOUT,
    client: str | None = None,
    on_event: Callable[[Event], object] | None = None,
    home: str | Path | None = None,
    key_log_file: str | Path | None = None,
) -> Client:
    """A client of the server at `host`, `host:port` or `[::1]:port`; the port is 7443 by default.

        async with zcproto.connect("host:7443", user="ada", key=key, ca_file="ca.crt") as client:
            print(await client.call("echo", word="hello"))

    user, key         whose session is opened; without a key the certificate says whose, and must name `user` if
                      there is one; with neither only public methods can be called
    ca_file           the CA whose certificates are believed; without it and pins, the system's store is asked
    pins              `sha256/BASE64` of the server's public key (several: the ones to come), or `cert-sha256/...`,
                      as a list, or as one text between commas or white space;
                      with `ca_file` or `system_store` on top of it, else in its place: then dates and name of
                      the certificate are still checked
    verify            False believes any server. Refused for hosts that were seen with an `sts` policy
    server_hostname   the name that the certificate must be for, if not the host's
    certificate       PEM file of this client's certificate, for servers that ask for one, with the CAs between it
                      and the one that they know; read again for the next connection when it was renewed
    key_file          its key, which must be its owner's alone; without it the key is in the same file
    key_passphrase    of an encrypted key: a text, or a function that returns it and is called when it is needed
    device            whose key opens the session, in place of user and key: a Device, or the file of its key
    device_name       the name under which it was enrolled
    session           False opens none at connecting; `open_session` does later
    timeout           of a call, in seconds, unless the call says another; None waits for ever
    connect_timeout   of one attempt to connect, in seconds
    client            product/version, as the server lists it
    on_event          called with each `Event` that the server sends; without it they wait in `client.events`
    home              where hosts with a policy are remembered; ZCPROTO_HOME, else ~/.zeroclaw, by default
    key_log_file      a file that the secrets of all connections are appended to, so that Wireshark can show their
                      frames; whoever has it can read what was captured of them. SSLKEYLOGFILE is ignored

    Raises ConfigError for what cannot be meant, TlsError for a malformed pin, CertificateError for a device's key
    that cannot be used; connecting raises what
    `Client.open` does.
    """
    return Client(
        address,
        user=user,
        key=key,
        ca_file=ca_file,
        pins=pins,
        system_store=system_store,
        verify=verify,
        server_hostname=server_hostname,
        certificate=certificate,
        key_file=key_file,
        key_passphrase=key_passphrase,
        device=device,
        device_name=device_name,
        session=session,
        timeout=timeout,
        connect_timeout=connect_timeout,
        client=client,
        on_event=on_event,
        home=home,
        key_log_file=key_log_file,
    )


def connect_blocking(
    address: str,
    *,
    user: str | None = None,
    key: str | None = None,
    ca_file: str | Path | None = None,
    pins: Iterable[str] | str = (),
    system_store: bool = False,
    verify: bool = True,
    server_hostname: str | None = None,
    certificate: str | Path | None = None,
    key_file: str | Path | None = None,
    key_passphrase: Passphrase | None = None,
    device: Device | str | Path | None = None,
    device_name: str | None = None,
    session: bool = True,
    timeout: float | None = DEFAULT_TIMEOUT,
    connect_timeout: float = CONNECT_TIMEOUT,
    client: str | None = None,
    on_event: Callable[[Event], object] | None = None,
    home: str | Path | None = None,
    key_log_file: str | Path | None = None,
) -> BlockingClient:
    """As `connect`, for programs without an event loop. `on_event` is called in the client's own thread.

    with zcproto.connect_blocking("host:7443", user="ada", key=key, ca_file="ca.crt") as client:
        print(client.call("echo", word="hello"))
    """
    return BlockingClient(
        Client(
            address,
            user=user,
            key=key,
            ca_file=ca_file,
            pins=pins,
            system_store=system_store,
            verify=verify,
            server_hostname=server_hostname,
            certificate=certificate,
            key_file=key_file,
            key_passphrase=key_passphrase,
            device=device,
            device_name=device_name,
            session=session,
            timeout=timeout,
            connect_timeout=connect_timeout,
            client=client,
            on_event=on_event,
            home=home,
            key_log_file=key_log_file,
        )
    )


async def enroll(
    address: str,
    code: str,
    device: Device,
    name: str,
    *,
    ca_file: str | Path | None = None,
    pins: Iterable[str] | str = (),
    system_store: bool = False,
    server_hostname: str | None = None,
    timeout: float | None = DEFAULT_TIMEOUT,  # noqa: ASYNC109  it bounds more than one wait
    home: str | Path | None = None,
) -> str:
    """Trade a code of `zcproto pair` for a device that the server knows by `name`; returns whose device that is.

        device = zcproto.Device.create("laptop.key")
        await zcproto.enroll("host:7443", "7D9K-X2MP", device, "laptop", ca_file="ca.crt")

    From then on `connect(..., device=device, device_name="laptop")` opens sessions of that user. Options as in
    `connect`. Raises Unauthenticated for a code that is not good, AlreadyExists for a name that is taken (the code
    stays good), and what connecting raises.
    """
    client = connect(
        address,
        ca_file=ca_file,
        pins=pins,
        system_store=system_store,
        server_hostname=server_hostname,
        session=False,
        timeout=timeout,
        home=home,
    )
    async with client:
        enrolled = await client.call("device.enroll", code=code, public_key=device.public_key, name=name)
    return str(enrolled["user"])


def enroll_blocking(
    address: str,
    code: str,
    device: Device,
    name: str,
    *,
    ca_file: str | Path | None = None,
    pins: Iterable[str] | str = (),
    system_store: bool = False,
    server_hostname: str | None = None,
    timeout: float | None = DEFAULT_TIMEOUT,
    home: str | Path | None = None,
) -> str:
    """As `enroll`, for programs without an event loop."""
    client = connect_blocking(
        address,
        ca_file=ca_file,
        pins=pins,
        system_store=system_store,
        server_hostname=server_hostname,
        session=False,
        timeout=timeout,
        home=home,
    )
    with client:
        enrolled = client.call("device.enroll", code=code, public_key=device.public_key, name=name)
    return str(enrolled["user"])
