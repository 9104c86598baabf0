"""Rows and values of this package as messages of relay.v1.actions. No I/O."""

import json
from collections.abc import Iterable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from google.protobuf import json_format, struct_pb2
from relay.v1 import actions_pb2

from relay_grpc.actions.catalogue import Action, find
from relay_grpc.actions.execution import Plan, delays

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


# What a preview that the previous version made does not tell.
_NOT_SHOWN_BEFORE: Mapping[str, Any] = MappingProxyType(
    {"host": "", "egress_verdict": "unspecified", "breaker": "unspecified", "retry_delays": (), "quota_cost": 0}
)


def shown(action: Action, plan: Plan, target: Row, *, timeout: float, quota_cost: int) -> dict[str, Any]:
    """What the caller is told of a preview besides what it is bound to. target: of connections.store."""
    waits = delays(json.loads(target["configuration"]))
    return {
        "summary": f"{action.title}: {plan.summary}",
        "warnings": plan.warnings,
        "method": plan.method,
        "url": plan.url,
        "host": plan.host,
        "addresses": plan.addresses,
        "egress_verdict": "allowed" if plan.addresses else "unresolved",
        "breaker": target["breaker"],
        "body_bytes": plan.body_bytes,
        "signatures": plan.signatures,
        "timeout": timeout,
        "max_attempts": len(waits) + 1,
        "retry_delays": [wait.total_seconds() for wait in waits],
        "delivery": action.delivery,
        "quota_cost": quota_cost,
    }


def preview(row: Row) -> actions_pb2.Preview:
    told = _NOT_SHOWN_BEFORE | json.loads(row["shown"])
    message = actions_pb2.Preview(
        id=str(row["id"]),
        action=row["action_type"],
        action_version=row["action_version"],
        provider=row["provider"],
        connection_id=str(row["connection_id"]),
        connection_version=row["connection_version"],
        digest=row["digest"],
        summary=told["summary"],
        warnings=told["warnings"],
        delivery_plan=actions_pb2.DeliveryPlan(
            method=told["method"],
            url=told["url"],
            addresses=told["addresses"],
            body_bytes=told["body_bytes"],
            signatures=told["signatures"],
            timeout=timedelta(seconds=told["timeout"]),
            max_attempts=told["max_attempts"],
            delivery=f"DELIVERY_{told['delivery'].upper()}",
            host=told["host"],
            egress_verdict=f"EGRESS_VERDICT_{told['egress_verdict'].upper()}",
            breaker_state=f"BREAKER_STATE_{told['breaker'].upper()}",
            retry_delays=[timedelta(seconds=wait) for wait in told["retry_delays"]],
            quota_cost=told["quota_cost"],
        ),
        create_time=row["created_at"],
        expire_time=row["expires_at"],
        execution_id=str(row["execution_id"] or ""),
    )
    json_format.ParseDict(json.loads(row["parameters"]), message.parameters)
    return message


def execution(
    row: Row, *, replayed: bool = False, events: Iterable[actions_pb2.LoggedEvent] = ()
) -> actions_pb2.Execution:
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
        delivery=f"DELIVERY_{row['delivery'].upper()}",
        cancel_requested=row["cancel_requested_at"] is not None,
        resend_count=row["resend_count"],
        events=events,
    )


def logged_event(row: Row) -> actions_pb2.LoggedEvent:
    return actions_pb2.LoggedEvent(event_id=str(row["id"]), action=row["action"], leaf_index=row["leaf_index"])


def planned(facts: Row, preview_id: str, idempotency_key: str) -> actions_pb2.Execution:
    """The execution that an Execute would make. facts: of store.explain."""
    entry = find(facts["action_type"])
    return actions_pb2.Execution(
        action=entry.name,
        action_version=entry.version,
        provider=entry.provider,
        connection_id=str(facts["connection_id"]),
        preview_id=preview_id,
        idempotency_key=idempotency_key,
        state=actions_pb2.EXECUTION_STATE_PENDING,
        delivery=f"DELIVERY_{entry.delivery.upper()}",
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
