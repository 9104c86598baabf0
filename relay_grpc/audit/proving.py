"""The RPCs of AuditService that prove what the log holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
from relay import proofs
from relay.v1 import audit_pb2

from relay_grpc import errors
from relay_grpc.audit import merkle, places, reading, tree_store
from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.event import leaf_of, salts_of
from relay_grpc.call import Call
from relay_grpc.db import Database

if TYPE_CHECKING:
    from relay_grpc.db import Connection


class Proving:
    def __init__(self, db: Database, signer: Signer) -> None:
        self._db = db
        self._signer = signer

    async def GetCheckpoint(self, request: Any, call: Call) -> audit_pb2.Checkpoint:
        async with self._db.workspace(call.workspace_id) as connection:
            return self._message(await _checkpoint(connection, call.workspace_id, 0))

    async def GetInclusionProof(self, request: Any, call: Call) -> audit_pb2.InclusionProof:
        workspace_id = call.workspace_id
        async with self._db.workspace(workspace_id) as connection:
            row = await reading.get(connection, workspace_id, UUID(request.event_id))
            if row is None:
                raise errors.NotFound("event", request.event_id)
            index = row["leaf_index"]
            if index is None:
                raise errors.NotLoggedYet("the event is not in the log yet; try again in a second")
            checkpoint = await _checkpoint(connection, workspace_id, request.tree_size)
            size = checkpoint["tree_size"]
            if index >= size:
                problem = f"should be more than {index}, where the event stands in the log"
                raise errors.InvalidRequest([("tree_size", problem)])
            path = await _hashes(connection, workspace_id, merkle.inclusion(index, size))
        leaf = proofs.canonical(leaf_of(row))
        try:
            proofs.verify_inclusion(index, size, proofs.leaf_hash(leaf), path, checkpoint["root_hash"])
        except proofs.ProofError as error:
            raise places.damaged(index) from error
        return audit_pb2.InclusionProof(
            leaf_index=index, hashes=path, checkpoint=self._message(checkpoint), leaf=leaf, salts=salts_of(row)
        )

    async def GetConsistencyProof(self, request: Any, call: Call) -> audit_pb2.ConsistencyProof:
        workspace_id, first = call.workspace_id, request.first_tree_size
        async with self._db.workspace(workspace_id) as connection:
            checkpoint = await _checkpoint(connection, workspace_id, request.second_tree_size, "second_tree_size")
            second = checkpoint["tree_size"]
            if first > second:
                problem = f"should be at most {second}, the size of the newer one"
                raise errors.InvalidRequest([("first_tree_size", problem)])
            ranges = merkle.consistency(first, second) if first else []
            path = await _hashes(connection, workspace_id, ranges)
        return audit_pb2.ConsistencyProof(hashes=path, checkpoint=self._message(checkpoint))

    def _message(self, row: asyncpg.Record) -> audit_pb2.Checkpoint:
        signed = [key for key in self._signer.verifier_keys if f"\n\N{EM DASH} {key.split('+')[0]} " in row["note"]]
        return audit_pb2.Checkpoint(
            note=row["note"], tree_size=row["tree_size"], create_time=row["created_at"], verifier_keys=signed
        )


async def _checkpoint(
    connection: "Connection", workspace_id: UUID, size: int, field: str = "tree_size"
) -> asyncpg.Record:
    """The checkpoint of a log of this size; 0: the newest."""
    newest = (await tree_store.newest_checkpoints(connection, [workspace_id])).get(workspace_id)
    if newest is None:
        raise errors.NotLoggedYet("nothing is in the log yet; try again in a second")
    if not size:
        return newest
    found = await places.checkpoint_at(connection, workspace_id, size)
    if found is None:
        raise errors.InvalidRequest([(field, "is the size of no checkpoint that is kept; 0 asks for the newest")])
    return found


async def _hashes(connection: "Connection", workspace_id: UUID, ranges: Sequence[merkle.Range]) -> list[bytes]:
    tiles = await tree_store.read_tiles(connection, {workspace_id: merkle.tiles_of(ranges)})
    tree = merkle.Tree(tiles[workspace_id])
    try:
        return [tree.hash(*part) for part in ranges]
    except LookupError as error:
        raise places.damaged(ranges[0][0]) from error
