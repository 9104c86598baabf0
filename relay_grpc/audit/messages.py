"""Rows of events as messages of relay.v1.audit. No I/O."""

from datetime import UTC, datetime
from typing import Any

from relay.v1 import audit_pb2

from relay_grpc.audit.event import Outcome, erased

Row = Any  # a mapping by column: asyncpg.Record, without asyncpg


def event(row: Row) -> audit_pb2.Event:
    return audit_pb2.Event(
        id=str(row["id"]),
        event_time=row["created_at"],
        actor=audit_pb2.Actor(
            type=f"ACTOR_TYPE_{row['actor_type'].upper()}",
            id=row["actor_id"] or "",
            name=row["actor_name"] or "",
        ),
        action=row["action"],
        target=row["target"] or "",
        catalogue_action=row["action_type"],
        provider=row["provider"],
        outcome=f"EVENT_OUTCOME_{row['status'].upper()}",
        reason=row["reason"],
        scopes=row["scopes"],
        request_id=row["request_id"],
        trace_id=row["trace_id"],
        idempotency_key_hash=row["idempotency_key_hash"] or "",
        parameters_hash=row["params_hash"] or "",
        parameters_prefix=row["params_prefix"] or "",
        peer=row["peer"] or "",
        duration=row["duration"],
        count=row["count"],
        note=row["note"] or "",
        leaf_index=row["leaf_index"],
        erased_fields=erased(row),
    )


def outcome_word(outcome: int) -> Outcome | None:
    """The word that Postgres knows an EventOutcome by. None: it is unspecified."""
    return Outcome(audit_pb2.EventOutcome.Name(outcome).removeprefix("EVENT_OUTCOME_").lower()) if outcome else None


def time_in(request: Any, field: str) -> datetime | None:
    """A time of the request. None: it names none."""
    time: datetime | None = getattr(request, field).ToDatetime(UTC) if request.HasField(field) else None
    return time
