"""Configurations from TOML, variables and options, and the faults of such."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from zcproto.config import Config, load_config
from zcproto.errors import ConfigError


def load(
    home: Path,
    toml: str | bytes | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration with `toml` in config.toml."""
    if toml is not None:
        (home / "config.toml").write_bytes(toml.encode() if isinstance(toml, str) else toml)
    return load_config(None, home=home, environ=environ or {}, overrides=overrides or {})


def faults(
    home: Path,
    toml: str | bytes | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(home, toml, environ, overrides)
    return caught.value.faults
