"""Define the settings, and load them from all sources with every fault reported at once.

    Config                all settings, frozen; `config.server.port` is `port` in `[server]`, a ServerConfig
    load_config           from a file, the environment and the command line; raises ConfigError
    config_as_toml        all settings as TOML
    default_config_file   a commented file to start with

Reading order: types (what a key accepts), checks (what must hold between settings), model (the settings), load
(from files, and as TOML), changes (what a reload applies).
"""

from zcproto.config.load import config_as_toml, default_config, default_config_file, load_config
from zcproto.config.model import (
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

__all__ = [
    "AcmeConfig",
    "AlertsConfig",
    "AuthConfig",
    "CallsConfig",
    "CertificatesConfig",
    "Config",
    "FreshnessConfig",
    "HttpConfig",
    "IdempotencyConfig",
    "LimitsConfig",
    "LogConfig",
    "OidcConfig",
    "RoleConfig",
    "ServerConfig",
    "SessionsConfig",
    "SiteConfig",
    "StoreConfig",
    "StreamsConfig",
    "TelemetryConfig",
    "TlsConfig",
    "config_as_toml",
    "default_config",
    "default_config_file",
    "load_config",
]
