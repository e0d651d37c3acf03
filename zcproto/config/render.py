"""Writes a configuration as TOML: the one in force, and a commented one to begin with."""

from __future__ import annotations

import textwrap
from pathlib import Path

from pydantic import BaseModel

from zcproto.config.model import CertificatesConfig, Config, rules, sections
from zcproto.config.tables import TablesOf, rules_of

_WIDTH = 100


def config_as_toml(config: Config) -> str:
    """All settings with their values. Read again, it gives an equal configuration."""
    lines: list[str] = []
    for section in sections():
        values = getattr(config, section)
        lines.append(f"[{section}]")
        for name in type(values).model_fields:
            rule, value = rules()[f"{section}.{name}"], getattr(values, name)
            if isinstance(rule, TablesOf) and value:
                for table in value:
                    lines += ["", f"[[{section}.{name}]]", *rule.write_table(table)]
            else:
                lines.append(f"{name} = {rule.write(value)}")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def default_config_file(home: Path) -> str:
    """A file that says what can be set, what for, and the default of each. Nothing in it is set.

    A default that is written out would stay when a later version has a better one; so each is a comment.
    """
    lines = _comment(
        "Configuration of zcproto. Every key is optional: this file, as it is, changes nothing. Uncomment a"
        " key to set it. An environment variable wins over this file (server.port is"
        " ZCPROTO_SERVER__PORT), an option of the command line over both. `zcproto config check` tells all faults."
    )
    defaults = Config(certificates=CertificatesConfig(directory=home / "certs"))
    for section, model in sections().items():
        lines += ["", "", *_comment(model.__doc__ or ""), f"[{section}]"]
        for name, field in model.model_fields.items():
            rule = rules()[f"{section}.{name}"]
            lines += ["", *_comment(field.description or ""), *_comment(f"Must be {rule.range()}.")]
            if isinstance(rule, TablesOf):
                lines += [f"#[[{section}.{name}]]", *_keys_of_a_table(rule.model)]
            else:
                lines.append(f"#{name} = {rule.write(getattr(getattr(defaults, section), name))}")
    return "\n".join(lines) + "\n"


def _keys_of_a_table(model: type[BaseModel]) -> list[str]:
    """The keys of a table with an example of what has to be there, and the default of the rest."""
    lines: list[str] = []
    for (name, rule), field in zip(rules_of(model).items(), model.model_fields.values(), strict=True):
        value = field.examples[0] if field.examples else field.get_default(call_default_factory=True)
        lines += ["", *_comment(field.description or ""), *_comment(f"Must be {rule.range()}.")]
        lines.append(f"#{name} = {rule.write(value)}")
    return lines


def _comment(text: str) -> list[str]:
    return [
        f"# {line}" for line in textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    ]
