"""Previews, executions and attempts as their callers see them. Connection first, in the caller's workspace transaction.

leases.py has what workers do with them.
"""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from relay_grpc.actions.catalogue import Action

if TYPE_CHECKING:
    from relay_grpc.db import Connection

# The columns of an execution that its callers see, and those of its last finished attempt.
EXECUTION = """
    e.id, e.action_type, e.action_version, e.provider, e.connection_id, e.preview_id, e.idempotency_key,
    e.status, e.attempt_count, e.next_attempt_at, e.created_at, e.completed_at
"""
ATTEMPT = "a.number, a.started_at, a.finished_at, a.outcome, a.status_code, a.response_excerpt, a.error"


async def insert_preview(
    connection: "Connection",
    *,
    id_: UUID,
    workspace_id: UUID,
    caller: str,
    action: Action,
    target: asyncpg.Record,
    parameters: str,
    params_hash: str,
    params_prefix: str,
    digest: str,
    fingerprint: bytes,
    shown: Any,
    ttl: timedelta,
) -> asyncpg.Record:
    """target: the connection's row. shown: what else the caller is told, as JSON."""
    row = await connection.fetchrow(
        """
        INSERT INTO previews
          (id, workspace_id, caller, provider, action_type, action_version, connection_id, connection_version,
           parameters, params_hash, params_prefix, digest, fingerprint, shown, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, now() + $15::interval)
        RETURNING *
        """,
        id_,
        workspace_id,
        caller,
        action.provider,
        action.name,
        action.version,
        target["id"],
        target["version"],
        parameters,
        params_hash,
        params_prefix,
        digest,
        fingerprint,
        json.dumps(shown),
        ttl,
    )
    assert row is not None  # noqa: S101  # INSERT ... RETURNING
    return row


async def get_preview(connection: "Connection", workspace_id: UUID, caller: str, id_: UUID) -> asyncpg.Record | None:
    return await connection.fetchrow(
        "SELECT * FROM previews WHERE workspace_id = $1 AND caller = $2 AND id = $3", workspace_id, caller, id_
    )


async def explain(
    connection: "Connection", workspace_id: UUID, caller: str, preview_id: UUID, idempotency_key: str
) -> asyncpg.Record:
    """What stands in the way of an Execute that `commit` did not carry out: columns are NULL for what is not there."""
    row = await connection.fetchrow(
        """
        SELECT e.id AS execution_id,
               e.caller = $2 AND e.preview_id = $3 OR e.fingerprint = p.fingerprint AS same_request,
               p.id AS preview_id, p.execution_id AS used_by, p.digest, p.action_type, p.action_version,
               p.expires_at <= now() AS expired,
               c.enabled, c.version = p.connection_version AS same_connection
          FROM (SELECT) one
          LEFT JOIN action_executions e ON e.workspace_id = $1 AND e.idempotency_key = $4
          LEFT JOIN previews p ON p.workspace_id = $1 AND p.caller = $2 AND p.id = $3
          LEFT JOIN connections c ON c.workspace_id = $1 AND c.id = p.connection_id
        """,
        workspace_id,
        caller,
        preview_id,
        idempotency_key,
    )
    assert row is not None  # noqa: S101  # a SELECT without FROM has one row
    return row


async def get_execution(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record | None:
    """The execution and its last finished attempt."""
    rows = await list_executions(connection, workspace_id, only=id_, limit=1)
    return rows[0] if rows else None


async def list_executions(
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
