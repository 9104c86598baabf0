"""What roles allow. No I/O."""

from collections.abc import Iterable

VIEWER = frozenset({"actions:read", "actions:preview", "connections:read"})
DEVELOPER = VIEWER | {"actions:execute"}
ADMIN = DEVELOPER | {
    "actions:recover",
    "approvals:write",
    "connections:write",
    "keys:read",
    "keys:write",
    "roles:read",
    "roles:write",
    "audit:read",
    "audit:export",
}
ROLES = {"admin": ADMIN, "developer": DEVELOPER, "viewer": VIEWER}
SCOPES = ADMIN


def effective(role: str, kept: Iterable[str]) -> frozenset[str]:
    """What a key of this role may do. kept: the scopes it was narrowed to; none: it was not narrowed.

    The role is read anew every time, so that a role that shrinks shrinks its keys. An unknown role allows nothing.
    """
    allowed = ROLES.get(role, frozenset())
    return allowed & frozenset(kept) if kept else allowed
