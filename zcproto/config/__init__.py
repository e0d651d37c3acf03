"""The configuration: what can be set, read from all sources, with every fault told at once.

    Config                the settings in force, frozen; `config.server.port` is `port` in `[server]`
    load_config           from a file, the environment and the command line; raises ConfigError
    config_as_toml        the settings in force as TOML
    default_config_file   a commented file to begin with

Reading order: duration, rules (what a kind of value accepts), tables, checks (what must hold between
settings), model (the settings), faults, load, render.
"""

from __future__ import annotations

from zcproto.config.load import load_config
from zcproto.config.model import (
    AlertsConfig,
    CertificatesConfig,
    Config,
    FreshnessConfig,
    LimitsConfig,
    LogConfig,
    ServerConfig,
    SessionsConfig,
    SiteConfig,
    StoreConfig,
    TlsConfig,
)
from zcproto.config.render import config_as_toml, default_config_file

__all__ = [
    "AlertsConfig",
    "CertificatesConfig",
    "Config",
    "FreshnessConfig",
    "LimitsConfig",
    "LogConfig",
    "ServerConfig",
    "SessionsConfig",
    "SiteConfig",
    "StoreConfig",
    "TlsConfig",
    "config_as_toml",
    "default_config_file",
    "load_config",
]
