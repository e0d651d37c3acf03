"""Test how the Wireshark dissector recognizes connections: reused ports, HTTPS on the same port, live captures."""

from __future__ import annotations

import shutil
import signal
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

import zcproto
from tests.interop.capture import Capture, RecordingProxy, layers_in, readable_folder, tshark
from tests.interop.support import needs
from tests.interop.wireshark import PORT, complete_items, first_welcome
from tests.limits import TIMEOUT
from tests.server import helpers
from tests.server.helpers import (
    KEY,
    ServerThread,
    eventually,
)

pytestmark = needs("tshark")

PCAP_HEADER, RECORD_HEADER = 24, 16
ETHERNET_AND_IP, TCP_FLAGS, FIN = 34, 13, 1


def test_reused_port_is_a_new_connection() -> None:
    capture, first = Capture(), first_welcome()
    second = first[:20] + bytes(8) + first[28:]
    for at, data in ((0, first), (1_000_000, second)):
        connection = capture.connection(PORT, at, client_port=50_000)
        connection.send("server", data, at)
        connection.send("server", data[:30], at)  # truncated
    with readable_folder() as folder:
        path = capture.write(folder / "again.pcap")
        items = complete_items(tshark(folder, path, "-d", f"tcp.port=={PORT},zcp", "-T", "json"))
    assert [item.experts for item in items] == [set(), set()]


@pytest.mark.parametrize("alpn", ["http/1.1", None])
def test_https_on_same_port_is_dissected_as_http(alpn: str | None, certs: Path, tmp_path: Path) -> None:
    with (
        readable_folder() as folder,
        ServerThread(tmp_path / "home", certs) as server,
        RecordingProxy(server.port) as proxy,
    ):
        context = helpers.client_context(server.home / "certs" / "ca.crt", [alpn] if alpn else [])
        context.keylog_filename = str(folder / "keys")
        raw = socket.create_connection(("127.0.0.1", proxy.port), timeout=TIMEOUT)
        with context.wrap_socket(raw, server_hostname="localhost") as tls:
            tls.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            while tls.recv(65_536):
                pass
        path = proxy.capture.write(folder / "https.pcap")
        output = tshark(folder, path, "-o", f"tls.keylog_file:{folder / 'keys'}", "-T", "json")
    names = [name for _, layers in layers_in(output) for name, _ in layers]
    assert names.count("http") == 2
    assert "zcp" not in names


def test_live_capture_is_dissected(certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCPROTO_HOME", str(tmp_path / "client"))
    with readable_folder() as folder, ServerThread(tmp_path / "home", certs) as server:
        path, keys = tmp_path / "live.pcap", folder / "keys"
        command = ["dumpcap", "-q", "-P", "-i", "lo", "-f", f"tcp port {server.port}", "-w", str(path)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as dumpcap:
            try:
                wait_for_capture(dumpcap)
                ca_file = server.home / "certs" / "ca.crt"
                options: dict[str, Any] = {
                    "user": "ada",
                    "key": KEY,
                    "ca_file": ca_file,
                    "key_log_file": keys,
                }
                with zcproto.connect_blocking(f"127.0.0.1:{server.port}", **options) as client:
                    assert client.call("echo", live=True) == {"live": True}
                eventually(lambda: has_both_ends(path))
            finally:
                dumpcap.send_signal(signal.SIGINT)
        shutil.copy(path, folder / "live.pcap")
        output = tshark(folder, folder / "live.pcap", "-o", f"tls.keylog_file:{keys}", "-T", "json")
    methods = [item.get("zcp.method") for item in complete_items(output) if item.get("zcp.method")]
    assert methods == ["session.open", "echo", "session.close"]


def wait_for_capture(dumpcap: subprocess.Popen[str]) -> None:
    """Wait until dumpcap captures; skip the test without permission to capture."""
    assert dumpcap.stderr is not None
    messages = []
    for line in dumpcap.stderr:
        messages.append(line)
        if line.startswith("File:"):
            return
    dumpcap.wait()
    pytest.skip(f"capturing is not permitted here: {' '.join(messages).strip()}")


def has_both_ends(path: Path) -> bool:
    """Return whether both sides have sent FIN in a capture: dumpcap writes it in steps, with pauses in between."""
    data, place, ends = path.read_bytes(), PCAP_HEADER, set()
    while place + RECORD_HEADER <= len(data):
        (size,) = struct.unpack_from("I", data, place + 8)
        tcp = data[place + RECORD_HEADER : place + RECORD_HEADER + size][ETHERNET_AND_IP:]
        if len(tcp) > TCP_FLAGS and tcp[TCP_FLAGS] & FIN:
            ends.add(tcp[:2])  # the port of the sender
        place += RECORD_HEADER + size
    return len(ends) == 2
