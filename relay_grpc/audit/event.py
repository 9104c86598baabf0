"""What an audit event says: what of it is proven, and what can be erased. No I/O."""

import dataclasses
import hashlib
import hmac
import json
import operator
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import UUID

from relay_grpc.call import Call
from relay_grpc.ids import time_of, uuid7
from relay_grpc.principal import PrincipalType

SYSTEM_WORKSPACE = UUID(int=0)  # where refusals of unknown callers go


class Outcome(StrEnum):
    """relay.v1.EventOutcome; the same words as the Postgres enum event_outcome."""

    SUCCESS = "success"
    FAILED = "failed"
    DENIED = "denied"


class ActorType(StrEnum):
    """relay.v1.ActorType; the same words as the Postgres enum actor_type."""

    API_KEY = "api_key"
    USER = "user"
    SYSTEM = "system"
    OPERATOR = "operator"
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Event:
    """What happened; relay.v1.Event says what each field means. duration: seconds."""

    workspace_id: UUID
    action: str
    status: Outcome = Outcome.SUCCESS
    reason: str = ""
    target: str = ""
    note: str = ""
    action_type: str = ""
    provider: str = ""
    actor_type: ActorType = ActorType.SYSTEM
    actor_id: str = ""
    actor_name: str = ""
    scopes: tuple[str, ...] = ()
    request_id: str = ""
    trace_id: str = ""
    idempotency_key_hash: str = ""
    params_hash: str = ""
    params_prefix: str = ""
    peer: str = ""
    duration: float = 0.0
    count: int = 1
    id: UUID = field(default_factory=uuid7)


# The values that may be personal data. audit_values has them, with a salt for each; what is proven of them is
# SHA-256(salt, value), so that whoever erases a value and its salt takes nothing from any proof. In the order of the
# columns' commitments and salts.
ERASABLE = (
    "actor_id",
    "actor_name",
    "target",
    "note",
    "peer",
    "idempotency_key_hash",
    "params_hash",
    "params_prefix",
)
PROVEN = tuple(column.name for column in dataclasses.fields(Event) if column.name not in ERASABLE)
SALT_BYTES = 16
_VALUES = (*PROVEN, *ERASABLE)
_values = operator.attrgetter(*_VALUES)
_PUBLIC = {
    "action_type": "catalogue_action",
    "status": "outcome",
    "created_at": "event_time",
    "params_hash": "parameters_hash",
    "params_prefix": "parameters_prefix",
}


def public_name(column: str) -> str:
    """A column's name in the API, in leaves and in exports."""
    return _PUBLIC.get(column, column)


def leaf_of(row: Any) -> dict[str, Any]:
    """What the log proves of an event, from a row of audit_logs; relay.proofs.leaf_hash hashes it.

    commitments: hex, by the public names of the values that the event had when it was logged.
    """
    return {
        "id": str(row["id"]),
        "workspace_id": str(row["workspace_id"]),
        "event_time": row["created_at"].isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "actor_type": row["actor_type"],
        "action": row["action"],
        "catalogue_action": row["action_type"],
        "provider": row["provider"],
        "outcome": row["status"],
        "reason": row["reason"],
        "scopes": row["scopes"],
        "request_id": row["request_id"],
        "trace_id": row["trace_id"],
        "duration": f"{row['duration'].total_seconds():.6f}s",
        "count": row["count"],
        "commitments": {
            public_name(name): commitment.hex()
            for name, commitment in zip(ERASABLE, row["commitments"], strict=True)
            if commitment is not None
        },
    }


def salts_of(row: Any) -> dict[str, str]:
    """The salts of the values that are there, in hex, by public name, from a row of audit_events."""
    return {
        public_name(name): row["salts"][SALT_BYTES * n : SALT_BYTES * (n + 1)].hex()
        for n, name in enumerate(ERASABLE)
        if row[name]
    }


def erased(row: Any) -> list[str]:
    """The public names of the values that were erased, from a row of audit_events."""
    return [
        public_name(name)
        for name, commitment in zip(ERASABLE, row["commitments"], strict=True)
        if commitment is not None and row[name] is None
    ]


def of_call(call: Call, status: Outcome = Outcome.SUCCESS, reason: str = "") -> Event:
    """The event of an RPC: all that the call itself knows. Recorder.of_call adds what of its request may be told."""
    event = Event(
        id=call.event_id,
        workspace_id=SYSTEM_WORKSPACE,
        action=call.method.name,
        status=status,
        reason=reason,
        target=call.target,
        actor_type=ActorType.UNKNOWN,
        scopes=tuple(sorted(call.method.scopes)),
        request_id=call.request_id,
        trace_id=call.trace_id,
        idempotency_key_hash=call.idempotency_key_hash,
        peer=call.peer,
        duration=time.monotonic() - call.started,
    )
    principal = call.principal if call.is_authenticated else call.proven
    if principal is not None:
        event.workspace_id = principal.workspace_id
        event.actor_type = ActorType.API_KEY if principal.type is PrincipalType.API_KEY else ActorType.USER
        event.actor_id, event.actor_name = principal.actor, principal.name
    return event


def keyed_hash(key: bytes, workspace_id: UUID, content: bytes) -> str:
    """HMAC-SHA256, in hex: equal contents of one workspace are seen to be equal, and nothing can be guessed from it."""
    return hmac.new(key, workspace_id.bytes + content, hashlib.sha256).hexdigest()


def as_json(events: Sequence[Event]) -> str:
    """The events as a JSON array of rows of store.EVENTS, each with fresh salts."""
    return json.dumps([_row(event) for event in events])


def _row(event: Event) -> dict[str, object]:
    return dict(zip(_VALUES, _values(event), strict=True)) | {
        "id": str(event.id),
        "workspace_id": str(event.workspace_id),
        "created_at": time_of(event.id).isoformat(),
        "duration": f"{event.duration:.6f} s",
        "salts": "\\x" + secrets.token_hex(SALT_BYTES * len(ERASABLE)),
    }
