"""Recoveries in Postgres: begun, looked at and cancelled by their callers, advanced by workers in batches.

Connection first. A recovery goes through the failed executions of its range by id, which tells when they were made, and
resends those that had failed when it began; so it comes to each of them once, whatever becomes of it meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc.actions.execution_store import RESENT
from relay_grpc.audit import store
from relay_grpc.audit.event import Event
from relay_grpc.ids import first_uuid7

if TYPE_CHECKING:
    from relay_grpc.db import Connection

BATCH = 200  # executions that a transaction looks at


@dataclass(frozen=True, slots=True)
class Range:
    """Executions made from start, inclusive, to end, exclusive. connection_id: of this connection alone."""

    start: datetime
    end: datetime
    connection_id: UUID | None


async def count(connection: "Connection", workspace_id: UUID, range_: Range, actions: Sequence[str]) -> int:
    """How many executions a recovery would resend now. actions: what may run."""
    found: int = await connection.fetchval(
        """
        SELECT count(*) FROM action_executions e
          JOIN connections c ON c.workspace_id = $1 AND c.id = e.connection_id
         WHERE e.workspace_id = $1 AND e.status = 'failed' AND e.id >= $2 AND e.id < $3
           AND ($4::uuid IS NULL OR e.connection_id = $4)
           AND e.action_type = ANY($5) AND c.enabled AND c.deleted_at IS NULL
        """,
        workspace_id,
        first_uuid7(range_.start),
        first_uuid7(range_.end),
        range_.connection_id,
        actions,
    )
    return found


async def insert(
    connection: "Connection", *, id_: UUID, workspace_id: UUID, range_: Range, total: int, traceparent: str
) -> asyncpg.Record:
    row = await connection.fetchrow(
        """
        INSERT INTO recoveries
          (id, workspace_id, start_time, end_time, connection_id, total_count, last_id, traceparent)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING *
        """,
        id_,
        workspace_id,
        range_.start,
        range_.end,
        range_.connection_id,
        total,
        first_uuid7(range_.start),
        traceparent,
    )
    assert row is not None  # noqa: S101  # INSERT ... RETURNING
    return row


async def get(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record | None:
    return await connection.fetchrow("SELECT * FROM recoveries WHERE workspace_id = $1 AND id = $2", workspace_id, id_)


async def cancel(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record | None:
    """The recovery, ended by now. It waits for the batch that is under way."""
    await connection.execute(
        """
        UPDATE recoveries SET cancelled = true, completed_at = now()
         WHERE workspace_id = $1 AND id = $2 AND completed_at IS NULL
        """,
        workspace_id,
        id_,
    )
    return await get(connection, workspace_id, id_)


async def under_way(connection: "Connection") -> list[UUID]:
    """Of all workspaces, as relay_worker; oldest first."""
    rows = await connection.fetch("SELECT id FROM recoveries WHERE completed_at IS NULL ORDER BY id")
    return [row["id"] for row in rows]


async def advance(connection: "Connection", id_: UUID, actions: Sequence[str]) -> asyncpg.Record | None:
    """Resends the next batch, as relay_worker. Returns the recovery as it is then, ended where that was the last one.

    None, and nothing is done: it had ended, or another instance is at it.
    """
    async with connection.transaction():
        recovery = await connection.fetchrow(
            "SELECT * FROM recoveries WHERE id = $1 AND completed_at IS NULL FOR UPDATE SKIP LOCKED", id_
        )
        if recovery is None:
            return None
        batch = await _resend(connection, recovery, actions)
        advanced = await connection.fetchrow(
            """
            UPDATE recoveries SET recovered_count = recovered_count + $2, last_id = coalesce($3, last_id),
                                  completed_at = CASE WHEN $4 THEN now() END
             WHERE id = $1 RETURNING *
            """,
            id_,
            batch["resent"],
            batch["last_id"],
            batch["looked_at"] < BATCH,
        )
        assert advanced is not None  # noqa: S101  # this transaction holds its lock
        if advanced["completed_at"]:
            ended = Event(
                workspace_id=recovery["workspace_id"],
                action="recovery.ended",
                target=f"recoveries/{id_}",
                trace_id=recovery["traceparent"][3:35],
            )
            await store.insert(connection, [ended])
    return advanced


async def _resend(connection: "Connection", recovery: asyncpg.Record, actions: Sequence[str]) -> asyncpg.Record:
    """The next batch of a recovery: how many executions were looked_at and resent, and the last_id."""
    batch = await connection.fetchrow(
        f"""
        WITH looked_at AS MATERIALIZED (
          SELECT id, connection_id, action_type, completed_at FROM action_executions
           WHERE workspace_id = $1 AND status = 'failed' AND id > $2 AND id < $3
           ORDER BY id LIMIT $4
        ), usable AS (
          SELECT id FROM connections
           WHERE workspace_id = $1 AND id IN (SELECT connection_id FROM looked_at)
             AND ($5::uuid IS NULL OR id = $5) AND enabled AND deleted_at IS NULL
           ORDER BY id FOR KEY SHARE  -- so that none is deleted while executions of it come back to life
        ), resent AS (
          UPDATE action_executions e SET {RESENT}
            FROM looked_at l JOIN usable u ON u.id = l.connection_id
           WHERE e.id = l.id AND e.status = 'failed' AND e.completed_at <= $6 AND e.action_type = ANY($7)
          RETURNING e.id
        )
        SELECT (SELECT count(*) FROM looked_at) AS looked_at, (SELECT count(*) FROM resent) AS resent,
               (SELECT id FROM looked_at ORDER BY id DESC LIMIT 1) AS last_id
        """,  # noqa: S608  # the names are ours
        recovery["workspace_id"],
        recovery["last_id"],
        first_uuid7(recovery["end_time"]),
        BATCH,
        recovery["connection_id"],
        recovery["created_at"],
        actions,
    )
    assert batch is not None  # noqa: S101  # a SELECT without FROM has one row
    return batch
