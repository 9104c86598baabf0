"""Previews, and what stands in the way of executing them. Connection first, in the caller's workspace transaction."""

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from relay_grpc.actions.catalogue import Action
from relay_grpc.actions.preview import DIGEST_SQL
from relay_grpc.audit.event import SYSTEM_WORKSPACE

if TYPE_CHECKING:
    from relay_grpc.db import Connection


def halted_sql(workspace_id: str, provider: str) -> str:
    """The condition that a row h of halts holds deliveries of this workspace and provider back. Both: SQL."""
    return f"h.workspace_id IN ({workspace_id}, '{SYSTEM_WORKSPACE}') AND h.provider IN ('', {provider})"


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
    """What may stand in the way of an Execute: columns are NULL for what is not there.

    same_request: as the execution's that has the key. intact: the preview is what its digest says.
    """
    row = await connection.fetchrow(
        f"""
        SELECT e.id AS execution_id,
               e.caller = $2 AND e.preview_id = $3 OR e.fingerprint = p.fingerprint AS same_request,
               p.id AS preview_id, p.execution_id AS used_by, p.digest, p.provider, p.action_type, p.action_version,
               p.connection_id, p.expires_at <= now() AS expired,
               p.digest = {DIGEST_SQL} AS intact,
               c.enabled, c.disabled_reason, c.version = p.connection_version AS same_connection,
               (SELECT reason FROM halts h WHERE {halted_sql("$1", "p.provider")} LIMIT 1) AS halted
          FROM (SELECT) one
          LEFT JOIN action_executions e ON e.workspace_id = $1 AND e.idempotency_key = $4
          LEFT JOIN previews p ON p.workspace_id = $1 AND p.caller = $2 AND p.id = $3
          LEFT JOIN connections c ON c.workspace_id = $1 AND c.id = p.connection_id
        """,  # noqa: S608  # the names are ours
        workspace_id,
        caller,
        preview_id,
        idempotency_key,
    )
    assert row is not None  # noqa: S101  # a SELECT without FROM has one row
    return row


async def list_halts(connection: "Connection", workspace_id: UUID) -> dict[str, str]:
    """Why deliveries of this workspace are held back, by provider; '' for all of them."""
    rows = await connection.fetch(
        "SELECT provider, reason FROM halts WHERE workspace_id = ANY($1::uuid[]) ORDER BY created_at DESC",
        [workspace_id, SYSTEM_WORKSPACE],
    )
    return {row["provider"]: row["reason"] for row in rows}
