"""A server that agrees on no suite but TLS_AES_128_GCM_SHA256, as a process of its own: see `scenarios/trust.py`.

    OPENSSL_CONF=FILE python -m zcproto_conformance.other_suite PEM SECONDS

No public API of Python before 3.15 chooses the suites of TLS 1.3; OpenSSL's configuration does, for a whole
process. It prints its port, takes one connection, greets it, and prints what became of it: `refused`, or the suite
and how many frames came.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Final

from zcproto.common.clock import system_clock, system_entropy
from zcproto_conformance.errors import CheckFailed
from zcproto_conformance.link import Ended
from zcproto_conformance.server import ScriptedServer, tls_context

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
    print(server.port, flush=True)  # noqa: T201 - it is how the kit learns it
    link = await server.connection()
    try:
        await link.handshake(tls_context(pem))
    except CheckFailed:
        print("refused")  # noqa: T201 - see above
    else:
        link.welcome()
        with contextlib.suppress(Ended):  # what is wanted
            await link.any_frame("the end")
        print(link.suite, link.frames_seen)  # noqa: T201 - see above
    await server.stop()


if __name__ == "__main__":
    asyncio.run(serve_one(Path(sys.argv[1]), float(sys.argv[2])))
