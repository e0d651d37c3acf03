"""Decide by roles who may call a method."""

from __future__ import annotations

from typing import NamedTuple

from zcproto.common.roles import NO_ROLES, Roles


class Access(NamedTuple):
    """Who may call a method: sessions with one of the roles `needed`, if there are any, and none of `denied`."""

    needed: Roles
    denied: Roles = NO_ROLES

    def admits(self, roles: Roles) -> bool:
        """Return whether a session with these roles may call the method."""
        return not self.denied & roles and (not self.needed or not self.needed.isdisjoint(roles))
