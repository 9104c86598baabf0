"""Rows and values of this package as messages of relay.v1.actions. No I/O."""

import json
from datetime import timedelta
from typing import Any

from google.protobuf import json_format, struct_pb2
from relay.v1 import actions_pb2

from relay_grpc.actions.catalogue import Action

Row = Any  # a mapping by column: asyncpg.Record, without asyncpg


def action(entry: Action, disabled_reason: str) -> actions_pb2.Action:
    return actions_pb2.Action(
        name=entry.name,
        version=entry.version,
        title=entry.title,
        description=entry.description,
        provider=entry.provider,
        parameters_schema=json_format.ParseDict(dict(entry.schema), struct_pb2.Struct()),
        effects=actions_pb2.Effects(
            read_only=entry.effects.read_only,
            destructive=entry.effects.destructive,
            idempotent=entry.effects.idempotent,
            open_world=entry.effects.open_world,
        ),
        delivery=f"DELIVERY_{entry.delivery.upper()}",
        enabled=not disabled_reason,
        disabled_reason=disabled_reason,
    )


def preview(row: Row) -> actions_pb2.Preview:
    shown = json.loads(row["shown"])
    message = actions_pb2.Preview(
        id=str(row["id"]),
        action=row["action_type"],
        action_version=row["action_version"],
        provider=row["provider"],
        connection_id=str(row["connection_id"]),
        connection_version=row["connection_version"],
        digest=row["digest"],
        summary=shown["summary"],
        warnings=shown["warnings"],
        delivery_plan=actions_pb2.DeliveryPlan(
            method=shown["method"],
            url=shown["url"],
            addresses=shown["addresses"],
            body_bytes=shown["body_bytes"],
            signatures=shown["signatures"],
            timeout=timedelta(seconds=shown["timeout"]),
            max_attempts=shown["max_attempts"],
            delivery=f"DELIVERY_{shown['delivery'].upper()}",
        ),
        create_time=row["created_at"],
        expire_time=row["expires_at"],
        execution_id=str(row["execution_id"] or ""),
    )
    json_format.ParseDict(json.loads(row["parameters"]), message.parameters)
    return message


def execution(row: Row, *, replayed: bool = False) -> actions_pb2.Execution:
    """row: an execution's, with its last finished attempt where it was fetched."""
    return actions_pb2.Execution(
        id=str(row["id"]),
        action=row["action_type"],
        action_version=row["action_version"],
        provider=row["provider"],
        connection_id=str(row["connection_id"]),
        preview_id=str(row["preview_id"]),
        idempotency_key=row["idempotency_key"],
        state=f"EXECUTION_STATE_{row['status'].upper()}",
        replayed=replayed,
        attempt_count=row["attempt_count"],
        last_attempt=attempt(row) if row.get("number") else None,
        next_attempt_time=row["next_attempt_at"],
        create_time=row["created_at"],
        end_time=row["completed_at"],
    )


def attempt(row: Row) -> actions_pb2.Attempt:
    return actions_pb2.Attempt(
        number=row["number"],
        start_time=row["started_at"],
        duration=row["finished_at"] - row["started_at"],
        outcome=f"ATTEMPT_OUTCOME_{row['outcome'].upper()}",
        status_code=row["status_code"],
        response_excerpt=row["response_excerpt"],
        error=row["error"],
    )


def state_word(state: int) -> str:
    """The word that Postgres knows an ExecutionState by."""
    return actions_pb2.ExecutionState.Name(state).removeprefix("EXECUTION_STATE_").lower()


def plain(struct: struct_pb2.Struct) -> dict[str, Any]:
    """A Struct as Python values. Depth is bounded by the parser: 100 nested messages."""
    return {name: _plain(value) for name, value in struct.fields.items()}


def _plain(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return plain(value.struct_value)
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)
