"""Define roles: what a name may be, and how a session keeps them.

A session keeps the role `operator` as a flag, since sessions had it before there were other roles, and the names of
all others as one text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

OPERATOR: Final = "operator"
"""The role of those who may inspect and control the server."""

MAX_ROLES: Final = 32
"""Roles of one user, device or session."""

MAX_ROLE: Final = 64

ROLE_WORDS: Final = f"1 to {MAX_ROLE} characters of A-Z a-z 0-9 _ . : / @ -, not beginning with : / @ -"

_ROLE: Final = re.compile(rf"[A-Za-z0-9_.][A-Za-z0-9_.:/@-]{{0,{MAX_ROLE - 1}}}")

Roles = frozenset[str]
NO_ROLES: Final[Roles] = frozenset()
OPERATORS: Final[Roles] = frozenset({OPERATOR})


def is_role(name: object) -> bool:
    """Return whether a value is the name of a role."""
    return isinstance(name, str) and _ROLE.fullmatch(name) is not None


def roles_from(names: Iterable[str]) -> Roles:
    """Return the roles with some names. Raises TypeError for a text, ValueError for malformed or too many names."""
    if isinstance(names, str | bytes):
        raise TypeError('roles: give a set of names, such as {"admin"}')
    roles = frozenset(names)
    if not all(map(is_role, roles)):
        raise ValueError(f"roles: a name has {ROLE_WORDS}")
    if len(roles) > MAX_ROLES:
        raise ValueError(f"roles: at most {MAX_ROLES} names")
    return roles


def names_without_operator(roles: Roles) -> str:
    """Return the names of all roles but `operator`, sorted, as a session keeps them."""
    return " ".join(sorted(roles - {OPERATOR})) if roles else ""


@lru_cache(maxsize=1024)
def roles_of(is_operator: bool, names: str) -> Roles:
    """Return the roles of a session. Reverses `names_without_operator`."""
    return frozenset([*names.split(), *((OPERATOR,) if is_operator else ())])
