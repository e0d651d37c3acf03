"""Define the settings of who may call which methods: roles, and identity providers.

Rules: as in zcproto/config/model.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field

from zcproto.config.types import METHOD_PATTERN, ROLE_NAME, Fault, Settings, each_of, tables_of


class RoleConfig(Settings):
    """What sessions with a role may call, besides what the application says."""

    name: Annotated[str, ROLE_NAME] = Field(examples=["billing"])
    """The role, as users, devices and tokens have it."""
    allow: Annotated[tuple[str, ...], each_of(METHOD_PATTERN, 0, 256)] = ()
    """The methods that need this role, or another one that allows them or that the application names: names, or
    beginnings with a star. "*" is all methods of the application that need a session; those of the server, such as
    "server.sessions", are meant by "server.*" only."""
    deny: Annotated[tuple[str, ...], each_of(METHOD_PATTERN, 0, 256)] = ()
    """The methods that no session with this role may call, whatever its other roles."""


def _duplicate_roles(roles: Mapping[int, RoleConfig]) -> Iterator[Fault]:
    """Yield a fault for each role that has two tables."""
    first: dict[str, int] = {}
    for index, role in roles.items():
        if first.setdefault(role.name, index) != index:
            yield Fault(f"[{index}].name", role.name, f"is the role of auth.role[{first[role.name]}] too")


class AuthConfig(Settings):
    """Who may call which methods."""

    role: Annotated[tuple[RoleConfig, ...], tables_of(RoleConfig, "auth.role", 100, _duplicate_roles)] = ()
    """What the roles of a session allow and deny. Checked against the methods of the application when the server
    starts, and at each reload."""
