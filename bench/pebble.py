"""Pebble, the test server of Let's Encrypt, with a name server that leads every name to this machine.

It stands for a public CA: it checks names by real connections, rejects nonces at random, and forgets everything
when it ends. `chaos` are its environment variables.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from bench.server_process import free_port
from zcproto.certs import managed
from zcproto.certs.managed import ManagedSettings
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.processes import uninterrupted

PEBBLE: Final = "pebble"
NAME_SERVER: Final = "pebble-challtestsrv"
_START_S: Final = 300.0
_REQUEST_S: Final = 10.0
_HOST: Final = "127.0.0.1"

CHAOS: Final = {"PEBBLE_WFE_NONCEREJECT": "50", "PEBBLE_VA_ALWAYS_VALID": "0"}
"""Half of the nonces are rejected, and every name is checked."""

AT_ONCE: Final = {"PEBBLE_VA_NOSLEEP": "1"}
"""Names are checked without a random delay of up to 15 seconds."""


def is_installed() -> bool:
    return all(map(shutil.which, (PEBBLE, NAME_SERVER)))


class Pebble:
    """The CA and its name server. `tls_port` and `http_port` are where it checks names."""

    def __init__(
        self,
        folder: Path,
        *,
        tls_port: int,
        http_port: int,
        chaos: Mapping[str, str] = CHAOS,
        binding: tuple[str, str] | None = None,
        valid_s: int = 90 * 86_400,
    ) -> None:
        self._folder = folder
        self._chaos = chaos
        self._binding = binding
        self._ports = {"tlsPort": tls_port, "httpPort": http_port}
        self._valid_s = valid_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self.ca_file = folder / "certs" / "ca.crt"
        """Verifies the directory."""
        self.log = folder / "log"

    def __enter__(self) -> Self:
        if not is_installed():
            raise ConfigError([f"{PEBBLE} is not installed; on Debian: apt install {PEBBLE}"])
        try:
            with uninterrupted():
                self._start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill both programs."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()

    def _start(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        settings = ManagedSettings((), ("ecdsa-p256",), timedelta(days=9), timedelta(days=1), False)
        managed.ensure(self.ca_file.parent, settings, datetime.now(UTC))
        self._port, self._management, names = free_port(), free_port(), free_port()
        config = {
            "listenAddress": f"{_HOST}:{self._port}",
            "managementListenAddress": f"{_HOST}:{self._management}",
            "certificate": str(self.ca_file.parent / "server-ecdsa.crt"),
            "privateKey": str(self.ca_file.parent / "server-ecdsa.key"),
            "certificateValidityPeriod": self._valid_s,
            **self._ports,
        }
        if self._binding is not None:
            config |= {
                "externalAccountBindingRequired": True,
                "externalAccountMACKeys": dict([self._binding]),
            }
        path = self._folder / "pebble.json"
        path.write_text(json.dumps({"pebble": config}))
        with self.log.open("ab") as log:
            unused = ("-http01", "", "-https01", "", "-tlsalpn01", "", "-doh", "")
            self._run(
                [NAME_SERVER, "-dns01", f"{_HOST}:{names}", "-management", f"{_HOST}:{free_port()}", *unused,
                 "-defaultIPv4", _HOST, "-defaultIPv6", ""], log, {},
            )  # fmt: skip
            self._run(
                [PEBBLE, "-config", str(path), "-dnsserver", f"{_HOST}:{names}"], log, dict(self._chaos)
            )
        end = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > end or any(process.poll() is not None for process in self._processes):
                last = self.log.read_text(errors="replace").splitlines()[-3:]
                raise ZcprotoError(f"{PEBBLE} did not start: {' / '.join(last)}")
            time.sleep(0.05)

    def _run(self, command: list[str], log: object, environ: dict[str, str]) -> None:
        self._processes.append(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,  # type: ignore[call-overload]
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,  # Ctrl-C is for the parent
            )
        )

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            self._get(self.directory)
            return True
        return False

    def _get(self, url: str) -> bytes:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        with urllib.request.urlopen(url, timeout=_REQUEST_S, context=context) as reply:  # noqa: S310
            return bytes(reply.read())

    @property
    def directory(self) -> str:
        """The address for `acme.directory`."""
        return f"https://{_HOST}:{self._port}/dir"

    def root(self) -> bytes:
        """Return the CA that issues certificates, as PEM."""
        return self._get(f"https://{_HOST}:{self._management}/roots/0")

    def settings(self) -> dict[str, object]:
        """Return the settings of a server that orders here."""
        return {
            "certificates.mode": "acme",
            "acme.directory": self.directory,
            "acme.ca_file": str(self.ca_file),
            "acme.terms_agreed": True,
        }
