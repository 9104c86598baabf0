"""The life of an execution as Postgres keeps it, whoever writes."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from relay_grpc.actions.execution import ENDED, TRANSITIONS, State
from relay_grpc.ids import uuid7
from tests.harness import Databases

WORKSPACE = UUID(int=0)
# What the row of an execution holds in each state, besides it.
COLUMNS = {
    State.PENDING: "now(), NULL, NULL, NULL",
    State.EXECUTING: "NULL, gen_random_uuid(), now(), NULL",
    State.UNKNOWN: "NULL, NULL, NULL, NULL",
    **dict.fromkeys(ENDED, "NULL, NULL, NULL, now()"),
}
SET = "UPDATE action_executions SET (status, next_attempt_at, lease_token, lease_until, completed_at)"


@pytest.fixture(scope="module")
async def postgres_connection(databases: Databases) -> AsyncIterator[Any]:
    async with databases.new() as url:
        connection = await asyncpg.connect(url)
        yield connection
        await connection.close()


@pytest.fixture
async def execution(postgres_connection: Any) -> UUID:
    """One that is pending."""
    target, id_ = uuid4(), uuid7()
    await postgres_connection.execute(
        "INSERT INTO connections (id, workspace_id, name, provider, configuration) VALUES ($1, $2, $3, '', '{}')",
        *(target, WORKSPACE, str(target)),
    )
    await postgres_connection.execute(
        """
        INSERT INTO action_executions
          (id, workspace_id, caller, idempotency_key, fingerprint, preview_id, provider, action_type, action_version,
           connection_id, parameters, traceparent, delivery, status, next_attempt_at)
        VALUES ($1, $2, '', 'key of ' || $1::uuid, '', $1, '', '', 1, $3, '{}', '', 'at_least_once', 'pending', now())
        """,
        *(id_, WORKSPACE, target),
    )
    return id_


async def put(connection: Any, id_: UUID, state: State) -> None:
    """Puts the execution into a state by hand."""
    await connection.execute("ALTER TABLE action_executions DISABLE TRIGGER guard")
    await connection.execute(f"{SET} = ROW('{state}'::execution_state, {COLUMNS[state]}) WHERE id = $1", id_)
    await connection.execute("ALTER TABLE action_executions ENABLE TRIGGER guard")


@pytest.mark.parametrize("resent", [False, True], ids=["", "resent"])
@pytest.mark.parametrize("after", State)
@pytest.mark.parametrize("before", State)
async def test_only_legal_transitions_can_be_written(
    postgres_connection: Any, execution: UUID, before: State, after: State, resent: bool
) -> None:
    """All 36, as a resend and not."""
    legal = after in TRANSITIONS[before] or after is before
    if before in ENDED and after is not before:
        legal = legal and resent
    await put(postgres_connection, execution, before)
    change = f"{SET} = ROW('{after}'::execution_state, {COLUMNS[after]})"
    if resent:
        change += ", resend_count = resend_count + 1"
    if legal:
        await postgres_connection.execute(f"{change} WHERE id = $1", execution)
    else:
        with pytest.raises(asyncpg.CheckViolationError, match=f"from {before} to {after}"):
            await postgres_connection.execute(f"{change} WHERE id = $1", execution)
    status = await postgres_connection.fetchval("SELECT status FROM action_executions WHERE id = $1", execution)
    assert status == (after if legal else before)


async def test_every_change_is_counted(postgres_connection: Any, execution: UUID) -> None:
    async def revision() -> int:
        found: int = await postgres_connection.fetchval(
            "SELECT revision FROM action_executions WHERE id = $1", execution
        )
        return found

    before = await revision()
    for column in ("attempt_count = 1", "cancel_requested_at = now()", "revision = 0"):
        await postgres_connection.execute(f"UPDATE action_executions SET {column} WHERE id = $1", execution)
    assert await revision() == before + 3
