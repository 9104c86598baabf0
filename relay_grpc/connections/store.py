"""Connections in Postgres. Connection first; the caller owns the transaction.

Deleted connections have a row for the sake of their executions, and are found by nothing here.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from relay_grpc import errors
from relay_grpc.connections.changes import Change

if TYPE_CHECKING:
    from relay_grpc.db import Connection

# breaker: the word of relay.v1.BreakerState. signing_keys: those that sign now as JSON, the newest first, which is the
# one that has no end: ids are made by the clocks of several instances.
CONNECTION = """
    c.*,
    CASE WHEN c.open_until IS NULL THEN 'closed' WHEN c.open_until > now() THEN 'open' ELSE 'half_open' END AS breaker,
    (SELECT coalesce(json_agg(json_build_object('id', s.id, 'kind', s.kind, 'public_key', s.public_key,
                                                'created_at', s.created_at, 'expires_at', s.expires_at)
                              ORDER BY s.expires_at DESC NULLS FIRST, s.id DESC), '[]')
       FROM connection_secrets s
      WHERE s.workspace_id = c.workspace_id AND s.connection_id = c.id AND s.kind <> 'headers'
        AND (s.expires_at IS NULL OR s.expires_at > now())) AS signing_keys
"""


async def get(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record:
    """Raises NotFound."""
    row = await connection.fetchrow(
        f"SELECT {CONNECTION} FROM connections c WHERE workspace_id = $1 AND id = $2 AND deleted_at IS NULL",  # noqa: S608  # the names are ours
        workspace_id,
        id_,
    )
    if row is None:
        raise errors.NotFound("connection", str(id_))
    return row


async def get_default(connection: "Connection", workspace_id: UUID) -> asyncpg.Record | None:
    return await connection.fetchrow(
        f"SELECT {CONNECTION} FROM connections c WHERE workspace_id = $1 AND is_default",  # noqa: S608  # the names are ours
        workspace_id,
    )


async def list_(
    connection: "Connection", workspace_id: UUID, *, before: UUID | None, limit: int
) -> list[asyncpg.Record]:
    """Newest first, those older than `before`."""
    return await connection.fetch(
        f"""
        SELECT {CONNECTION} FROM connections c
         WHERE workspace_id = $1 AND deleted_at IS NULL AND ($2::uuid IS NULL OR id < $2)
         ORDER BY id DESC LIMIT $3
        """,  # noqa: S608  # the names are ours
        workspace_id,
        before,
        limit,
    )


async def lock(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record:
    """The connection as nobody else changes it until the transaction ends. Executes go on. Raises NotFound."""
    await connection.execute(
        "SELECT FROM connections WHERE workspace_id = $1 AND id = $2 FOR NO KEY UPDATE", workspace_id, id_
    )
    return await get(connection, workspace_id, id_)  # by a snapshot of its own, which has what this waited for


async def clear_default(connection: "Connection", workspace_id: UUID, *, besides: UUID) -> None:
    """Takes the default from another connection. First of all, or two such changes could wait in a circle."""
    await connection.execute(
        """
        UPDATE connections SET is_default = false, updated_at = now()
         WHERE workspace_id = $1 AND is_default AND id <> $2
        """,
        workspace_id,
        besides,
    )


async def insert(
    connection: "Connection",
    *,
    id_: UUID,
    workspace_id: UUID,
    name: str,
    provider: str,
    configuration: Mapping[str, Any],
    default: bool,
) -> None:
    """A new connection, which takes over being the default when it is to be. Raises AlreadyExists."""
    if default:
        await clear_default(connection, workspace_id, besides=id_)
    try:
        await connection.execute(
            """
            INSERT INTO connections (id, workspace_id, name, provider, configuration, is_default)
            VALUES ($1, $2, $3, $4, $5, $6)
            """,
            id_,
            workspace_id,
            name,
            provider,
            json.dumps(configuration),
            default,
        )
    except asyncpg.UniqueViolationError as error:
        raise _taken(error, name) from error


async def update(connection: "Connection", workspace_id: UUID, id_: UUID, change: Change) -> None:
    """Raises AlreadyExists."""
    try:
        await connection.execute(
            """
            UPDATE connections
               SET name = $3, enabled = $4, disabled_reason = $5, is_default = $6, configuration = $7,
                   version = version + $8::int, updated_at = now(),
                   failures = CASE WHEN $9 THEN 0 ELSE failures END, probes = CASE WHEN $9 THEN 0 ELSE probes END,
                   failing_since = CASE WHEN $9 THEN NULL ELSE failing_since END,
                   open_until = CASE WHEN $9 THEN NULL ELSE open_until END
             WHERE workspace_id = $1 AND id = $2
            """,
            workspace_id,
            id_,
            change.name,
            change.enabled,
            change.disabled_reason,
            change.default,
            json.dumps(change.configuration),
            int(change.changes_deliveries),
            change.heals,
        )
    except asyncpg.UniqueViolationError as error:
        raise _taken(error, change.name) from error


def _taken(error: asyncpg.UniqueViolationError, name: str) -> errors.RelayError:
    if error.constraint_name != "connections_name":
        return errors.Contention("another call is changing the default connection; try again")
    return errors.AlreadyExists(f"a connection named {name!r} exists already")


async def touch(connection: "Connection", workspace_id: UUID, id_: UUID) -> None:
    """Notes that the connection was changed by what is kept elsewhere."""
    await connection.execute(
        "UPDATE connections SET updated_at = now() WHERE workspace_id = $1 AND id = $2", workspace_id, id_
    )


async def delete(connection: "Connection", workspace_id: UUID, id_: UUID) -> None:
    """Raises NotFound, or FailedPrecondition where executions that have not ended use it.

    Whatever gives it such an execution (orders, resends, recoveries) has the connection locked FOR KEY SHARE or more:
    it is done before this lock is had, and then seen, or comes after this transaction and finds no connection.
    """
    await connection.execute(
        "SELECT FROM connections WHERE workspace_id = $1 AND id = $2 FOR UPDATE", workspace_id, id_
    )
    await get(connection, workspace_id, id_)
    in_use = await connection.fetchval(
        """
        SELECT EXISTS (SELECT FROM action_executions
                        WHERE workspace_id = $1 AND connection_id = $2 AND status = 'pending')
            OR EXISTS (SELECT FROM action_executions
                        WHERE workspace_id = $1 AND connection_id = $2 AND status IN ('executing', 'unknown'))
        """,
        workspace_id,
        id_,
    )
    if in_use:
        raise errors.FailedPrecondition(
            "executions that have not ended use this connection: disable it and cancel or settle them first",
            reason="CONNECTION_IN_USE",
        )
    await connection.execute(
        """
        UPDATE connections
           SET deleted_at = now(), updated_at = now(), enabled = false, disabled_reason = 'deleted', is_default = false
         WHERE workspace_id = $1 AND id = $2
        """,
        workspace_id,
        id_,
    )
