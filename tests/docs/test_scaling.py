"""The load balancers of docs/scaling.md: their configurations are valid, and a client is served through one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bench.server_process import free_port
from tests.docs.blocks import blocks_of
from tests.docs.messages import ROOT
from tests.limits import TIMEOUT
from tests.server.helpers import PATIENT_CLIENT, configuration, eventually
from zcproto import connect_blocking
from zcproto.app.app import App
from zcproto.config import Config, load_config
from zcproto.testing import LocalServer

BLOCKS = list(blocks_of(ROOT / "docs" / "scaling.md"))
SERVERS = "    server one 192.0.2.11:7443\n    server two 192.0.2.12:7443\n"


def text_of(file: str) -> str:
    [text] = [block.text for block in BLOCKS if block.file == file]
    return text


def replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_settings_of_servers_behind_load_balancers_are_valid(tmp_path: Path) -> None:
    settings = [block.text for block in BLOCKS if block.language == "toml"]
    assert len(settings) == 2
    for number, text in enumerate(settings):
        file = tmp_path / f"{number}.toml"
        file.write_text(text)
        file.chmod(0o600)
        assert isinstance(load_config(file, home=tmp_path, environ={}), Config)


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
def test_client_is_served_through_haproxy(tmp_path: Path) -> None:
    config = configuration(tmp_path, server__proxy_protocol_from=["127.0.0.1"])
    with LocalServer(App(), config, home=tmp_path) as server:
        port = free_port()
        changes = {
            "maxconn 200000": "maxconn 100",
            "bind :7443": f"bind 127.0.0.1:{port}",
            "/etc/haproxy/ca.crt": str(server.ca_file),
            SERVERS: f"    server one {server.address.replace('localhost', '127.0.0.1')}\n",
        }
        file = tmp_path / "haproxy.cfg"
        file.write_text(replaced(text_of("haproxy.cfg"), changes))
        key = server.users.add("ada")
        with subprocess.Popen(["haproxy", "-db", "-f", file]) as haproxy:
            try:
                with connect_blocking(
                    f"localhost:{port}",
                    user="ada",
                    key=key,
                    ca_file=server.ca_file,
                    home=tmp_path / "client",
                    start_timeout=TIMEOUT,
                    **PATIENT_CLIENT,
                ) as client:
                    assert client.call("session.info")["address"] == "127.0.0.1"
                # The health check has sent a PROXY header and has spoken HTTPS.
                eventually(
                    lambda: server.in_loop(lambda: server.server.parts.acceptor.handshakes_completed) > 1
                )
            finally:
                haproxy.terminate()
