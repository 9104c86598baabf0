"""AuditService: reading the log."""

from datetime import UTC
from typing import Any
from uuid import UUID

import asyncpg
from relay.v1 import audit_pb2

from relay_grpc.audit import store
from relay_grpc.call import Call
from relay_grpc.db import Database
from relay_grpc.paging import page_of


class AuditService:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def ListEvents(self, request: Any, call: Call) -> audit_pb2.ListEventsResponse:
        page = page_of(request, call, UUID)
        async with self._db.workspace(call.workspace_id) as connection:
            rows = await store.list_events(
                connection,
                call.workspace_id,
                action=request.action,
                provider=request.provider,
                status=_outcome_word(request.outcome),
                actor_id=request.actor_id,
                request_id=request.request_id,
                start=request.start_time.ToDatetime(UTC) if request.HasField("start_time") else None,
                end=request.end_time.ToDatetime(UTC) if request.HasField("end_time") else None,
                before=page.cursor,
                limit=page.fetch,
            )
        return page.answer(audit_pb2.ListEventsResponse, "events", rows, event_message)


def event_message(row: asyncpg.Record) -> audit_pb2.Event:
    return audit_pb2.Event(
        id=str(row["id"]),
        event_time=row["created_at"],
        actor=audit_pb2.Actor(
            type=f"ACTOR_TYPE_{row['actor_type'].upper()}",
            id=row["actor_id"],
            name=row["actor_name"],
        ),
        action=row["action"],
        target=row["target"],
        catalogue_action=row["action_type"],
        provider=row["provider"],
        outcome=f"EVENT_OUTCOME_{row['status'].upper()}",
        reason=row["reason"],
        scopes=row["scopes"],
        request_id=row["request_id"],
        trace_id=row["trace_id"],
        idempotency_key_hash=row["idempotency_key_hash"],
        parameters_hash=row["params_hash"],
        parameters_prefix=row["params_prefix"],
        peer=row["peer"],
        duration=row["duration"],
        count=row["count"],
    )


def _outcome_word(outcome: int) -> str:
    return audit_pb2.EventOutcome.Name(outcome).removeprefix("EVENT_OUTCOME_").lower() if outcome else ""
