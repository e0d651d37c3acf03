"""Who may open a session.

Reading order: identity.py (the interface), login.py (what a login goes through), throttle.py, api_key.py,
users.py and current_users.py (the scheme that comes with it), certificate.py (client certificates),
function.py (schemes of embedders).
"""

from zcproto.auth.api_key import ApiKeyAuthenticator
from zcproto.auth.certificate import CertificateAuthenticator
from zcproto.auth.current_users import CurrentUsers
from zcproto.auth.function import CallableAuthenticator
from zcproto.auth.identity import Authenticator, Identity, PeerCertificate
from zcproto.auth.login import Login
from zcproto.auth.throttle import Throttle
from zcproto.auth.users import UserFile

__all__ = [
    "ApiKeyAuthenticator",
    "Authenticator",
    "CallableAuthenticator",
    "CertificateAuthenticator",
    "CurrentUsers",
    "Identity",
    "Login",
    "PeerCertificate",
    "Throttle",
    "UserFile",
]
