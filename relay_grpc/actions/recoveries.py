"""The RPCs of ActionsService about recoveries: failed executions of a range of time, delivered again."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
from relay.v1 import actions_pb2

from relay_grpc import errors
from relay_grpc.actions import recovery_store, refusals
from relay_grpc.actions.catalogue import CATALOGUE
from relay_grpc.audit.recorder import Recorder
from relay_grpc.call import Call
from relay_grpc.connections import store as connections
from relay_grpc.db import Database
from relay_grpc.ids import uuid7


class Recoveries:
    """What a recovery hands over, upkeep does in the background. enabled: whether this server executes anything."""

    def __init__(self, db: Database, recorder: Recorder, *, enabled: bool) -> None:
        self._db = db
        self._recorder = recorder
        self._enabled = enabled

    async def RecoverExecutions(self, request: Any, call: Call) -> actions_pb2.Recovery:
        if not self._enabled:
            raise refusals.disabled_action(refusals.SWITCHED_OFF)
        range_ = _range(request)
        async with self._recorder.change(call) as (connection, event):
            if range_.connection_id is not None:
                await connections.get(connection, call.workspace_id, range_.connection_id)
                event.target = f"connections/{range_.connection_id}"
            total = await recovery_store.count(
                connection, call.workspace_id, range_, [action.name for action in CATALOGUE]
            )
            if request.validate_only:
                event.reason = "VALIDATE_ONLY"
                return actions_pb2.Recovery(total_count=total)
            row = await recovery_store.insert(
                connection,
                id_=uuid7(),
                workspace_id=call.workspace_id,
                range_=range_,
                total=total,
                traceparent=call.traceparent,
            )
            event.target = f"recoveries/{row['id']}"
        return recovery_message(row)

    async def GetRecovery(self, request: Any, call: Call) -> actions_pb2.Recovery:
        async with self._db.workspace(call.workspace_id) as connection:
            row = await recovery_store.get(connection, call.workspace_id, UUID(request.id))
        return _found(row, request.id)

    async def CancelRecovery(self, request: Any, call: Call) -> actions_pb2.Recovery:
        call.target = f"recoveries/{request.id}"
        async with self._recorder.change(call) as (connection, _):
            return _found(await recovery_store.cancel(connection, call.workspace_id, UUID(request.id)), request.id)


def _range(request: Any) -> recovery_store.Range:
    now = datetime.now(UTC)
    start = request.start_time.ToDatetime(UTC)
    end = min(now, request.end_time.ToDatetime(UTC)) if request.HasField("end_time") else now
    if start >= end:
        raise errors.InvalidRequest([("start_time", "must be before end_time, and in the past")])
    return recovery_store.Range(start, end, UUID(request.connection_id) if request.connection_id else None)


def _found(row: asyncpg.Record | None, id_: str) -> actions_pb2.Recovery:
    if row is None:
        raise errors.NotFound("recovery", id_)
    return recovery_message(row)


def recovery_message(row: asyncpg.Record) -> actions_pb2.Recovery:
    return actions_pb2.Recovery(
        id=str(row["id"]),
        total_count=row["total_count"],
        recovered_count=row["recovered_count"],
        create_time=row["created_at"],
        end_time=row["completed_at"],
        cancelled=row["cancelled"],
    )
