"""Executions and attempts as their callers see and change them. Connection first, in the caller's workspace.

leases.py has what workers do with them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

if TYPE_CHECKING:
    from relay_grpc.db import Connection

# The columns of an execution that its callers see, and those of its last finished attempt.
EXECUTION = """
    e.id, e.action_type, e.action_version, e.provider, e.connection_id, e.preview_id, e.idempotency_key,
    e.status, e.delivery, e.attempt_count, e.next_attempt_at, e.created_at, e.completed_at,
    e.cancel_requested_at, e.resend_count, e.revision
"""
ATTEMPT = "a.number, a.started_at, a.finished_at, a.outcome, a.status_code, a.response_excerpt, a.error"
# What makes an execution e that has ended due now, with all its attempts anew.
RESENT = """
    status = 'pending', next_attempt_at = now(), completed_at = NULL, cancel_requested_at = NULL,
    resend_count = e.resend_count + 1, attempts_before = e.attempt_count
"""


async def get(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record | None:
    """The execution and its last finished attempt."""
    rows = await list_(connection, workspace_id, only=id_, limit=1)
    return rows[0] if rows else None


async def list_(
    connection: "Connection",
    workspace_id: UUID,
    *,
    only: UUID | None = None,
    states: Sequence[str] = (),
    action: str = "",
    connection_id: UUID | None = None,
    before: UUID | None = None,
    limit: int,
) -> list[asyncpg.Record]:
    """Executions and their last finished attempts, newest first, those older than `before`. Empty filters pass all."""
    return await connection.fetch(
        f"""
        SELECT {EXECUTION}, {ATTEMPT}
          FROM action_executions e
          LEFT JOIN LATERAL (SELECT * FROM execution_attempts a
                              WHERE a.workspace_id = $1 AND a.execution_id = e.id
                              ORDER BY number DESC LIMIT 1) a ON true
         WHERE e.workspace_id = $1
           AND ($2::uuid IS NULL OR e.id = $2)
           AND (cardinality($3::text[]) = 0 OR e.status::text = ANY($3))
           AND ($4 = '' OR e.action_type = $4)
           AND ($5::uuid IS NULL OR e.connection_id = $5)
           AND ($6::uuid IS NULL OR e.id < $6)
         ORDER BY e.id DESC LIMIT $7
        """,  # noqa: S608  # the names are ours
        workspace_id,
        only,
        states,
        action,
        connection_id,
        before,
        limit,
    )


async def list_attempts(
    connection: "Connection", workspace_id: UUID, execution_id: UUID, *, after: int, limit: int
) -> list[asyncpg.Record]:
    """First to last, those after number `after`."""
    return await connection.fetch(
        f"""
        SELECT {ATTEMPT} FROM execution_attempts a
         WHERE workspace_id = $1 AND execution_id = $2 AND number > $3 ORDER BY number LIMIT $4
        """,  # noqa: S608  # the names are ours
        workspace_id,
        execution_id,
        after,
        limit,
    )


async def lock(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record | None:
    """The execution, to be changed, and whether its connection is enabled, which is not deleted meanwhile."""
    return await connection.fetchrow(
        f"""
        SELECT {EXECUTION}, c.enabled, c.disabled_reason
          FROM action_executions e JOIN connections c ON c.workspace_id = $1 AND c.id = e.connection_id
         WHERE e.workspace_id = $1 AND e.id = $2
           FOR UPDATE OF e FOR KEY SHARE OF c
        """,  # noqa: S608  # the names are ours
        workspace_id,
        id_,
    )


async def cancel(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record:
    """Ends one that is pending; of one that is executing, the attempt under way is the last."""
    await connection.execute(
        """
        UPDATE action_executions
           SET status = CASE status WHEN 'pending' THEN 'cancelled' ELSE status END, next_attempt_at = NULL,
               completed_at = CASE status WHEN 'pending' THEN now() END,
               cancel_requested_at = CASE status WHEN 'executing' THEN coalesce(cancel_requested_at, now()) END
         WHERE workspace_id = $1 AND id = $2
        """,
        workspace_id,
        id_,
    )
    return await _changed(connection, workspace_id, id_)


async def resend(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record:
    """Makes one that has ended due now, with all its attempts anew."""
    await connection.execute(
        f"UPDATE action_executions e SET {RESENT} WHERE workspace_id = $1 AND id = $2",  # noqa: S608  # ours
        workspace_id,
        id_,
    )
    return await _changed(connection, workspace_id, id_)


async def reconcile(connection: "Connection", workspace_id: UUID, id_: UUID, state: str) -> asyncpg.Record:
    """Ends one whose outcome was unknown."""
    await connection.execute(
        """
        UPDATE action_executions SET status = $3, completed_at = now() WHERE workspace_id = $1 AND id = $2
        """,
        workspace_id,
        id_,
        state,
    )
    return await _changed(connection, workspace_id, id_)


async def _changed(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record:
    row = await get(connection, workspace_id, id_)
    assert row is not None  # noqa: S101  # this transaction holds its lock
    return row
