"""Choose what runs the functions of the request path: `_accelerator.c` if it was built, otherwise Python.

The Python functions are the reference. The compiled ones return the same results and raise the same errors, because
they pass every argument of another type or range on to them. The reading of requests and answers is compiled alone.
Without it, and for all that it leaves, connections have a general path (zcproto/wire/request_fast_path.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Final, TypeVar, cast

VARIABLE: Final = "ZCPROTO_ACCELERATOR"
"""The environment variable that selects Python: `off`. It is read once, when this module is imported."""

references: Final[dict[str, Callable[..., Any]]] = {}
"""The Python functions by name. `_accelerator.c` looks them up here."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


is_off: Final = os.environ.get(VARIABLE) == "off"


def _load() -> tuple[ModuleType | None, str]:
    """Return the compiled module, or None and the reason."""
    if is_off:
        return None, f"{VARIABLE} is off"
    try:
        return import_module("zcproto._accelerator"), ""
    except ImportError as error:
        return None, str(error)


compiled, missing = _load()


def accelerated(reference: _Function) -> _Function:
    """Return the compiled function of the same name if there is one, otherwise this one."""
    references[reference.__name__] = reference
    return cast(_Function, getattr(compiled, reference.__name__, reference))


def describe() -> str:
    """Return whether the compiled module is in use, and if not, why."""
    return f"not in use: {missing}" if compiled is None else "in use"
