"""The operator's kill switch: what a halt names is neither previewed nor sent, until it is lifted.

Every instance reads halts with whatever it would send, so they take effect at once. What was accepted before waits, and
goes on afterwards; attempts under way end.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc.audit.event import SYSTEM_WORKSPACE
from relay_grpc.owner import UnknownWorkspace, as_owner, find_workspace, record

if TYPE_CHECKING:
    from relay_grpc.db import Connection


@dataclass(frozen=True, slots=True)
class Halt:
    """workspace: its name; None: all of them. provider: empty: all of them. reason: what callers are told."""

    workspace: str | None
    provider: str
    reason: str
    since: datetime


async def halts(url: str) -> list[Halt]:
    """Those that hold now. Raises DatabaseUnusable."""
    async with as_owner(url) as connection:
        return await _list(connection)


async def halt(url: str, workspace: str | None, provider: str, reason: str) -> list[Halt]:
    """Halts, or gives a halt that holds another reason, and records it. Returns all that hold.

    Raises UnknownWorkspace and DatabaseUnusable.
    """
    async with as_owner(url) as connection:
        workspace_id = await _find(connection, workspace)
        await connection.execute(
            """
            INSERT INTO halts (workspace_id, provider, reason) VALUES ($1, $2, $3)
            ON CONFLICT (workspace_id, provider) DO UPDATE SET reason = excluded.reason
            """,
            workspace_id,
            provider,
            reason,
        )
        await record(
            connection,
            workspace_id,
            "operator.Halt",
            f"workspaces/{workspace_id}",
            provider=provider,
            note=reason,
        )
        return await _list(connection)


async def resume(url: str, workspace: str | None, provider: str) -> tuple[bool, list[Halt]]:
    """Lifts the halt of exactly this workspace and provider, and records it, if there is one.

    Returns whether there was, and those that still hold. Raises UnknownWorkspace and DatabaseUnusable.
    """
    async with as_owner(url) as connection:
        workspace_id = await _find(connection, workspace)
        lifted = await connection.fetchval(
            "DELETE FROM halts WHERE workspace_id = $1 AND provider = $2 RETURNING true", workspace_id, provider
        )
        if lifted:
            await record(connection, workspace_id, "operator.Resume", f"workspaces/{workspace_id}", provider=provider)
        return bool(lifted), await _list(connection)


async def _find(connection: "Connection", workspace: str | None) -> UUID:
    if workspace is None:
        return SYSTEM_WORKSPACE
    found = await find_workspace(connection, workspace)
    if found == SYSTEM_WORKSPACE:
        raise UnknownWorkspace(workspace)
    return found


async def _list(connection: "Connection") -> list[Halt]:
    rows: list[asyncpg.Record] = await connection.fetch(
        """
        SELECT CASE WHEN w.id <> $1 THEN w.name END AS workspace, h.provider, h.reason, h.created_at
          FROM halts h JOIN workspaces w ON w.id = h.workspace_id
         ORDER BY h.created_at, w.name, h.provider
        """,
        SYSTEM_WORKSPACE,
    )
    return [Halt(row["workspace"], row["provider"], row["reason"], row["created_at"]) for row in rows]
