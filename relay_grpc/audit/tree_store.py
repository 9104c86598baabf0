"""The Merkle logs in Postgres: what waits for its place, the places, the tiles and the checkpoints.

Connection first; the caller owns the transaction. A workspace's log is as large as its newest checkpoint says. What
writes, and what spans workspaces, runs as relay_worker.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc.audit.merkle import Tile

if TYPE_CHECKING:
    from relay_grpc.db import Connection

SEQUENCER_LOCK = 0x52656C6179 + 1  # beside the migrators'


@dataclass(frozen=True, slots=True)
class Extension:
    """What is added to a log.

    first: its size before, the leaf index of the first of the events. tiles: as they become. root, note: of the log
    with the events. since: when the checkpoint before it was made; a later one is never older, whatever clocks do.
    """

    workspace_id: UUID
    first: int
    events: Sequence[UUID]
    tiles: Mapping[Tile, bytes]
    root: bytes
    note: str
    since: datetime | None


async def is_called_for(connection: "Connection", after: UUID, damaged: Collection[UUID]) -> bool:
    """Whether events of other logs than these, with ids after this one, wait for a place, and nobody gives them one."""
    found: bool = await connection.fetchval(
        """
        SELECT CASE WHEN pg_try_advisory_xact_lock($1)
                    THEN EXISTS (SELECT FROM audit_pending WHERE event_id > $2 AND workspace_id <> ALL($3::uuid[]))
                    ELSE false END
        """,
        SEQUENCER_LOCK,
        after,
        list(damaged),
    )
    return found


async def become_sequencer(connection: "Connection") -> bool:
    """Whether this transaction is the one that may extend the logs, until it ends.

    A statement of its own: what a later one reads was committed before this one had the lock.
    """
    had: bool = await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", SEQUENCER_LOCK)
    return had


async def hold_sequencers(connection: "Connection") -> None:
    """Waits until nobody extends the logs; nobody does before this transaction ends. A statement of its own, too."""
    await connection.execute("SELECT pg_advisory_xact_lock($1)", SEQUENCER_LOCK)


async def pending(
    connection: "Connection", after: UUID, limit: int, workspace_ids: Collection[UUID], *, of_them: bool
) -> list[asyncpg.Record]:
    """What waits for its place in the logs of these workspaces, or of all others, from ids after one on, oldest first.

    event_id, log: the workspace's id. The rest: the row of audit_logs; all of it NULL where the event is gone.
    """
    return await connection.fetch(
        """
        SELECT p.event_id, p.workspace_id AS log, l.*
          FROM (SELECT * FROM audit_pending
                 WHERE event_id > $1 AND (workspace_id = ANY($3::uuid[])) = $4 ORDER BY event_id LIMIT $2) p
          LEFT JOIN LATERAL (SELECT * FROM audit_logs WHERE workspace_id = p.workspace_id AND id = p.event_id
                              LIMIT 1) l ON true  -- LIMIT: each by the key of its month, however empty tables look
         ORDER BY p.event_id
        """,
        after,
        limit,
        list(workspace_ids),
        of_them,
    )


async def oldest_pending(connection: "Connection") -> UUID | None:
    """The event that waits longest for its place."""
    found: UUID | None = await connection.fetchval("SELECT event_id FROM audit_pending ORDER BY event_id LIMIT 1")
    return found


async def newest_checkpoints(connection: "Connection", workspace_ids: Collection[UUID]) -> dict[UUID, asyncpg.Record]:
    """By workspace; one whose log is empty has none."""
    rows = await connection.fetch(
        """
        SELECT c.* FROM unnest($1::uuid[]) w(id)
         CROSS JOIN LATERAL (SELECT * FROM audit_checkpoints
                              WHERE workspace_id = w.id ORDER BY tree_size DESC LIMIT 1) c
        """,
        list(workspace_ids),
    )
    return {row["workspace_id"]: row for row in rows}


async def heads(connection: "Connection") -> dict[UUID, asyncpg.Record]:
    """The newest checkpoint of every log that is not empty, by workspace: a look at the index for each."""
    rows = await connection.fetch(
        """
        WITH RECURSIVE newest AS (
          (SELECT workspace_id, tree_size, root_hash, note FROM audit_checkpoints
            ORDER BY workspace_id DESC, tree_size DESC LIMIT 1)
          UNION ALL
          SELECT c.* FROM newest n
           CROSS JOIN LATERAL (SELECT workspace_id, tree_size, root_hash, note FROM audit_checkpoints
                                WHERE workspace_id < n.workspace_id
                                ORDER BY workspace_id DESC, tree_size DESC LIMIT 1) c
        )
        SELECT * FROM newest
        """
    )
    return {row["workspace_id"]: row for row in rows}


async def are_pending(connection: "Connection", workspace_ids: Collection[UUID]) -> set[UUID]:
    """Those of the workspaces of which an event waits for its place."""
    rows = await connection.fetch(
        "SELECT DISTINCT workspace_id FROM audit_pending WHERE workspace_id = ANY($1::uuid[])", list(workspace_ids)
    )
    return {row["workspace_id"] for row in rows}


async def read_tiles(
    connection: "Connection", wanted: Mapping[UUID, Collection[Tile]]
) -> dict[UUID, dict[Tile, bytes]]:
    """Those of the tiles that there are."""
    places = [(workspace_id, level, index) for workspace_id, tiles in wanted.items() for level, index in tiles]
    found: dict[UUID, dict[Tile, bytes]] = {workspace_id: {} for workspace_id in wanted}
    if places:
        rows = await connection.fetch(
            """
            SELECT t.* FROM unnest($1::uuid[], $2::int[], $3::bigint[]) w(workspace_id, level, index)
              JOIN audit_tiles t USING (workspace_id, level, index)
            """,
            *map(list, zip(*places, strict=True)),
        )
        for row in rows:
            found[row["workspace_id"]][row["level"], row["index"]] = row["hashes"]
    return found


async def extend(connection: "Connection", extensions: Sequence[Extension]) -> None:
    """Gives events their places, one log's or many logs' (at least one event), in one statement."""
    leaves = [(id_, one.workspace_id, one.first + n) for one in extensions for n, id_ in enumerate(one.events)]
    tiles = [(one.workspace_id, *tile, hashes) for one in extensions for tile, hashes in one.tiles.items()]
    checkpoints = [(one.workspace_id, one.first + len(one.events), one.root, one.note, one.since) for one in extensions]
    await connection.execute(
        """
        WITH placed AS (
          DELETE FROM audit_pending WHERE event_id = ANY($1::uuid[])
        ), grown AS (
          INSERT INTO audit_tiles (workspace_id, level, index, hashes)
          SELECT * FROM unnest($4::uuid[], $5::int[], $6::bigint[], $7::bytea[])
          ON CONFLICT (workspace_id, level, index) DO UPDATE SET hashes = excluded.hashes
        ), signed AS (
          INSERT INTO audit_checkpoints (workspace_id, tree_size, root_hash, note, created_at)
          SELECT workspace_id, tree_size, root_hash, note, greatest(clock_timestamp(), since + interval '1 us')
            FROM unnest($8::uuid[], $9::bigint[], $10::bytea[], $11::text[], $12::timestamptz[])
                 c(workspace_id, tree_size, root_hash, note, since)
        )
        INSERT INTO audit_leaves (event_id, workspace_id, leaf_index)
        SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::bigint[])
        """,
        *map(list, zip(*leaves, strict=True)),
        *map(list, zip(*tiles, strict=True)),
        *map(list, zip(*checkpoints, strict=True)),
    )
