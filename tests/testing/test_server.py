"""A real server in a thread, and the plugin."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import zcproto
from bench.server_process import free_port
from zcproto import App, CertificatesConfig, Config, Context, LimitsConfig, ServerConfig, TlsConfig
from zcproto.common.roles import OPERATORS
from zcproto.testing import LocalServer
from zcproto.testing.plugin import Serve

pytest_plugins = ["pytester"]


@pytest.fixture
def app() -> App:
    app = App()

    @app.method("greet")
    def greet(context: Context, name: str) -> str:
        return f"hello {name} from {context.user}"

    @app.method("rule", roles=OPERATORS)
    def rule() -> bool:
        return True

    return app


async def test_async_test_calls_the_server(zcproto_serve: Serve, app: App) -> None:
    server = zcproto_serve(app)
    async with server.connect("ada") as client, zcproto.connect(server.address, ca_file=server.ca_file):
        assert await client.call("greet", name="you") == "hello you from ada"


def test_blocking_test_calls_the_server(zcproto_serve: Serve, app: App) -> None:
    server = zcproto_serve(app)
    server.users.add("root", roles=OPERATORS)
    with server.connect_blocking("root") as client:
        assert client.call("rule")
        assert server.in_loop(lambda: len(server.server.state.connections)) == 1
        assert server.in_loop(threading.current_thread).name == "zcproto-server"


def test_server_takes_a_configuration_and_a_port(app: App, zcproto_serve: Serve) -> None:
    certificates = CertificatesConfig(key_types=("ecdsa-p256",))
    config = Config(limits=LimitsConfig(max_streams=3), certificates=certificates)
    with zcproto_serve(app, config).connect_blocking() as client:
        assert client.welcome["max_streams"] == 3
    port = free_port()
    fixed = Config(server=ServerConfig(port=port), certificates=certificates)
    assert zcproto_serve(app, fixed).address == f"localhost:{port}"


def test_failed_start_is_raised_where_the_server_is_entered(app: App, tmp_path: Path) -> None:
    config = Config(
        tls=TlsConfig(client_auth="required", client_ca_file=tmp_path / "missing.pem"),
        certificates=CertificatesConfig(key_types=("ecdsa-p256",)),
    )
    with pytest.raises((zcproto.ConfigError, zcproto.CertificateError), match=r"missing\.pem"):
        LocalServer(app, config, home=tmp_path).__enter__()


def test_stopped_server_is_left_without_error(app: App) -> None:
    with LocalServer(app) as server:
        server.drain()
    assert not server.home.exists()


TESTS = """
import pytest
from zcproto import App
from zcproto.testing import connect_in_memory

app = App()

@app.method("fail")
def fail():
    secret_cause = "deep inside"
    raise LookupError(secret_cause)

@pytest.mark.asyncio
async def test_it():
    async with connect_in_memory(app, user="ada") as client:
        await client.call("fail")

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.mark.anyio
async def test_with_anyio(zcproto_serve):
    async with connect_in_memory(app, user="ada") as client, zcproto_serve(app).connect("ada") as other:
        assert (await client.call("session.info"))["user"] == "ada"
        assert (await other.call("session.info"))["user"] == "ada"

def test_other():
    assert False
"""


def test_report_shows_the_traceback_of_a_method_that_raised(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-p", "zcproto.testing.plugin", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=2, passed=1)
    result.stdout.re_match_lines_random(
        [r".*exception in method fail, incident [0-9a-f]{16}.*", "LookupError: deep inside"]
    )
    assert result.stdout.str().count("exception in method fail") == 1  # not in the report of the other test


def test_plugin_loads_no_server(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_it():
            assert [n for n in sys.modules if n.startswith(("zcproto.", "msgpack", "cryptography"))] == [
                "zcproto.testing", "zcproto.testing.incidents", "zcproto.testing.plugin"
            ]
        """
    )
    result = pytester.runpytest_subprocess("-p", "zcproto.testing.plugin", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
