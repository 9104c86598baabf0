"""What the operator grants a workspace instead of the settings' limits.

Instances read it with whom they authenticate: they hear of a change at once, and at the latest read it 5 s later.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from relay_grpc.audit.event import SYSTEM_WORKSPACE
from relay_grpc.owner import as_owner, record
from relay_grpc.principal import Limits


@dataclass(frozen=True, slots=True)
class WorkspaceLimits:
    """limits: what its operator set, in units a minute; None: what the settings say."""

    workspace_id: UUID
    name: str
    limits: Limits


async def workspaces(url: str, name: str | None = None) -> list[WorkspaceLimits]:
    """All workspaces, or the one of this name. Raises DatabaseUnusable."""
    async with as_owner(url) as connection:
        rows = await connection.fetch(
            """
            SELECT id, name, calls_per_minute, executions_per_minute FROM workspaces
             WHERE ($1::text IS NULL OR name = $1) AND id <> $2
             ORDER BY name
            """,
            name,
            SYSTEM_WORKSPACE,
        )
    return [_limits(row) for row in rows]


async def set_limits(url: str, name: str, limits: Mapping[str, int | None]) -> WorkspaceLimits | None:
    """Sets the limits that are named, "calls" or "executions", and records it. None: there is no such workspace.

    limits: units a minute; None: the settings'. Raises DatabaseUnusable.
    """
    async with as_owner(url) as connection:
        row = await connection.fetchrow(
            """
            UPDATE workspaces
               SET calls_per_minute = CASE WHEN $3 THEN $4::int ELSE calls_per_minute END,
                   executions_per_minute = CASE WHEN $5 THEN $6::int ELSE executions_per_minute END
             WHERE name = $1 AND id <> $2
            RETURNING id, name, calls_per_minute, executions_per_minute
            """,
            name,
            SYSTEM_WORKSPACE,
            "calls" in limits,
            limits.get("calls"),
            "executions" in limits,
            limits.get("executions"),
        )
        if row is None:
            return None
        await record(
            connection,
            row["id"],
            "operator.SetLimits",
            f"workspaces/{row['id']}",
            params_prefix=json.dumps(dict(limits), separators=(",", ":")),
        )
    return _limits(row)


def _limits(row: asyncpg.Record) -> WorkspaceLimits:
    return WorkspaceLimits(row["id"], row["name"], Limits(row["calls_per_minute"], row["executions_per_minute"]))
