from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from relay_grpc.ratelimit.window import Charge, Decision
from tests.harness import Relay
from tests.rpc.conftest import wire as wire

LIMIT = 1_000_000  # of the harness, for both budgets


async def spend(relay: Relay, budget: str, cost: int = 0, limit: int = LIMIT, caller: str = "") -> Decision:
    """Spends from a budget of the tenant's workspace, or of this caller in it; at no cost, reads it."""
    subject = f"{{{relay.tenant.workspace_id}}}:{budget}" + (f":{caller}" if caller else "")
    return await relay.app.limiter.spend([Charge(subject, cost, limit, budget, "caller" if caller else "workspace")])


@pytest.fixture
async def spent(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Awaitable[tuple[int, ...]]]:
    """What of the two budgets was spent since the test began: (calls, executions).

    For the limiter the time stands still, so that no budget refills meanwhile.
    """
    monkeypatch.setattr(relay.app.limiter, "_clock", lambda: 43_200.0)

    async def remaining() -> list[int]:
        return [(await spend(relay, budget)).remaining for budget in ("calls", "executions")]

    before = await remaining()

    async def since() -> tuple[int, ...]:
        return tuple(then - now for then, now in zip(before, await remaining(), strict=True))

    return since


@pytest.fixture
def events_of(relay: Relay) -> Callable[[str], Awaitable[list[Any]]]:
    """The audit events of one request id."""

    async def rows(request_id: str) -> list[Any]:
        return await relay.sql("SELECT * FROM audit_events WHERE request_id = $1", request_id)

    return rows
