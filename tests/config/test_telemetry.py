"""The settings of OpenTelemetry that have kinds of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli

from zcproto.config import Config, TelemetryConfig, config_as_toml, load_config
from zcproto.errors import ConfigError

HOME = Path("/home/of/a/test")


def loaded(environ: dict[str, str] | None = None, **values: Any) -> TelemetryConfig:
    overrides = {f"telemetry.{name}": value for name, value in values.items()}
    return load_config(None, home=HOME, environ=environ or {}, overrides=overrides).telemetry


@pytest.mark.parametrize("ratio", [0, 0.0, 0.01, 1e-6, 1, 1.0])
def test_ratio_is_a_number_from_0_to_1(ratio: float) -> None:
    assert loaded(sample_ratio=ratio).sample_ratio == ratio
    config = Config(telemetry=TelemetryConfig(sample_ratio=ratio))
    assert tomli.loads(config_as_toml(config))["telemetry"]["sample_ratio"] == ratio


@pytest.mark.parametrize("text", ["0", "0.25", "1", "1.0"])
def test_ratio_from_a_variable(text: str) -> None:
    assert loaded({"ZCPROTO_TELEMETRY__SAMPLE_RATIO": text}).sample_ratio == float(text)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), float("inf"), "0.5", True, "1%"])
def test_other_ratio_is_refused(ratio: object) -> None:
    with pytest.raises(ConfigError, match="must be a number from 0 to 1"):
        loaded(sample_ratio=ratio)


@pytest.mark.parametrize("text", ["2", "-1", "nan", "1e-3", "", "0." + "1" * 40])
def test_other_ratio_in_a_variable_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a number from 0 to 1"):
        loaded({"ZCPROTO_TELEMETRY__SAMPLE_RATIO": text})


@pytest.mark.parametrize("url", ["", "http://127.0.0.1:4318", "https://collector.example.com:4318/otlp"])
def test_endpoint_is_an_address(url: str) -> None:
    assert loaded(endpoint=url, traces=True).endpoint == url


@pytest.mark.parametrize(
    "url",
    [
        "collector:4318",
        "http://collector.example.com:4318",
        "https://user:password@collector.example.com",
        "https://collector.example.com/?token=x",
        "https://collector.example.com/#x",
        "grpc://127.0.0.1:4317",
    ],
)
def test_other_endpoint_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.endpoint") as raised:
        loaded(endpoint=url)
    assert "password" not in str(raised.value)


@pytest.mark.parametrize("name", ["x" * 129, "two\nlines"])
def test_other_name_of_the_service_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="up to 128 printable characters"):
        loaded(service_name=name)
