"""What an audit event says. No I/O."""

import dataclasses
import hashlib
import hmac
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID

from relay_grpc.call import Call
from relay_grpc.ids import uuid7
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
    """One row of audit_logs, column by column; relay.v1.Event says what each means. duration: seconds."""

    workspace_id: UUID
    action: str
    status: Outcome = Outcome.SUCCESS
    reason: str = ""
    target: str = ""
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


COLUMNS = tuple(column.name for column in dataclasses.fields(Event))


def of_call(call: Call, status: Outcome = Outcome.SUCCESS, reason: str = "") -> Event:
    """The event of an RPC: everything that the call itself knows."""
    event = Event(
        workspace_id=SYSTEM_WORKSPACE,
        action=call.method.name,
        status=status,
        reason=reason,
        target=call.target,
        actor_type=ActorType.UNKNOWN,
        scopes=tuple(sorted(call.method.scopes)),
        request_id=call.request_id,
        trace_id=call.trace_id,
        peer=call.peer,
        duration=time.monotonic() - call.started,
    )
    if call.is_authenticated:
        principal = call.principal
        event.workspace_id = principal.workspace_id
        event.actor_type = ActorType.API_KEY if principal.type is PrincipalType.API_KEY else ActorType.USER
        event.actor_id, event.actor_name = principal.actor, principal.name
    return event


def keyed_hash(key: bytes, workspace_id: UUID, text: str) -> str:
    """HMAC-SHA256, in hex: equal texts of one workspace are seen to be equal, and nothing can be guessed from it."""
    return hmac.new(key, workspace_id.bytes + text.encode(), hashlib.sha256).hexdigest()


def as_json(events: Sequence[Event]) -> str:
    """The events as a JSON array of rows, for jsonb_populate_recordset."""
    return json.dumps([{name: _plain(getattr(event, name)) for name in COLUMNS} for event in events])


def _plain(value: object) -> object:
    if isinstance(value, UUID):
        return str(value)
    return f"{value:.6f} s" if isinstance(value, float) else value
