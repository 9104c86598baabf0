"""A workspace's log as its readers walk it: events by leaf index, and what is left of it after retention.

Connection first, in the caller's workspace.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc import errors
from relay_grpc.audit import tree_store
from relay_grpc.audit.reading import VALUES, of_page

if TYPE_CHECKING:
    from relay_grpc.db import Connection

DROP = "operator.DropEvents"
FIRST_KEPT = "FIRST_KEPT:"  # begins the reason of such an event, before the leaf index
BATCH = 256  # events that are read at once


class Dropped(errors.Contention):
    """Retention took events that were asked for. first_kept: from which leaf on they are all there."""

    def __init__(self, first_kept: int) -> None:
        super().__init__("retention drops events of this range right now; ask again")
        self.first_kept = first_kept


@dataclass(frozen=True, slots=True)
class Log:
    """A log as it stands. checkpoint: the newest. dropped: the event that tells of the newest drop.

    first_kept: the leaf from which on all events are there; what is kept of those before is no part of readings.
    """

    checkpoint: asyncpg.Record
    dropped: asyncpg.Record | None
    first_kept: int

    @property
    def size(self) -> int:
        size: int = self.checkpoint["tree_size"]
        return size


async def log_of(connection: "Connection", workspace_id: UUID) -> Log:
    """Raises NotLoggedYet while there is no checkpoint, or none with the newest drop."""
    dropped = await newest_drop(connection, workspace_id)  # before the checkpoint, which then is the younger
    found = await tree_store.newest_checkpoints(connection, [workspace_id])
    if workspace_id not in found or (dropped and dropped["leaf_index"] is None):
        raise errors.NotLoggedYet("the log has no checkpoint of these events yet; try again in a second")
    return Log(found[workspace_id], dropped, first_kept(dropped))


async def newest_drop(connection: "Connection", workspace_id: UUID) -> asyncpg.Record | None:
    """The event that tells what retention dropped of this log."""
    return await connection.fetchrow(
        """
        SELECT * FROM audit_events WHERE workspace_id = $1 AND id =
               (SELECT id FROM audit_logs WHERE workspace_id = $1 AND action = $2 ORDER BY action DESC, id DESC LIMIT 1)
        """,
        workspace_id,
        DROP,
    )


def first_kept(drop: asyncpg.Record | None) -> int:
    """The leaf from which on this drop, if there was one, has left the log whole."""
    return int(drop["reason"].removeprefix(FIRST_KEPT)) if drop else 0


async def checkpoint_at(connection: "Connection", workspace_id: UUID, size: int) -> asyncpg.Record | None:
    """The checkpoint of a log of exactly this size."""
    return await connection.fetchrow(
        "SELECT * FROM audit_checkpoints WHERE workspace_id = $1 AND tree_size = $2", workspace_id, size
    )


async def size_before(connection: "Connection", workspace_id: UUID, moment: datetime) -> int:
    """How long the log was before a moment, going by the checkpoints that are committed."""
    size: int | None = await connection.fetchval(
        """
        SELECT tree_size FROM audit_checkpoints
         WHERE workspace_id = $1 AND created_at < $2 ORDER BY created_at DESC LIMIT 1
        """,
        workspace_id,
        moment,
    )
    return size or 0


async def now(connection: "Connection") -> datetime:
    """By the clock that checkpoints go by."""
    moment: datetime = await connection.fetchval("SELECT clock_timestamp()")
    return moment


async def is_settled(connection: "Connection", workspace_id: UUID, moment: datetime) -> bool:
    """Whether every checkpoint from before this moment, which has passed, is committed.

    Sequencers make them one after the other, under a lock: either a later one is there, or nobody is making one.
    A statement of its own: what a later one reads was committed before.
    """
    settled: bool = await connection.fetchval(
        """
        SELECT EXISTS (SELECT FROM audit_checkpoints WHERE workspace_id = $1 AND created_at >= $2)
            OR NOT EXISTS (SELECT FROM pg_locks
                            WHERE locktype = 'advisory' AND objsubid = 1
                              AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                              AND (classid::bigint << 32) + objid::bigint = $3)
        """,
        workspace_id,
        moment,
        tree_store.SEQUENCER_LOCK,
    )
    return settled


async def events_at(connection: "Connection", workspace_id: UUID, first: int, end: int) -> list[asyncpg.Record]:
    """The events from leaf `first` up to `end`, at least one and BATCH at most, by their places.

    Raises LogDamaged where one of them is gone, and Dropped where retention took it.
    """
    end = min(end, first + BATCH)
    rows = await connection.fetch(
        f"""
        WITH page AS MATERIALIZED (
          SELECT event_id AS id, leaf_index FROM audit_leaves
           WHERE workspace_id = $1 AND leaf_index >= $2 AND leaf_index < $3
        )
        SELECT p.leaf_index, l.*, {VALUES}
          FROM page p
          LEFT JOIN {of_page("audit_logs", "id")} l ON l.id = p.id
          LEFT JOIN {of_page("audit_values", "id")} v ON v.id = p.id
         ORDER BY p.leaf_index
        """,  # noqa: S608  # the names are ours
        workspace_id,
        first,
        end,
    )
    for expected, row in enumerate(rows, first):
        if row["leaf_index"] != expected or row["id"] is None or row["salts"] is None:
            await _gone(connection, workspace_id, expected)
    if len(rows) != end - first:
        await _gone(connection, workspace_id, first + len(rows))
    return rows


async def _gone(connection: "Connection", workspace_id: UUID, leaf: int) -> None:
    kept = first_kept(await newest_drop(connection, workspace_id))
    if leaf < kept:
        raise Dropped(kept)
    raise damaged(leaf)


def damaged(leaf: int) -> errors.LogDamaged:
    return errors.LogDamaged(f"event {leaf} of the log is not what was signed; tell whoever operates this server")


async def has_strays(connection: "Connection", workspace_id: UUID, after: UUID, upto: UUID) -> bool:
    """Whether there are events with ids in this range (after < id <= upto) that have no place, and wait for none."""
    found: bool = await connection.fetchval(
        """
        SELECT EXISTS (
          SELECT FROM audit_logs l
           WHERE l.workspace_id = $1 AND l.id > $2 AND l.id <= $3
             -- OFFSET 0: each is looked up, and the tables are not joined as wholes
             AND NOT EXISTS (SELECT FROM audit_leaves WHERE workspace_id = $1 AND event_id = l.id OFFSET 0)
             AND NOT EXISTS (SELECT FROM audit_pending WHERE event_id = l.id OFFSET 0)
        )
        """,
        workspace_id,
        after,
        upto,
    )
    return found
