"""Nobody gives more than they hold. No I/O.

A key is bounded by its maker in what it may do, for how long and how much. A role is bounded only in what it allows:
the user who has it signs in as themselves.
"""

from datetime import datetime

from relay_grpc import errors
from relay_grpc.principal import Limits, Principal, PrincipalType


def check_scopes(giver: Principal, scopes: frozenset[str]) -> None:
    """Raises PermissionDenied, which names them, where the giver lacks any of these scopes."""
    if missing := sorted(scopes - giver.scopes):
        raise errors.PermissionDenied(
            f"nobody can give more than they hold; this caller lacks {' '.join(missing)}",
            reason="CEILING_EXCEEDED",
            metadata={"missing_scopes": " ".join(missing)},
        )


def check_key(maker: Principal, scopes: frozenset[str], expires_at: datetime | None, limits: Limits) -> None:
    """Raises PermissionDenied for a key that would be more than its maker.

    expires_at: its end, None for none. A maker that is a user bounds it by its role alone: the expiry of a token is not
    that of the user.
    """
    check_scopes(maker, scopes)
    ends = maker.expires_at if maker.type is PrincipalType.API_KEY else None
    if ends is not None and (expires_at is None or expires_at > ends):
        raise errors.PermissionDenied(
            f"a key can't outlive its maker, which stops working at {ends.isoformat()}", reason="CEILING_EXCEEDED"
        )
    for budget in ("calls", "executions"):
        most, asked = getattr(maker.limits, budget), getattr(limits, budget)
        if most is not None and (asked is None or asked > most):
            raise errors.PermissionDenied(
                f"a key can't have more of a budget than its maker; give {budget}_per_minute, {most} at most",
                reason="CEILING_EXCEEDED",
            )
