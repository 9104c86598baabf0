"""Sequencers without a server around them, and whether what they made of the events is one sound log a workspace."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import asyncpg
from relay.proofs import RootOf, canonical, leaf_hash

from relay_grpc.audit import store
from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.event import Event, leaf_of
from relay_grpc.audit.merkle import grow
from relay_grpc.audit.sequencer import Sequencer
from relay_grpc.db import Database
from relay_grpc.telemetry import Metrics

KEYS = {"test": b"\x01" * 32}


@dataclass
class Logs:
    """A database, as superuser, and what integrates its events."""

    url: str
    sql: asyncpg.Connection
    db: Database
    signer: Signer = field(default_factory=lambda: Signer(KEYS))
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.sequencer = self.another()

    def another(self, metrics: Metrics | None = None) -> Sequencer:
        return Sequencer(self.db, self.signer, metrics or self.metrics)

    async def write(self, workspace_id: UUID, count: int = 1) -> list[UUID]:
        """Events, in one transaction. Returns their ids."""
        events = [Event(workspace_id, "test.Happened", actor_id=f"user {n}") for n in range(count)]
        await store.insert(self.sql, events)
        return [event.id for event in events]

    async def new(self, count: int) -> UUID:
        """A workspace with so many events, all of them in its log."""
        workspace_id = uuid4()
        await self.write(workspace_id, count)
        await self.integrate()
        assert await self.size(workspace_id) == count
        return workspace_id

    async def integrate(self) -> None:
        """As after ALL_SECONDS."""
        self.sequencer._all_at = 0.0
        await self.sequencer.integrate()

    async def size(self, workspace_id: UUID) -> int:
        found: int = await self.sql.fetchval(
            "SELECT coalesce(max(tree_size), 0) FROM audit_checkpoints WHERE workspace_id = $1", workspace_id
        )
        return found

    async def waiting(self, workspace_id: UUID) -> int:
        found: int = await self.sql.fetchval("SELECT count(*) FROM audit_pending WHERE workspace_id = $1", workspace_id)
        return found

    async def tamper(self, *statements: str) -> None:
        """As superuser, past triggers."""
        async with self.sql.transaction():
            await self.sql.execute("SET LOCAL session_replication_role = replica")
            for statement in statements:
                await self.sql.execute(statement)

    def sample(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(name) or 0.0


@asynccontextmanager
async def logs_of(url: str) -> AsyncIterator[Logs]:
    sql, db = await asyncpg.connect(url), await Database.open(url)
    try:
        yield Logs(url, sql, db)
    finally:
        await sql.close()
        await db.close()


async def assert_sound(
    sql: asyncpg.Connection, workspace_ids: Sequence[UUID] = (), signer: Signer | None = None
) -> int:
    """No event is without a place; in each log places have no gap, and each checkpoint is of a prefix.

    Returns how many events there are. signer: who signed. Without workspaces, all of them.
    """
    assert await sql.fetchval("SELECT count(*) FROM audit_pending") == 0
    rows = await sql.fetch(
        """
        SELECT l.*, e.leaf_index FROM audit_logs l LEFT JOIN audit_leaves e ON e.event_id = l.id
         WHERE cardinality($1::uuid[]) = 0 OR l.workspace_id = ANY($1::uuid[]) ORDER BY l.workspace_id, e.leaf_index
        """,
        list(workspace_ids),
    )
    logs: dict[UUID, list[asyncpg.Record]] = {}
    for row in rows:
        logs.setdefault(row["workspace_id"], []).append(row)
    for workspace_id, events in logs.items():
        assert [row["leaf_index"] for row in events] == list(range(len(events)))
        leaves = await asyncio.to_thread(lambda events=events: [leaf_hash(canonical(leaf_of(row))) for row in events])
        tiles = await sql.fetch("SELECT level, index, hashes FROM audit_tiles WHERE workspace_id = $1", workspace_id)
        assert {(row["level"], row["index"]): row["hashes"] for row in tiles} == grow(0, {}, leaves)
        checkpoints = await sql.fetch(
            "SELECT * FROM audit_checkpoints WHERE workspace_id = $1 ORDER BY tree_size", workspace_id
        )
        assert checkpoints[-1]["tree_size"] == len(events)
        assert checkpoints == sorted(checkpoints, key=lambda row: row["created_at"])
        prefix = RootOf()
        for checkpoint in checkpoints:
            for leaf in leaves[prefix.size : checkpoint["tree_size"]]:
                prefix.add(leaf)
            assert checkpoint["root_hash"] == prefix.root()
            if signer:
                assert checkpoint["note"] == signer.note(workspace_id, prefix.size, prefix.root())
    assert len(rows) == len({row["id"] for row in rows})
    return len(rows)
