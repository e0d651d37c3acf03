"""A server that accepts only TLS_AES_128_GCM_SHA256, run as a subprocess by `scenarios/trust.py`.

    OPENSSL_CONF=FILE python -m zcproto_conformance.single_suite_server PEM SECONDS

Before Python 3.15 only OpenSSL's configuration, which applies to a whole process, can restrict the suites of
TLS 1.3. The server prints its port, accepts one connection, sends WELCOME, and prints the outcome:
`refused`, or the suite and the number of frames received.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Final

from zcproto.common.clock import system_clock, system_entropy
from zcproto_conformance.connection import ConnectionEnded
from zcproto_conformance.errors import CheckFailed
from zcproto_conformance.scripted_server import ScriptedServer, tls_context

SUITE: Final = "TLS_AES_128_GCM_SHA256"
CONFIGURATION: Final = f"""\
openssl_conf = init
[init]
ssl_conf = ssl
[ssl]
system_default = all
[all]
Ciphersuites = {SUITE}
"""


async def serve_one(pem: Path, patience: float) -> None:
    server = ScriptedServer(system_clock, system_entropy, patience=patience)
    await server.start()
    print(server.port, flush=True)  # noqa: T201 - the interface of this process
    connection = await server.next_connection()
    try:
        await connection.handshake(tls_context(pem))
    except CheckFailed:
        print("refused")  # noqa: T201 - see above
    else:
        connection.welcome()
        with contextlib.suppress(ConnectionEnded):  # the expected outcome
            await connection.next_raw_frame("ending the connection")
        print(connection.suite, connection.frames_received)  # noqa: T201 - see above
    await server.stop()


if __name__ == "__main__":
    asyncio.run(serve_one(Path(sys.argv[1]), float(sys.argv[2])))
