"""Who may open a session.

Reading order: identity.py (the interface), login.py (what a login goes through), throttle.py, api_key.py,
users.py and current_users.py (the scheme that comes with it), certificate.py (client certificates), device.py,
devices.py and pairing.py (devices), function.py (schemes of embedders).
"""

from zcproto.auth.api_key import ApiKeyAuthenticator
from zcproto.auth.certificate import CertificateAuthenticator
from zcproto.auth.current_users import CurrentUsers
from zcproto.auth.device import DeviceAuthenticator
from zcproto.auth.devices import CurrentDevices, Device, DeviceFile
from zcproto.auth.function import CallableAuthenticator
from zcproto.auth.identity import NO_CHANNEL, Authenticator, Channel, Identity, PeerCertificate
from zcproto.auth.login import Login
from zcproto.auth.pairing import Enrollment, PairingFile
from zcproto.auth.throttle import Throttle
from zcproto.auth.users import UserFile

__all__ = [
    "NO_CHANNEL",
    "ApiKeyAuthenticator",
    "Authenticator",
    "CallableAuthenticator",
    "CertificateAuthenticator",
    "Channel",
    "CurrentDevices",
    "CurrentUsers",
    "Device",
    "DeviceAuthenticator",
    "DeviceFile",
    "Enrollment",
    "Identity",
    "Login",
    "PairingFile",
    "PeerCertificate",
    "Throttle",
    "UserFile",
]
