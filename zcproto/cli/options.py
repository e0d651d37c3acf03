"""Makers of options that take a number or a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def number_option(
    name: str, kind: click.ParamType[Any], default: float, metavar: str, text: str
) -> Callable[[Function], Function]:
    """Return an option whose help shows its default."""
    return click.option(name, type=kind, default=default, show_default=True, metavar=metavar, help=text)


def file_option(
    *names: str, text: str, metavar: str = "FILE", required: bool = False, **path: bool
) -> Callable[[Function], Function]:
    """Return an option whose value is a path. `path` are settings of click.Path."""
    kind = click.Path(path_type=Path, **path)
    return click.option(*names, type=kind, metavar=metavar, required=required, help=text)
