"""zcproto: compact binary calls over TLS 1.3, for programs that communicate over a hostile network.

This module exports the public API. Each name is imported on first use, so that `import zcproto` is fast and a
client never loads the server.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zcproto.admin.users import ServerUsers, UserEntry
    from zcproto.app.app import App
    from zcproto.app.authentication import CallableAuthenticator
    from zcproto.app.clients import ConnectedClient
    from zcproto.app.context import Context
    from zcproto.app.items import Items
    from zcproto.app.topics import Topic, TopicEvent
    from zcproto.auth import BUILT_IN_SCHEMES, Authenticator, Identity
    from zcproto.client import (
        BlockingClient,
        BlockingUserSession,
        Call,
        Client,
        ClientSession,
        Device,
        Endpoint,
        Event,
        OutgoingCall,
        UserSession,
        connect,
        connect_blocking,
        enroll,
        enroll_blocking,
    )
    from zcproto.common.middleware import CallNext
    from zcproto.config import (
        AcmeConfig,
        AlertsConfig,
        AuthConfig,
        CallsConfig,
        CertificatesConfig,
        Config,
        FreshnessConfig,
        HttpConfig,
        IdempotencyConfig,
        LimitsConfig,
        LogConfig,
        OidcConfig,
        RoleConfig,
        ServerConfig,
        SessionsConfig,
        SiteConfig,
        StoreConfig,
        StreamsConfig,
        TelemetryConfig,
        TlsConfig,
    )
    from zcproto.errors import (
        Aborted,
        AlreadyExists,
        CallError,
        Cancelled,
        CannotConnect,
        CertificateError,
        Code,
        ConfigError,
        ConnectionClosed,
        DataLoss,
        DeadlineExceeded,
        FailedPrecondition,
        InternalError,
        InvalidArgument,
        LifespanError,
        LoginError,
        NotFound,
        OutOfRange,
        PermissionDenied,
        ProtocolError,
        ResourceExhausted,
        SessionReplaced,
        StaleTimestamp,
        TlsError,
        TokenExpired,
        TokenRevoked,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        UnknownError,
        ZcprotoError,
    )
    from zcproto.runtime.run import serve
    from zcproto.runtime.server import Server

__all__ = [
    "BUILT_IN_SCHEMES",
    "Aborted",
    "AcmeConfig",
    "AlertsConfig",
    "AlreadyExists",
    "App",
    "AuthConfig",
    "Authenticator",
    "BlockingClient",
    "BlockingUserSession",
    "Call",
    "CallError",
    "CallNext",
    "CallableAuthenticator",
    "CallsConfig",
    "Cancelled",
    "CannotConnect",
    "CertificateError",
    "CertificatesConfig",
    "Client",
    "ClientSession",
    "Code",
    "Config",
    "ConfigError",
    "ConnectedClient",
    "ConnectionClosed",
    "Context",
    "DataLoss",
    "DeadlineExceeded",
    "Device",
    "Endpoint",
    "Event",
    "FailedPrecondition",
    "FreshnessConfig",
    "HttpConfig",
    "IdempotencyConfig",
    "Identity",
    "InternalError",
    "InvalidArgument",
    "Items",
    "LifespanError",
    "LimitsConfig",
    "LogConfig",
    "LoginError",
    "NotFound",
    "OidcConfig",
    "OutOfRange",
    "OutgoingCall",
    "PermissionDenied",
    "ProtocolError",
    "ResourceExhausted",
    "RoleConfig",
    "Server",
    "ServerConfig",
    "ServerUsers",
    "SessionReplaced",
    "SessionsConfig",
    "SiteConfig",
    "StaleTimestamp",
    "StoreConfig",
    "StreamsConfig",
    "TelemetryConfig",
    "TlsConfig",
    "TlsError",
    "TokenExpired",
    "TokenRevoked",
    "Topic",
    "TopicEvent",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnknownError",
    "UserEntry",
    "UserSession",
    "ZcprotoError",
    "connect",
    "connect_blocking",
    "enroll",
    "enroll_blocking",
    "serve",
]

_MODULES = {
    "AcmeConfig": "zcproto.config",
    "AlertsConfig": "zcproto.config",
    "AuthConfig": "zcproto.config",
    "App": "zcproto.app.app",
    "Authenticator": "zcproto.auth",
    "BUILT_IN_SCHEMES": "zcproto.auth",
    "BlockingClient": "zcproto.client",
    "BlockingUserSession": "zcproto.client",
    "Call": "zcproto.client",
    "CallNext": "zcproto.common.middleware",
    "CallableAuthenticator": "zcproto.app.authentication",
    "CallsConfig": "zcproto.config",
    "CertificatesConfig": "zcproto.config",
    "Client": "zcproto.client",
    "ClientSession": "zcproto.client",
    "Config": "zcproto.config",
    "ConnectedClient": "zcproto.app.clients",
    "Context": "zcproto.app.context",
    "Device": "zcproto.client",
    "Endpoint": "zcproto.client",
    "Event": "zcproto.client",
    "FreshnessConfig": "zcproto.config",
    "HttpConfig": "zcproto.config",
    "IdempotencyConfig": "zcproto.config",
    "Identity": "zcproto.auth",
    "Items": "zcproto.app.items",
    "LimitsConfig": "zcproto.config",
    "LogConfig": "zcproto.config",
    "OidcConfig": "zcproto.config",
    "RoleConfig": "zcproto.config",
    "OutgoingCall": "zcproto.client",
    "Server": "zcproto.runtime.server",
    "ServerConfig": "zcproto.config",
    "ServerUsers": "zcproto.admin.users",
    "SessionsConfig": "zcproto.config",
    "SiteConfig": "zcproto.config",
    "StoreConfig": "zcproto.config",
    "StreamsConfig": "zcproto.config",
    "TelemetryConfig": "zcproto.config",
    "TlsConfig": "zcproto.config",
    "Topic": "zcproto.app.topics",
    "TopicEvent": "zcproto.app.topics",
    "UserEntry": "zcproto.admin.users",
    "UserSession": "zcproto.client",
    "connect": "zcproto.client",
    "connect_blocking": "zcproto.client",
    "enroll": "zcproto.client",
    "enroll_blocking": "zcproto.client",
    "serve": "zcproto.runtime.run",
}
"""The module of each name that is not in `zcproto.errors`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'zcproto' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, "zcproto.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
