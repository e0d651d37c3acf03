"""Decide who may open a session.

Reading order: identity.py (the interface of authenticators), login.py (the steps of a login), throttle.py,
schemes.py and oidc.py; files.py, users.py, devices.py, tokens.py and pairing.py (what is stored); directory.py
(files that change while a server runs).

Each name is imported on first use: an application needs identity.py only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zcproto.auth.devices import DeviceFile, RegisteredDevice
    from zcproto.auth.identity import BUILT_IN_SCHEMES, Authenticator, Authenticators, Identity
    from zcproto.auth.login import ApplicationAuthenticator, Login
    from zcproto.auth.pairing import Enrollment, PairingFile
    from zcproto.auth.throttle import Throttle
    from zcproto.auth.users import User, UserFile

__all__ = [
    "BUILT_IN_SCHEMES",
    "ApplicationAuthenticator",
    "Authenticator",
    "Authenticators",
    "DeviceFile",
    "Enrollment",
    "Identity",
    "Login",
    "PairingFile",
    "RegisteredDevice",
    "Throttle",
    "User",
    "UserFile",
]

_MODULES = {
    "ApplicationAuthenticator": "login",
    "Authenticator": "identity",
    "Authenticators": "identity",
    "BUILT_IN_SCHEMES": "identity",
    "DeviceFile": "devices",
    "Enrollment": "pairing",
    "Identity": "identity",
    "Login": "login",
    "PairingFile": "pairing",
    "RegisteredDevice": "devices",
    "Throttle": "throttle",
    "User": "users",
    "UserFile": "users",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'zcproto.auth' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"zcproto.auth.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
