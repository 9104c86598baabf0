"""An audit log in tests: events of other times, waiting for the log to have them, and the proofs that hold of it."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
from relay.proofs import (
    EMPTY_ROOT,
    Report,
    RootOf,
    VerifierKey,
    canonical,
    commitment,
    leaf_hash,
    verify_export,
    verify_inclusion,
)

from relay_grpc.audit import store, tree_store
from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.event import ERASABLE, SALT_BYTES, Event, leaf_of
from relay_grpc.audit.merkle import Tree, inclusion, tiles_of
from relay_grpc.audit.sequencer import Sequencer
from relay_grpc.ids import first_uuid7, uuid7
from relay_grpc.telemetry import Metrics
from tests.actions.caller import eventually
from tests.harness import Relay, Tenant


def id_at(moment: datetime) -> UUID:
    """An id of an event that happened then."""
    return UUID(int=first_uuid7(moment).int | uuid7().int & ((1 << 80) - 1))


def event_at(moment: datetime, workspace_id: UUID, **values: Any) -> Event:
    return Event(workspace_id=workspace_id, id=id_at(moment), **({"action": "test.Happened"} | values))


async def log_events(url: str, events: Sequence[Event]) -> None:
    """Writes events as a server would, whichever workspaces they are of."""
    connection = await asyncpg.connect(url)
    await store.insert(connection, events)
    await connection.close()


async def integrated(relay: Relay) -> None:
    """Once every event has its place. Servers come to those of other times every 10 s: this does not wait for them."""
    connection = await asyncpg.connect(relay.url)
    signer = Signer({key.id: key.key for key in relay.settings.audit_keys})

    async def none_waits() -> bool:
        await Sequencer(relay.app.db, signer, Metrics()).integrate()
        return not await connection.fetchval("SELECT count(*) FROM audit_pending")

    await eventually(none_waits)
    await connection.close()


async def export_of(relay: Relay, tenant: Tenant) -> list[bytes]:
    """The lines of an export of everything that the tenant's log has."""
    async with relay.connect(tenant.admin) as client:
        return b"".join([part.chunk async for part in client.audit.export_events()]).splitlines(keepends=True)


async def held_of(relay: Relay, tenant: Tenant) -> str:
    """The newest checkpoint, to be held outside."""
    async with relay.connect(tenant.admin) as client:
        note: str = (await client.audit.get_checkpoint()).note
        return note


def verified(relay: Relay, lines: Sequence[bytes], *held: str) -> Report:
    """What relay.proofs says of an export. Raises ProofError."""
    signer = Signer({key.id: key.key for key in relay.settings.audit_keys})
    return verify_export(lines, [VerifierKey.parse(key) for key in signer.verifier_keys], held)


async def newest(connection: Any, workspace_id: UUID) -> tuple[int, bytes]:
    """Size and root of a workspace's log, as its newest checkpoint says."""
    found = await tree_store.newest_checkpoints(connection, [workspace_id])
    row = found.get(workspace_id)
    return (row["tree_size"], row["root_hash"]) if row else (0, EMPTY_ROOT)


async def assert_proven(connection: Any, workspace_id: UUID) -> Mapping[UUID, Any]:
    """Every event that is there is in the log by its proof, and every value that is there is the one committed to.

    Returns the rows of audit_events by id.
    """
    size, root = await newest(connection, workspace_id)
    rows = await connection.fetch("SELECT * FROM audit_events WHERE workspace_id = $1 ORDER BY id", workspace_id)
    paths = {row["id"]: inclusion(row["leaf_index"], size) for row in rows}
    wanted = {tile for path in paths.values() for tile in tiles_of(path)}
    tree = Tree((await tree_store.read_tiles(connection, {workspace_id: wanted}))[workspace_id])
    for row in rows:
        hashed = leaf_hash(canonical(leaf_of(row)))
        verify_inclusion(row["leaf_index"], size, hashed, [tree.hash(*range_) for range_ in paths[row["id"]]], root)
        for n, name in enumerate(ERASABLE):
            salt = row["salts"][SALT_BYTES * n : SALT_BYTES * (n + 1)]
            if row[name]:
                assert commitment(salt, row[name]) == row["commitments"][n], name
            else:
                assert row["commitments"][n] is None or salt == bytes(SALT_BYTES), name
    if rows and rows[0]["leaf_index"] == 0 and len(rows) == size:
        folded = RootOf()
        for row in sorted(rows, key=lambda row: row["leaf_index"]):
            folded.add(leaf_hash(canonical(leaf_of(row))))
        assert folded.root() == root
    return {row["id"]: row for row in rows}
