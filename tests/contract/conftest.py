from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.harness import Relay
from tests.rpc.conftest import wire as wire

LIMIT = 1_000_000  # of the harness, for both budgets


@pytest.fixture
async def spent(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Awaitable[tuple[int, ...]]]:
    """What of the two budgets was spent since the test began: (calls, executions).

    For the limiter the time stands still, so that no budget refills meanwhile.
    """
    monkeypatch.setattr(relay.app.limiter, "_clock", lambda: 43_200.0)

    async def remaining() -> list[int]:
        subjects = (f"{budget}:{relay.tenant.workspace_id}" for budget in ("calls", "executions"))
        return [(await relay.app.limiter.spend(subject, 0, LIMIT)).remaining for subject in subjects]

    before = await remaining()

    async def since() -> tuple[int, ...]:
        return tuple(then - now for then, now in zip(before, await remaining(), strict=True))

    return since


@pytest.fixture
def events_of(relay: Relay) -> Callable[[str], Awaitable[list[Any]]]:
    """The audit events of one request id."""

    async def rows(request_id: str) -> list[Any]:
        return await relay.sql("SELECT * FROM audit_logs WHERE request_id = $1", request_id)

    return rows
