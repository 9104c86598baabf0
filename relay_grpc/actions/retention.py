"""What is deleted when its time is over, as relay_worker: each call one statement over at most BATCH rows.

Batches keep every lock short, and SKIP LOCKED lets instances share the work: what somebody holds is left for the next.
"""

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay_grpc.db import Connection

BATCH = 500


async def delete_executions(connection: "Connection", age: timedelta) -> int:
    """Executions that ended longer than `age` ago, with their attempts and previews. Returns how many.

    Only what has ended has a time of completion: what is pending, under way or unknown stays.
    """
    deleted: int = await connection.fetchval(
        """
        WITH ended AS (
          SELECT id, preview_id FROM action_executions WHERE completed_at < now() - $1::interval
           ORDER BY completed_at LIMIT $2 FOR UPDATE SKIP LOCKED
        ), previewed AS (
          DELETE FROM previews p USING ended WHERE p.id = ended.preview_id
        ), deleted AS (
          DELETE FROM action_executions e USING ended WHERE e.id = ended.id RETURNING e.id
        )
        SELECT count(*) FROM deleted
        """,
        age,
        BATCH,
    )
    return deleted


async def delete_unused_previews(connection: "Connection", age: timedelta) -> int:
    """Previews that expired longer than `age` ago and were never executed; the others go with their executions."""
    deleted: int = await connection.fetchval(
        """
        WITH expired AS (
          SELECT id FROM previews WHERE execution_id IS NULL AND expires_at < now() - $1::interval
           ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED
        ), deleted AS (
          DELETE FROM previews p USING expired WHERE p.id = expired.id RETURNING p.id
        )
        SELECT count(*) FROM deleted
        """,
        age,
        BATCH,
    )
    return deleted


async def delete_recoveries(connection: "Connection", age: timedelta) -> int:
    """Recoveries that ended longer than `age` ago."""
    deleted: int = await connection.fetchval(
        """
        WITH ended AS (
          SELECT id FROM recoveries WHERE completed_at < now() - $1::interval LIMIT $2 FOR UPDATE SKIP LOCKED
        ), deleted AS (
          DELETE FROM recoveries r USING ended WHERE r.id = ended.id RETURNING r.id
        )
        SELECT count(*) FROM deleted
        """,
        age,
        BATCH,
    )
    return deleted
