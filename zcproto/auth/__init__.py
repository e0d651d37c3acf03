"""Who may open a session.

Reading order: identity.py (the interface), login.py (what a login goes through), throttle.py, api_key.py
and users.py (the scheme that comes with it), function.py (schemes of embedders).
"""

from zcproto.auth.api_key import ApiKeyAuthenticator
from zcproto.auth.function import CallableAuthenticator
from zcproto.auth.identity import Authenticator, Identity
from zcproto.auth.login import Login
from zcproto.auth.throttle import Throttle
from zcproto.auth.users import UserFile

__all__ = [
    "ApiKeyAuthenticator",
    "Authenticator",
    "CallableAuthenticator",
    "Identity",
    "Login",
    "Throttle",
    "UserFile",
]
