"""Which budgets a call is charged to. No I/O.

Every workspace has two budgets, calls and executions. A caller with limits of its own has them besides, within its
workspace's: its calls take their units from both.
"""

from collections.abc import Iterable
from typing import NamedTuple

from relay_grpc.principal import Principal, PrincipalType
from relay_grpc.ratelimit.window import Charge

BUDGETS = ("calls", "executions")  # the fields of Limits
HOLDERS = ("workspace", "caller")


class Price(NamedTuple):
    """What a method costs of one budget. limit: of a workspace whose operator set no other one, in units a minute."""

    budget: str
    cost: int
    limit: int


def charges(principal: Principal, prices: Iterable[Price]) -> list[Charge]:
    """What a call of this caller is charged."""
    tag = f"{{{principal.workspace_id}}}"
    found = []
    for budget, cost, limit in prices:
        subject = f"{tag}:{budget}"
        override = getattr(principal.workspace_limits, budget)
        found.append(Charge(subject, cost, override or limit, budget, "workspace"))
        own = getattr(principal.limits, budget)
        if own is not None:
            found.append(Charge(f"{subject}:{principal.caller}", cost, own, budget, "caller"))
    return found


def holder_name(charge: Charge, principal: Principal) -> str:
    """Whose budget it is, as its caller knows them: "workspace ID", "key ID" or "user ID"."""
    if charge.holder == "workspace":
        return f"workspace {principal.workspace_id}"
    return f"{'key' if principal.type is PrincipalType.API_KEY else 'user'} {principal.id}"
