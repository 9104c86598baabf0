"""The RPCs of AuditService about single events and pages of them."""

from typing import Any
from uuid import UUID

from relay.v1 import audit_pb2

from relay_grpc import errors
from relay_grpc.audit import messages, reading
from relay_grpc.call import Call
from relay_grpc.db import Database
from relay_grpc.paging import page_of


class AuditService:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def ListEvents(self, request: Any, call: Call) -> audit_pb2.ListEventsResponse:
        page = page_of(request, call, UUID)
        wanted = reading.Wanted(
            action=request.action,
            provider=request.provider,
            status=messages.outcome_word(request.outcome),
            actor_id=request.actor_id,
            request_id=request.request_id,
            start=messages.time_in(request, "start_time"),
            end=messages.time_in(request, "end_time"),
            before=page.cursor,
        )
        async with self._db.workspace(call.workspace_id) as connection:
            rows = await reading.list_events(connection, call.workspace_id, wanted, page.fetch)
        return page.answer(audit_pb2.ListEventsResponse, "events", rows, messages.event)

    async def GetEvent(self, request: Any, call: Call) -> audit_pb2.Event:
        call.target = f"events/{request.id}"
        async with self._db.workspace(call.workspace_id) as connection:
            row = await reading.get(connection, call.workspace_id, UUID(request.id))
        if row is None:
            raise errors.NotFound("event", request.id)
        return messages.event(row)
