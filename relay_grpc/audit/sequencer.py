"""Gives every event its place in its workspace's Merkle log, and signs what the log then holds.

Every instance tries, twice a second; one at a time may, and what it does is one transaction under one lock, so that
nothing is left to a sequencer that stalled or died. Writers never wait for it.

A log is extended only where the database still has what was signed last. One that fails that is left as it is, for
people to look at; the others go on.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
from relay.proofs import RootOf, canonical, leaf_hash, subtrees

from relay_grpc.audit import tree_store
from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.event import leaf_of
from relay_grpc.audit.merkle import Tile, Tree, grow, right_edge
from relay_grpc.audit.tree_store import Extension
from relay_grpc.db import Database, reason
from relay_grpc.ids import first_uuid7, time_of
from relay_grpc.telemetry import Metrics

if TYPE_CHECKING:
    from relay_grpc.db import Connection

log = logging.getLogger(__name__)
INTERVAL = 0.5  # seconds
BATCH = 500  # events of a transaction
# Most looks are for events of these last minutes, so that they need not step over what can't be done. All that is older
# is looked for now and then: what a stop of all instances left, and what was committed long after its id was made.
RECENT = timedelta(minutes=5)
ALL_SECONDS = 10.0
RETRIES = 10  # damaged logs, in turns, each time
OLDEST = UUID(int=0)
# What Postgres says where a log's rows contradict what is added to them. The rest is the database's trouble.
CONTRADICTIONS = (asyncpg.IntegrityConstraintViolationError, asyncpg.InsufficientPrivilegeError, asyncpg.DataError)


class Damaged(Exception):
    """A log can't be extended; the text tells why."""


class Sequencer:
    """One per process."""

    def __init__(self, db: Database, signer: Signer, metrics: Metrics) -> None:
        self._db = db
        self._signer = signer
        self._metrics = metrics
        self._damaged: dict[UUID, str] = {}  # why, by workspace; the one that was looked at last stands last
        self._all_at = 0.0
        metrics.audit_damaged_logs.set_function(lambda: len(self._damaged))

    async def integrate(self) -> None:
        """Gives the events that wait their places, in batches. Raises RelayError."""
        now = time.monotonic()
        everything = now >= self._all_at
        async with self._db.worker() as connection:
            if everything:
                self._all_at = now + ALL_SECONDS
                for workspace_id in list(self._damaged)[:RETRIES]:
                    await self._take_one(connection, workspace_id)
                oldest = await tree_store.oldest_pending(connection)
                self._metrics.audit_oldest_pending.set(_age(oldest) if oldest else 0)
            after: UUID | None = OLDEST if everything else first_uuid7(datetime.now(UTC) - RECENT)
            if after and await tree_store.is_called_for(connection, after, self._damaged):
                while after is not None:
                    after = await self._take(connection, after)

    async def _take_one(self, connection: "Connection", workspace_id: UUID) -> None:
        """Looks whether a damaged log can be extended by now."""
        before = self._damaged.pop(workspace_id)
        self._damaged[workspace_id] = before
        async with connection.transaction():
            if not await tree_store.become_sequencer(connection):
                return
            rows = await tree_store.pending(connection, OLDEST, BATCH, [workspace_id], of_them=True)
            extended = await self._extend(connection, {workspace_id: rows}, carefully=True) if rows else []
        if rows and not extended:
            return
        self._observe(extended)
        del self._damaged[workspace_id]
        log.warning("the audit log of workspace %s is extended again", workspace_id)

    async def _take(self, connection: "Connection", after: UUID) -> UUID | None:
        """One batch of the events after this one. Returns the last of them, if there may be more."""
        try:
            return await self._try_to_take(connection, after)
        except CONTRADICTIONS:
            return await self._try_to_take(connection, after, carefully=True)

    async def _try_to_take(self, connection: "Connection", after: UUID, *, carefully: bool = False) -> UUID | None:
        async with connection.transaction():
            if not await tree_store.become_sequencer(connection):
                return None
            rows = await tree_store.pending(connection, after, BATCH, self._damaged, of_them=False)
            logs: dict[UUID, list[asyncpg.Record]] = {}
            for row in rows:
                logs.setdefault(row["log"], []).append(row)
            extended = await self._extend(connection, logs, carefully=carefully)
        self._observe(extended)
        return rows[-1]["event_id"] if len(rows) == BATCH else None

    async def _extend(
        self, connection: "Connection", logs: Mapping[UUID, Sequence[asyncpg.Record]], *, carefully: bool
    ) -> list[Extension]:
        """Extends those that can be; what is wrong with the others is noted. carefully: each log for itself."""
        newest = await tree_store.newest_checkpoints(connection, logs)
        edges = {id_: right_edge(newest[id_]["tree_size"]) if id_ in newest else () for id_ in logs}
        tiles = await tree_store.read_tiles(connection, edges)
        extensions, damages = await asyncio.to_thread(self._grow, logs, newest, tiles)
        for workspace_id, damage in damages.items():
            self._leave(workspace_id, damage)
        if not carefully:
            if extensions:
                await tree_store.extend(connection, extensions)
            return extensions
        return [one for one in extensions if await self._extend_alone(connection, one)]

    def _grow(
        self,
        logs: Mapping[UUID, Sequence[asyncpg.Record]],
        newest: Mapping[UUID, asyncpg.Record],
        tiles: Mapping[UUID, Mapping[Tile, bytes]],
    ) -> tuple[list[Extension], dict[UUID, str]]:
        """Those of the logs that can be extended; why the others can't be. It takes 30 us an event and 300 us a log."""
        extensions, damages = [], {}
        for id_, rows in logs.items():
            try:
                extensions.append(extension(self._signer, id_, newest.get(id_), tiles[id_], rows))
            except Damaged as error:
                damages[id_] = str(error)
        return extensions, damages

    async def _extend_alone(self, connection: "Connection", one: Extension) -> bool:
        try:
            async with connection.transaction():
                await tree_store.extend(connection, [one])
        except CONTRADICTIONS as error:
            self._leave(one.workspace_id, f"the database has what contradicts the next {len(one.events)} events")
            log.info("what contradicts them: %s", reason(error))
            return False
        return True

    def _observe(self, extended: Sequence[Extension]) -> None:
        for one in extended:
            for event_id in one.events:
                self._metrics.audit_integration.observe(_age(event_id))

    def _leave(self, workspace_id: UUID, why: str) -> None:
        """Said once, as long as it is the same."""
        if self._damaged.get(workspace_id) != why:
            log.error(
                "the audit log of workspace %s is damaged, and is not extended: %s; docs/audit.md tells what to do",
                workspace_id,
                why,
            )
        self._damaged[workspace_id] = why


def extension(
    signer: Signer,
    workspace_id: UUID,
    newest: asyncpg.Record | None,
    tiles: Mapping[Tile, bytes],
    rows: Sequence[asyncpg.Record],
) -> Extension:
    """A log with these events at its end. Raises Damaged where it isn't what was signed last.

    newest: its checkpoint; None: it is empty. tiles: those of its right edge. rows: as tree_store.pending has them.
    """
    size, root = (newest["tree_size"], newest["root_hash"]) if newest else (0, b"")
    tree = RootOf()
    try:
        for (height, _), hashed in zip(subtrees(0, size), Tree(tiles).perfect(0, size), strict=True):
            tree.add(hashed, height)
        if newest and tree.root() != root:
            raise Damaged(f"its tiles don't have the root of its newest checkpoint, which has size {size}")
        if newest and not signer.signed(newest["note"], workspace_id, size, root):
            keys = "RELAY_AUDIT_KEYS and RELAY_AUDIT_OLD_KEYS"
            raise Damaged(f"none of {keys} signed its newest checkpoint, which has size {size}")
        leaves = []
        for row in rows:
            if row["id"] is None:
                raise Damaged(f"event {row['event_id']} was written, and is gone before it had its place")
            leaves.append(leaf_hash(canonical(leaf_of(row))))
        changed = grow(size, tiles, leaves)
    except LookupError as error:
        raise Damaged(f"at size {size}, {error}") from error
    except ValueError as error:
        raise Damaged(f"what waits for its place can't be read: {error}") from error
    for leaf in leaves:
        tree.add(leaf)
    return Extension(
        workspace_id,
        first=size,
        events=[row["event_id"] for row in rows],
        tiles=changed,
        root=tree.root(),
        note=signer.note(workspace_id, tree.size, tree.root()),
        since=newest["created_at"] if newest else None,
    )


def _age(event_id: UUID) -> float:
    """Seconds since the event."""
    return time.time() - time_of(event_id).timestamp()
