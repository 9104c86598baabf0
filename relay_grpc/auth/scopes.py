"""What roles allow. No I/O."""

from collections.abc import Iterable

from relay_grpc import errors

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


def of_role(role: str, parent: str | None, narrowed: Iterable[str] | None) -> frozenset[str]:
    """What a role allows. parent, narrowed: of a custom role, the built-in one and the scopes it keeps of that.

    It is worked out anew every time, so that a built-in role that shrinks shrinks those that narrow it. A role that is
    neither allows nothing.
    """
    return ROLES.get(role, frozenset()) if parent is None else ROLES[parent] & frozenset(narrowed or ())


def kept(allowed: frozenset[str], chosen: Iterable[str]) -> frozenset[str]:
    """What a key may do whose role allows this. chosen: the scopes it was narrowed to; none: it was not narrowed."""
    return allowed & frozenset(chosen) if chosen else allowed


def check_narrowing(role: str, allowed: frozenset[str], chosen: Iterable[str]) -> None:
    """Raises InvalidRequest where scopes were chosen that the role, which allows these, does not have."""
    if foreign := sorted(frozenset(chosen) - allowed):
        raise errors.InvalidRequest([("scopes", f"{', '.join(foreign)}: not of the role {role}")])
