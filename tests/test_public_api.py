"""The names that an application imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import zcproto
import zcproto.testing
from tests.limits import TIMEOUT
from zcproto import errors


def run(program: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=TIMEOUT
    ).stdout


@pytest.mark.parametrize("name", zcproto.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(zcproto, name) is not None
    assert getattr(zcproto, name) is getattr(zcproto, name)


def test_public_names_are_fixed() -> None:
    sections = {type(section).__name__ for _, section in zcproto.Config()}
    own = {
        "BUILT_IN_SCHEMES",
        "App",
        "Authenticator",
        "BlockingClient",
        "BlockingUserSession",
        "Call",
        "CallNext",
        "CallableAuthenticator",
        "Client",
        "ClientSession",
        "Code",
        "Config",
        "ConnectedClient",
        "Context",
        "Device",
        "Ended",
        "Endpoint",
        "Event",
        "Identity",
        "Items",
        "OutgoingCall",
        "Server",
        "ServerUsers",
        "OidcConfig",
        "RoleConfig",
        "SiteConfig",
        "Topic",
        "TopicEvent",
        "UserEntry",
        "UserSession",
        "connect",
        "connect_blocking",
        "enroll",
        "enroll_blocking",
        "serve",
    }
    raised = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.ZcprotoError)
    }
    assert set(zcproto.__all__) == own | sections | raised
    assert list(zcproto.__all__) == sorted(zcproto.__all__, key=lambda name: (not name.isupper(), name))
    assert dir(zcproto) == sorted(zcproto.__all__)


def test_public_names_for_tests_are_fixed() -> None:
    names = ["Link", "LocalServer", "MemoryServer", "MovableClock", "connect_in_memory"]
    assert zcproto.testing.__all__ == names
    assert all(getattr(zcproto.testing, name).__doc__ for name in names)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zcproto.testing.nothing


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zcproto.nothing


def test_star_import_brings_all_names() -> None:
    brought = run("from zcproto import *; print(len([n for n in dir() if not n.startswith('_')]))")
    assert int(brought) == len(zcproto.__all__)


def test_import_loads_no_submodule() -> None:
    program = "import sys, zcproto; print([n for n in sys.modules if n.startswith('zcproto.') or n == 'ssl'])"
    assert run(program).strip() == "[]"


def test_client_does_not_load_server_or_config() -> None:
    program = (
        "import sys, zcproto; zcproto.connect; zcproto.connect_blocking; zcproto.Unavailable\n"
        "ours = ('zcproto.server', 'zcproto.config', 'zcproto.certs', 'zcproto.auth', 'zcproto.cli.')\n"
        "heavy = (*ours, 'pydantic', 'click')\n"
        "print([n for n in sys.modules if n.startswith(heavy)])"
    )
    assert run(program).strip() == "[]"


def test_application_loads_no_server_and_no_cryptography() -> None:
    heavy = ("zcproto.runtime.server", "zcproto.config", "zcproto.certs", "cryptography", "pydantic", "click")
    program = (
        "import sys; from zcproto import App, serve; print([n for n in sys.modules if n.startswith(HEAVY)])"
    )
    assert run(program.replace("HEAVY", repr(heavy))).strip() == "[]"


def test_errors_load_no_other_module() -> None:
    program = (
        "import sys, zcproto; zcproto.Unavailable; print([n for n in sys.modules if n.startswith('zcproto')])"
    )
    assert run(program).strip() == "['zcproto', 'zcproto.errors']"
