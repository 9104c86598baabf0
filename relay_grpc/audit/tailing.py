"""TailEvents: the log as it grows."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
from relay.v1 import audit_pb2

from relay_grpc import errors
from relay_grpc.audit import messages, places, tree_store
from relay_grpc.audit.growth import Growth
from relay_grpc.audit.recorder import Recorder
from relay_grpc.call import Call
from relay_grpc.db import Database
from relay_grpc.paging import seal_of, sealed, unsealed

RECHECK_SECONDS = 5.0  # at most, between looks at the credential of a tail


class Tailing:
    def __init__(self, db: Database, recorder: Recorder, growth: Growth) -> None:
        self._db = db
        self._recorder = recorder
        self._growth = growth

    async def TailEvents(self, request: Any, call: Call) -> AsyncIterator[audit_pb2.TailEventsResponse]:
        seal, workspace_id = seal_of(call), call.workspace_id
        size = await self._size(workspace_id)
        at = _index_in(seal, request.cursor, size) if request.cursor else size
        await self._recorder.write(self._recorder.of_call(call))  # now, for nobody knows when it ends
        call.recorded = True
        yield audit_pb2.TailEventsResponse(cursor=sealed(seal, at))
        dropped = 0
        while True:
            while at < size:
                try:
                    rows = await self._next(workspace_id, at, size)
                except places.Dropped as gone:
                    dropped, at = dropped + gone.first_kept - at, gone.first_kept
                    continue
                for row in rows:
                    at = row["leaf_index"] + 1
                    event = messages.event(row)
                    yield audit_pb2.TailEventsResponse(event=event, cursor=sealed(seal, at), dropped_count=dropped)
                    dropped = 0
                await call.recheck()
            size = await self._growth.beyond(workspace_id, at, RECHECK_SECONDS) or at
            await call.recheck()
            if self._growth.stopped:
                raise errors.Overloaded("this instance is stopping; go on from the last cursor")

    async def _size(self, workspace_id: UUID) -> int:
        async with self._db.workspace(workspace_id) as connection:
            newest = await tree_store.newest_checkpoints(connection, [workspace_id])
        return newest[workspace_id]["tree_size"] if workspace_id in newest else 0

    async def _next(self, workspace_id: UUID, at: int, size: int) -> list[asyncpg.Record]:
        async with self._db.workspace(workspace_id) as connection:
            return await places.events_at(connection, workspace_id, at, size)


def _index_in(seal: bytes, cursor: str, size: int) -> int:
    try:
        at = unsealed(seal, cursor, int)
    except ValueError:
        at = -1
    if not 0 <= at <= size:
        raise errors.InvalidRequest([("cursor", "is not one that TailEvents gave in this workspace")])
    return at
