"""What all of them share: the certificate, TLS 1.3 alone, and their end with the parent."""

from __future__ import annotations

import asyncio
import ssl
import sys
from typing import Final

HOST: Final = "127.0.0.1"
BACKLOG: Final = 4_096


def certificate() -> tuple[str, str]:
    """Return the files of the certificate and its key, from the command line."""
    _, certificate_file, key_file = sys.argv
    return certificate_file, key_file


def tls_context() -> ssl.SSLContext:
    """Return a default context of the standard library, for TLS 1.3 alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(*certificate())
    return context


def listening(port: int) -> None:
    """Print the port, once connections are accepted."""
    print(port, flush=True)


async def until_parent_ends() -> None:
    """Wait for the end of standard input."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(sys.stdin, ended.set)
    await ended.wait()
    loop.remove_reader(sys.stdin)
