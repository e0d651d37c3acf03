"""Decide who may open a session.

Reading order: identity.py (the interface of authenticators), login.py (the steps of a login), throttle.py and
schemes.py; files.py, users.py, devices.py and pairing.py (what is stored); directory.py (files that change while a
server runs).
"""

from zcproto.auth.devices import DeviceFile, RegisteredDevice
from zcproto.auth.identity import Authenticator, CallableAuthenticator, Identity
from zcproto.auth.login import Login
from zcproto.auth.pairing import Enrollment, PairingFile
from zcproto.auth.throttle import Throttle
from zcproto.auth.users import User, UserFile

__all__ = [
    "Authenticator",
    "CallableAuthenticator",
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
