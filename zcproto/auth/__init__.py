"""Decide who may open a session.

Reading order: identity.py (the interface of authenticators), login.py (the steps of a login), throttle.py; the
schemes api_key.py, certificate.py and device.py; files.py, users.py, devices.py and pairing.py (what is stored);
directory.py (files that change while a server runs).
"""

from zcproto.auth.api_key import ApiKeyAuthenticator
from zcproto.auth.certificate import CertificateAuthenticator
from zcproto.auth.device import DeviceAuthenticator
from zcproto.auth.devices import CurrentDevices, DeviceFile, RegisteredDevice
from zcproto.auth.identity import (
    NO_CHANNEL,
    Authenticator,
    CallableAuthenticator,
    Channel,
    Identity,
    PeerCertificate,
)
from zcproto.auth.login import Login
from zcproto.auth.pairing import Enrollment, PairingFile
from zcproto.auth.throttle import Throttle
from zcproto.auth.users import CurrentUsers, UserFile

__all__ = [
    "NO_CHANNEL",
    "ApiKeyAuthenticator",
    "Authenticator",
    "CallableAuthenticator",
    "CertificateAuthenticator",
    "Channel",
    "CurrentDevices",
    "CurrentUsers",
    "DeviceAuthenticator",
    "DeviceFile",
    "Enrollment",
    "Identity",
    "Login",
    "PairingFile",
    "PeerCertificate",
    "RegisteredDevice",
    "Throttle",
    "UserFile",
]
