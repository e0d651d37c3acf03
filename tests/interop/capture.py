"""Record captures with a proxy instead of a network interface, and dissect them with tshark.

TCP headers and the link layer are synthetic; payloads are the bytes that were sent.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.limits import TIMEOUT

SEGMENT: Final = 1_400
"""Maximum size of a TCP segment, so that TLS records span several."""

SCRIPT: Final = Path(__file__).parents[2] / "spec" / "wireshark" / "zcp.lua"
UNPRIVILEGED_ID: Final = 65_534

_FILE: Final = struct.Struct("<IHHiIII")
_RECORD: Final = struct.Struct("<IIII")
_IP: Final = struct.Struct("!BBHHHBBH4s4s")
_TCP: Final = struct.Struct("!HHIIBBHHH")
_SYN, _ACK = 0x02, 0x10

Side = str
"""`client` or `server`."""


class Capture:
    """Packets in sending order."""

    def __init__(self) -> None:
        self.packets: list[tuple[int, bytes]] = []
        self.lock = threading.Lock()
        self._next_port = 20_000

    def connection(self, server_port: int, at: int, client_port: int | None = None) -> Connection:
        """Add a TCP connection that begins at this time (in microseconds), by default from a new client port."""
        self._next_port += 1
        return Connection(self, {"client": client_port or self._next_port, "server": server_port}, at)

    def write(self, path: Path) -> Path:
        """Write a file in libpcap format and return its path."""
        with path.open("wb") as file:
            file.write(_FILE.pack(0xA1B2C3D4, 2, 4, 0, 0, 262_144, 1))
            for at, packet in self.packets:
                file.write(_RECORD.pack(*divmod(at, 1_000_000), len(packet), len(packet)) + packet)
        return path


class Connection:
    """One TCP connection in a capture."""

    def __init__(self, capture: Capture, ports: dict[Side, int], at: int) -> None:
        self._capture = capture
        self._ports = ports
        first = 10_000_000 * (
            len(capture.packets) % 400 + 1
        )  # distinct, or it would be dissected as a continuation
        self._sequence = {"client": first, "server": first + 5_000_000}
        self._add_packet("client", b"", at, _SYN)
        self._add_packet("server", b"", at, _SYN | _ACK)

    def send(self, side: Side, data: bytes, at: int) -> None:
        """Add segments with bytes from one side."""
        for start in range(0, len(data), SEGMENT):
            self._add_packet(side, data[start : start + SEGMENT], at, _ACK)

    def _add_packet(self, side: Side, data: bytes, at: int, flags: int) -> None:
        other = "server" if side == "client" else "client"
        addresses = {"client": bytes([192, 0, 2, 1]), "server": bytes([192, 0, 2, 2])}
        tcp = _TCP.pack(
            self._ports[side],
            self._ports[other],
            self._sequence[side] % 2**32,
            self._sequence[other] % 2**32 if flags & _ACK else 0,
            0x50,
            flags,
            65_535,
            0,
            0,
        )
        size = _IP.size + len(tcp) + len(data)
        ip = _IP.pack(0x45, 0, size, 0, 0, 64, 6, 0, addresses[side], addresses[other])
        self._capture.packets.append((at, bytes(12) + b"\x08\x00" + ip + tcp + data))
        self._sequence[side] += len(data) + bool(flags & _SYN)


class RecordingProxy:
    """Forward TCP connections to a local port and capture both directions.

    `recorded_port` is the server's port in the capture.
    """

    def __init__(self, port: int, recorded_port: int = 7443) -> None:
        self.capture = Capture()
        self._shown = recorded_port
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> RecordingProxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "a connection through the proxy is still open"

    def _start(self, function: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.capture.lock:
                connection = self.capture.connection(self._shown, time.time_ns() // 1_000)
            both = [threading.Event(), threading.Event()]
            self._start(self._pump, near, far, connection, "client", both)
            self._start(self._pump, far, near, connection, "server", both[::-1])

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        connection: Connection,
        side: Side,
        done: Sequence[threading.Event],
    ) -> None:
        try:
            while data := source.recv(65_536):
                with (
                    self.capture.lock
                ):  # record before forwarding, so that an answer never precedes its request
                    connection.send(side, data, time.time_ns() // 1_000)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        done[0].set()
        if done[1].is_set():
            source.close()
            target.close()


# --- tshark ---------------------------------------------------------------------------------------------


@contextmanager
def readable_folder() -> Iterator[Path]:
    """Create a folder with the dissector that tshark can read as an unprivileged user.

    As root, tshark does not load scripts.
    """
    folder = Path(tempfile.mkdtemp(prefix="zcproto-capture-"))
    try:
        shutil.copy(SCRIPT, folder / SCRIPT.name)
        yield folder
    finally:
        shutil.rmtree(folder)


def tshark(folder: Path, capture: Path, *options: str) -> str:
    """Return what tshark prints of a capture in two passes, like Wireshark. Warnings are errors."""
    if os.geteuid() == 0:
        for each in (folder, *folder.rglob("*")):
            os.chown(each, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
    command = ["tshark", "-2", "-n", "-r", str(capture), "-X", f"lua_script:{folder / SCRIPT.name}", *options]
    done = subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "TZ": "UTC", "LC_ALL": "C.UTF-8"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
        user=UNPRIVILEGED_ID if os.geteuid() == 0 else None,
        group=UNPRIVILEGED_ID if os.geteuid() == 0 else None,
        extra_groups=[] if os.geteuid() == 0 else None,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


Pairs = list[tuple[str, Any]]
"""A JSON object with repeated names."""


class Item:
    """The dissected fields of a frame, or of a segment of one, in order."""

    def __init__(self, packet: int, fields: list[tuple[str, str]]) -> None:
        self.packet = packet
        self.fields = fields

    def __repr__(self) -> str:
        return f"{self.packet}: {self.fields}"

    def get(self, name: str) -> str | None:
        """Return the first field of this name."""
        return next((value for each, value in self.fields if each == name), None)

    def all(self, name: str) -> list[str]:
        return [value for each, value in self.fields if each == name]

    @property
    def experts(self) -> set[str]:
        """Return names of expert infos without `zcp.expert.`."""
        return {name.removeprefix("zcp.expert.") for name, _ in self.fields if name.startswith("zcp.expert.")}

    @property
    def values(self) -> list[tuple[str, str, str]]:
        """Return path, field and value of each leaf of the body."""
        found, last = [], ("", "")
        for name, value in self.fields:
            if name == "zcp.path":
                found.append((value, *last))
            elif name.startswith("zcp.") and not name.startswith("zcp.expert."):
                last = name, value
        return found


def items_in(output: str) -> list[Item]:
    """Return the ZCP/1 items in the output of `tshark -T json`."""
    return [
        Item(packet, list(_flat(value)))
        for packet, layers in layers_in(output)
        for name, value in layers
        if name == "zcp"
    ]


def layers_in(output: str) -> Iterator[tuple[int, Pairs]]:
    """Yield the number and the layers of each packet."""
    for packet in json.loads(output, object_pairs_hook=list):
        layers = dict(dict(packet)["_source"])["layers"]
        frame = dict(dict(layers)["frame"])
        yield int(frame["frame.number"]), layers


def _flat(value: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(value, list):  # a protocol without fields is a string
        return
    for name, each in value:
        if isinstance(each, list):
            if not name.endswith("_tree"):
                yield name, ""
            yield from _flat(each)
        else:
            yield name, each
