"""The audit log in Postgres: rows are added and read, never changed.

Connection first; the caller owns the transaction.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc.audit.event import COLUMNS, Event, as_json

if TYPE_CHECKING:
    from relay_grpc.db import Connection

_NAMES = ", ".join(COLUMNS)


async def insert(connection: "Connection", events: Sequence[Event]) -> None:
    await connection.execute(
        f"""
        INSERT INTO audit_logs ({_NAMES})
        SELECT {_NAMES} FROM jsonb_populate_recordset(NULL::audit_logs, $1::jsonb)
        """,  # noqa: S608  # the names are ours
        as_json(events),
    )


async def list_events(
    connection: "Connection",
    workspace_id: UUID,
    *,
    action: str,
    provider: str,
    status: str,
    actor_id: str,
    request_id: str,
    start: datetime | None,
    end: datetime | None,
    before: UUID | None,
    limit: int,
) -> list[asyncpg.Record]:
    """Newest first, those older than `before`. Empty filters let everything through."""
    return await connection.fetch(
        """
        SELECT * FROM audit_logs
         WHERE workspace_id = $1
           AND ($2 = '' OR action = $2)
           AND ($3 = '' OR provider = $3)
           AND ($4 = '' OR status::text = $4)
           AND ($5 = '' OR actor_id = $5)
           AND ($6 = '' OR request_id = $6)
           AND ($7::timestamptz IS NULL OR created_at >= $7)
           AND ($8::timestamptz IS NULL OR created_at < $8)
           AND ($9::uuid IS NULL OR id < $9)
         ORDER BY id DESC LIMIT $10
        """,
        workspace_id,
        action,
        provider,
        status,
        actor_id,
        request_id,
        start,
        end,
        before,
        limit,
    )
