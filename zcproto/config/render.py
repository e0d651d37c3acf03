"""Write a configuration as TOML: the active one, and a commented file to start with."""

from __future__ import annotations

import textwrap
from pathlib import Path

from pydantic import BaseModel

from zcproto.config.model import CertificatesConfig, Config, descriptions, sections
from zcproto.config.types import settings_of, table_lines

_WIDTH = 100


def config_as_toml(config: Config) -> str:
    """Return all settings with their values. Reading them gives an equal configuration."""
    lines: list[str] = []
    for section, model in sections().items():
        values = getattr(config, section)
        lines.append(f"[{section}]")
        tables: list[str] = []  # behind the keys, which would belong to them
        for name, accepts in settings_of(model).items():
            value = getattr(values, name)
            if accepts.tables is not None and value:
                for table in value:
                    tables += ["", f"[[{section}.{name}]]", *table_lines(table)]
            else:
                lines.append(f"{name} = {accepts.write(value)}")
        lines += [*tables, ""]
    return "\n".join(lines[:-1]) + "\n"


def default_config_file(home: Path) -> str:
    """Return a file that describes every key and sets none.

    Each default is a comment: a default that is set would stay when a later version has a better one.
    """
    lines = _comment(
        "Configuration of zcproto. Every key is optional: this file, as it is, changes nothing. Uncomment a"
        " key to set it. An environment variable overrides this file (server.port is"
        " ZCPROTO_SERVER__PORT), and a command-line option overrides both. `zcproto config check` reports all"
        " faults."
    )
    defaults = Config(certificates=CertificatesConfig(directory=home / "certs"))
    for section, model in sections().items():
        lines += ["", "", *_comment(model.__doc__ or ""), f"[{section}]"]
        lines += _keys(section, model, getattr(defaults, section))
    return "\n".join(lines) + "\n"


def _keys(section: str, model: type[BaseModel], defaults: BaseModel | None) -> list[str]:
    """Return the keys of a section, or of a table, with their defaults; examples for keys that have none."""
    lines: list[str] = []
    for name, accepts in settings_of(model).items():
        field = model.model_fields[name]
        lines += ["", *_comment(descriptions(model)[name]), *_comment(f"Must be {accepts.words}.")]
        if accepts.tables is not None:
            lines += [f"#[[{section}.{name}]]", *_keys(f"{section}.{name}", accepts.tables, None)]
        elif defaults is not None:
            lines.append(f"#{name} = {accepts.write(getattr(defaults, name))}")
        else:
            value = field.examples[0] if field.examples else field.get_default()
            lines.append(f"#{name} = {accepts.write(value)}")
    return lines


def _comment(text: str) -> list[str]:
    return [
        f"# {line}" for line in textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    ]
