"""Apply the roles of the configuration to the methods of a server.

    [[auth.role]]
    name = "billing"
    allow = ["invoice.*"]
    deny = ["invoice.delete"]

Decides: which methods a pattern means, and who may call them.

Rules:
- `allow` has the effect of naming the role in the code: a matching method needs one of the roles that allow it, or
  one that the application names. A session with a role that denies a method cannot call it, whatever its others.
- Public methods need no session, so that no pattern means them; nor `session.*` and `device.*`, without which no
  session could end. Methods of the server are meant by patterns that begin with "server." only.
- A pattern that means no method is a fault: a misspelt `deny` would protect nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from zcproto.app.app import RESERVED_PREFIXES, Access, Method
from zcproto.common.roles import NO_ROLES
from zcproto.config import RoleConfig
from zcproto.errors import ConfigError

_SERVER: Final = "server."


def access_of(methods: Mapping[str, Method], roles: Sequence[RoleConfig]) -> dict[str, Access]:
    """Return who may call which methods; those that are missing admit every session. Raises ConfigError."""
    found = {method.name: Access(method.roles) for method in methods.values() if method.roles}
    faults: list[str] = []

    refuse = faults.append
    for number, role in enumerate(roles):
        for list_, patterns in (("allow", role.allow), ("deny", role.deny)):
            for pattern in patterns:
                names = [*_meant_by(pattern, methods.values())]
                if not names:
                    refuse(
                        f"auth.role[{number}].{list_}: {pattern!r} matches no method that needs a session;"
                        " zcproto call HOST:PORT --list shows the methods"
                    )
                for name in names:
                    needed, denied = found.get(name, Access(NO_ROLES))
                    found[name] = (
                        Access(needed | {role.name}, denied)
                        if list_ == "allow"
                        else Access(needed, denied | {role.name})
                    )
    if faults:
        raise ConfigError(faults)
    return found


def _meant_by(pattern: str, methods: Iterable[Method]) -> Iterable[str]:
    for method in methods:
        name = method.name
        is_match = name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
        is_meant = (
            pattern.startswith(_SERVER)
            if name.startswith(_SERVER)
            else not name.startswith(RESERVED_PREFIXES)
        )
        if is_match and is_meant and not method.public:
            yield name
