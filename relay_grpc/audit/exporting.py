"""ExportEvents: a range of the log as a file, in constant memory.

A slow reader holds neither a connection nor a snapshot: each batch is read in a transaction of its own.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from relay.v1 import audit_pb2

from relay_grpc import errors
from relay_grpc.audit import export, places, tree_store
from relay_grpc.audit.event import leaf_of
from relay_grpc.audit.merkle import Tree, inclusion, tiles_of
from relay_grpc.audit.messages import time_in
from relay_grpc.call import Call
from relay_grpc.db import Database

CHUNK_BYTES = 64 * 1024  # about: no line is cut
RECHECK_SECONDS = 5.0  # at most, between looks at the credential of an export
SETTLE_SECONDS = 3.0  # for checkpoints that are being made
SETTLE_STEP = 0.1
FORMATS: dict[int, tuple[bytes, Callable[[Any], bytes]]] = {
    audit_pb2.EXPORT_FORMAT_JSONL: (b"", export.jsonl),
    audit_pb2.EXPORT_FORMAT_CSV: (export.CSV_HEADER, export.csv_line),
    audit_pb2.EXPORT_FORMAT_OCSF: (b"", export.ocsf),
}


@dataclass(frozen=True, slots=True)
class _Range:
    """Leaves from `first` up to `end`. last_line: what proves them."""

    first: int
    end: int
    last_line: bytes


class Exporting:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def ExportEvents(self, request: Any, call: Call) -> AsyncIterator[audit_pb2.ExportEventsResponse]:
        range_ = await self._range(call.workspace_id, time_in(request, "start_time"), time_in(request, "end_time"))
        header, write = FORMATS[request.format]
        chunk = bytearray(header)
        async for rows in self._batches(range_, call):
            for row in rows:
                chunk += write(row)
                if len(chunk) >= CHUNK_BYTES:
                    yield audit_pb2.ExportEventsResponse(chunk=bytes(chunk))
                    chunk.clear()
        if request.format == audit_pb2.EXPORT_FORMAT_JSONL:
            chunk += range_.last_line
        if chunk:
            yield audit_pb2.ExportEventsResponse(chunk=bytes(chunk))

    async def _batches(self, range_: _Range, call: Call) -> AsyncIterator[list[Any]]:
        """The events of the range by their places. Raises LogDamaged where they are not all that there is."""
        at, checked = range_.first, time.monotonic()
        highest = UUID(int=0) if at == 0 else None  # of the ids so far: up to it, every event has its place
        while at < range_.end:
            if time.monotonic() - checked > RECHECK_SECONDS:
                await call.recheck()
                checked = time.monotonic()
            async with self._db.workspace(call.workspace_id) as connection:
                rows = await places.events_at(connection, call.workspace_id, at, range_.end)
                ids = [row["id"] for row in rows]
                highest = min(ids) if highest is None else highest
                if await places.has_strays(connection, call.workspace_id, highest, max(ids)):
                    raise places.damaged(at)
            yield rows
            at, highest = at + len(rows), max(highest, *ids)

    async def _range(self, workspace_id: UUID, start: datetime | None, end: datetime | None) -> _Range:
        await self._settle(workspace_id, start, end)
        async with self._db.workspace(workspace_id) as connection:
            log = await places.log_of(connection, workspace_id)
            last = log.size if end is None else await places.size_before(connection, workspace_id, end)
            first = 0 if start is None else await places.size_before(connection, workspace_id, start)
            first = max(first, log.first_kept)
            last = max(last, first)
            path = inclusion(log.dropped["leaf_index"], log.size) if log.dropped else []
            tiles = tiles_of([(0, first), (last, log.size), *path])
            found = await tree_store.read_tiles(connection, {workspace_id: tiles})
        tree = Tree(found[workspace_id])
        try:
            proof = {
                "left": [hashed.hex() for hashed in tree.perfect(0, first)],
                "right": [hashed.hex() for hashed in tree.perfect(last, log.size)],
                "dropped": log.dropped
                and {
                    "leaf_index": log.dropped["leaf_index"],
                    "event": leaf_of(log.dropped),
                    "path": [tree.hash(*part).hex() for part in path],
                },
            }
        except LookupError as error:
            raise places.damaged(first) from error
        asked = {"start_time": start and start.isoformat(), "end_time": end and end.isoformat()}
        content = {"checkpoint": log.checkpoint["note"], "first": first, "end": last, **asked, **proof}
        return _Range(first, last, export.line({**content, "values": export.VALUES_STAY}))

    async def _settle(self, workspace_id: UUID, start: datetime | None, end: datetime | None) -> None:
        """Waits until nothing can be added to the log any more that belongs before the times asked for."""
        times = {"start_time": start, "end_time": end}
        if start and end and start >= end:
            raise errors.InvalidRequest([("end_time", "should be later than start_time")])
        latest = max((moment for moment in times.values() if moment), default=None)
        if latest is None:
            return
        async with self._db.workspace(workspace_id) as connection:
            now = await places.now(connection)
        if early := [(field, "lies in the future") for field, moment in times.items() if moment and moment > now]:
            raise errors.InvalidRequest(early)
        until = time.monotonic() + SETTLE_SECONDS
        while True:
            async with self._db.workspace(workspace_id) as connection:
                if await places.is_settled(connection, workspace_id, latest):
                    return
            if time.monotonic() > until:
                raise errors.NotLoggedYet("a checkpoint from before end_time is being made; try again in a second")
            await asyncio.sleep(SETTLE_STEP)
