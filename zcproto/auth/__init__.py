"""Decide who may open a session.

Reading order: identity.py (the interface of authenticators), login.py (the steps of a login), throttle.py,
schemes.py and oidc.py; files.py, users.py, devices.py, tokens.py and pairing.py (what is stored); directory.py
(files that change while a server runs).
"""

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
