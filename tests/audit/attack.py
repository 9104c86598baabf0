"""One attack on an audit log: a transaction of somebody who rules the database, and what it takes to be thorough."""

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from relay.proofs import canonical, leaf_hash

from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.event import leaf_of
from relay_grpc.audit.merkle import Tree, grow

LEAVES = """
    SELECT l.*, e.leaf_index
      FROM audit_logs l JOIN audit_leaves e ON (e.workspace_id, e.event_id) = (l.workspace_id, l.id)
"""


@dataclass
class Attack:
    """One transaction against two logs of at least 12 events each. rng: where everything random is from."""

    connection: Any
    rng: random.Random
    victim: UUID
    other: UUID
    act: Callable[[], Awaitable[None]]  # something that the server logs for the victim

    async def size(self, workspace: UUID | None = None) -> int:
        size: int = await self.connection.fetchval(
            "SELECT max(tree_size) FROM audit_checkpoints WHERE workspace_id = $1", workspace or self.victim
        )
        return size

    async def event(self, workspace: UUID | None = None, *, where: str = "true") -> Any:
        """One of the log's events, not its first and not its last."""
        rows = await self.events(workspace, where=where)
        return self.rng.choice(rows[1:-1])

    async def events(self, workspace: UUID | None = None, *, where: str = "true") -> list[Any]:
        rows: list[Any] = await self.connection.fetch(
            f"{LEAVES} WHERE l.workspace_id = $1 AND {where} ORDER BY leaf_index", workspace or self.victim
        )
        return rows

    async def run(self, statement: str, *arguments: Any) -> None:
        """$1 is the victim."""
        await self.connection.execute(statement, self.victim, *arguments)

    async def rebuild(self, *workspaces: UUID) -> None:
        """Tiles that agree with the events as they are now."""
        for workspace in workspaces or (self.victim,):
            tiles = tiles_over(await self.events(workspace))
            await self.connection.execute("DELETE FROM audit_tiles WHERE workspace_id = $1", workspace)
            await self.connection.executemany(
                "INSERT INTO audit_tiles (workspace_id, level, index, hashes) VALUES ($1, $2, $3, $4)",
                [(workspace, *place, hashes) for place, hashes in tiles.items()],
            )

    async def close_gap(self, index: int) -> None:
        await self.run(
            "UPDATE audit_leaves SET leaf_index = leaf_index - 1 WHERE workspace_id = $1 AND leaf_index > $2", index
        )

    async def insert(self, index: int | None) -> None:
        """An event that never was, with an id like those of the events around it, and a place unless that is None."""
        model = await self.event()
        made = UUID(int=model["id"].int ^ self.rng.getrandbits(40))
        for table, key in (("audit_logs", "id"), ("audit_values", "id")):
            columns = [name for name in await self._columns(table) if name != key]
            await self.run(
                f"INSERT INTO {table} (id, {', '.join(columns)}) SELECT $2, {', '.join(columns)} FROM {table} "
                "WHERE workspace_id = $1 AND id = $3",
                made,
                model["id"],
            )
        if index is not None:
            await self.run(
                "INSERT INTO audit_leaves (workspace_id, event_id, leaf_index) VALUES ($1, $2, $3)", made, index
            )

    async def _columns(self, table: str) -> list[str]:
        rows = await self.connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped", table
        )
        return [row["attname"] for row in rows]

    async def cut(self, size: int) -> None:
        """Back to what a checkpoint that the server signed says, all of it consistent."""
        for table in ("audit_logs", "audit_values"):
            await self.run(
                f"DELETE FROM {table} WHERE workspace_id = $1 AND id IN "
                "(SELECT event_id FROM audit_leaves WHERE workspace_id = $1 AND leaf_index >= $2)",
                size,
            )
        await self.run("DELETE FROM audit_leaves WHERE workspace_id = $1 AND leaf_index >= $2", size)
        await self.run("DELETE FROM audit_checkpoints WHERE workspace_id = $1 AND tree_size > $2", size)
        await self.rebuild()

    async def earlier(self) -> int:
        """The size of an earlier checkpoint."""
        rows = await self.connection.fetch(
            "SELECT tree_size FROM audit_checkpoints WHERE workspace_id = $1 ORDER BY tree_size", self.victim
        )
        return int(self.rng.choice(rows[:-1])["tree_size"])

    async def sign(self, signer: Signer) -> None:
        """A newest checkpoint of the events as they are now, signed by somebody else."""
        events = await self.events()
        root = Tree(tiles_over(events)).hash(0, len(events))
        note = signer.note(self.victim, len(events), root)
        await self.run("DELETE FROM audit_checkpoints WHERE workspace_id = $1 AND tree_size >= $2", len(events))
        await self.run(
            "INSERT INTO audit_checkpoints (workspace_id, tree_size, root_hash, note) VALUES ($1, $2, $3, $4)",
            len(events),
            root,
            note,
        )


def tiles_over(events: Sequence[Any]) -> dict[tuple[int, int], bytes]:
    return grow(0, {}, [leaf_hash(canonical(leaf_of(row))) for row in events])
