"""The calls that both clients offer, as data: what is sent, for how long, when it is repeated, how lists go on.

Each function describes one RPC and sends nothing; the clients make methods of them. Messages are those of relay.v1,
whose comments give the bounds and errors. Every function takes `timeout`, the seconds until the call's deadline (for
lists: of each page), and durations and times as timedelta and aware datetime.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Generic, Self, TypeVar

from google.protobuf.message import Message

from relay.errors import Contention, RelayError
from relay.v1 import actions_pb2, audit_pb2, auth_pb2, connections_pb2

DEADLINE = 30.0  # seconds

Answer = TypeVar("Answer")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One unary call that answers an Answer. method: its name in the service's stub."""

    method: str
    request: Message
    timeout: float = DEADLINE

    def pause(self, error: RelayError, remaining: float) -> float | None:
        """Seconds after which to send the call again, None to give up. remaining: seconds until the deadline.

        Only Execute is repeated here, and only where Relay says when: its idempotency key makes that safe. The
        channel's service config repeats what is UNAVAILABLE.
        """
        if self.method != "Execute" or not isinstance(error, Contention) or error.retry_after is None:
            return None
        return error.retry_after if error.retry_after < remaining else None


@dataclass(frozen=True)
class Page(Call[Any], Generic[Item]):
    """A call that answers one page of a list. field: the one of the answer that holds the items."""

    field: str = ""

    def items(self, answer: Any) -> Sequence[Item]:
        items: Sequence[Item] = getattr(answer, self.field)
        return items

    def next(self, answer: Any) -> Self | None:
        """The call for the page after this answer. None: it was the last one."""
        if not answer.next_page_token:
            return None
        request: Any = type(self.request)()
        request.CopyFrom(self.request)
        request.page_token = answer.next_page_token
        return replace(self, request=request)


# AuthService


def who_am_i(*, timeout: float = DEADLINE) -> Call[auth_pb2.Principal]:
    """Who the server takes the caller for."""
    return Call("WhoAmI", auth_pb2.WhoAmIRequest(), timeout)


def create_api_key(
    name: str,
    role: str,
    *,
    scopes: Iterable[str] = (),
    expire_time: datetime | None = None,
    timeout: float = DEADLINE,
) -> Call[auth_pb2.ApiKey]:
    """Makes a key; only this answer holds its `secret`. scopes: those of the role to keep, none for all of them.

    Never repeated by the client: after an Unavailable or DeadlineExceeded, look in list_api_keys first.
    """
    request = auth_pb2.CreateApiKeyRequest(name=name, role=role, scopes=scopes, expire_time=_aware(expire_time))
    return Call("CreateApiKey", request, timeout)


def list_api_keys(*, page_size: int = 0, timeout: float = DEADLINE) -> Page[auth_pb2.ApiKey]:
    """The keys of the workspace, newest first, revoked and expired ones included."""
    return Page("ListApiKeys", auth_pb2.ListApiKeysRequest(page_size=page_size), timeout, "api_keys")


def revoke_api_key(api_key_id: str, *, timeout: float = DEADLINE) -> Call[auth_pb2.ApiKey]:
    """Revokes a key for good and answers it."""
    return Call("RevokeApiKey", auth_pb2.RevokeApiKeyRequest(id=api_key_id), timeout)


# ConnectionsService


def create_webhook(
    name: str,
    url: str,
    *,
    body_signature: bool = False,
    signing_secret: str = "",
    default: bool = False,
    timeout: float = DEADLINE,
) -> Call[connections_pb2.Connection]:
    """Makes a connection to a webhook receiver; only this answer holds its `signing_secret`.

    body_signature: send the older header X-Signature too. signing_secret: "whsec_" and base64, empty to have one made.
    default: serve previews that name no connection. Never repeated by the client: after an Unavailable or
    DeadlineExceeded, look in connections.list first.
    """
    request = connections_pb2.CreateConnectionRequest(
        name=name,
        webhook=connections_pb2.WebhookConfiguration(url=url, body_signature=body_signature),
        signing_secret=signing_secret,
        default=default,
    )
    return Call("CreateConnection", request, timeout)


def get_connection(connection_id: str, *, timeout: float = DEADLINE) -> Call[connections_pb2.Connection]:
    """One connection."""
    return Call("GetConnection", connections_pb2.GetConnectionRequest(id=connection_id), timeout)


def list_connections(*, page_size: int = 0, timeout: float = DEADLINE) -> Page[connections_pb2.Connection]:
    """The connections of the workspace, newest first."""
    return Page("ListConnections", connections_pb2.ListConnectionsRequest(page_size=page_size), timeout, "connections")


# ActionsService


def list_actions(*, page_size: int = 0, timeout: float = DEADLINE) -> Page[actions_pb2.Action]:
    """The actions of the server, by name."""
    return Page("ListActions", actions_pb2.ListActionsRequest(page_size=page_size), timeout, "actions")


def preview(
    action: str,
    parameters: Mapping[str, object],
    *,
    connection_id: str = "",
    ttl: timedelta | None = None,
    timeout: float = DEADLINE,
) -> Call[actions_pb2.Preview]:
    """Checks an action's parameters and shows what `execute` would do, without doing it.

    parameters: what the action's schema asks for, as JSON values. connection_id: empty for the workspace's default.
    ttl: how long the preview can be executed, 10 seconds to 24 hours; None for an hour. Raises ValueError for an
    integer beyond 2^53, which JSON would round.
    """
    _check_integers(parameters, "parameters")
    request = actions_pb2.PreviewRequest(action=action, connection_id=connection_id, parameters=parameters, ttl=ttl)
    return Call("Preview", request, timeout)


def get_preview(preview_id: str, *, timeout: float = DEADLINE) -> Call[actions_pb2.Preview]:
    """A preview that this caller made."""
    return Call("GetPreview", actions_pb2.GetPreviewRequest(id=preview_id), timeout)


def execute(
    preview: actions_pb2.Preview,
    *,
    idempotency_key: str = "",
    wait: timedelta | None = None,
    timeout: float | None = None,
) -> Call[actions_pb2.Execution]:
    """Does what `preview` showed, once, and answers the execution as it then is: look at its `state`.

    The preview's digest goes with it: what was shown is what is confirmed. idempotency_key: recognises a repetition, 1
    to 255 printable ASCII characters; empty for the preview's id. wait: for the first attempt's outcome, 0 to 30
    seconds; None for 10. timeout: None for 30 seconds more than `wait`. Raises ValueError for a preview without an id
    or a digest.
    """
    if not (preview.id and preview.digest):
        raise ValueError("execute needs a preview that Relay answered: this one has no id or no digest")
    request = actions_pb2.ExecuteRequest(
        preview_id=preview.id, digest=preview.digest, idempotency_key=idempotency_key, wait=wait
    )
    if timeout is None:
        timeout = DEADLINE + (wait.total_seconds() if wait else 0)
    return Call("Execute", request, timeout)


def get_execution(execution_id: str, *, timeout: float = DEADLINE) -> Call[actions_pb2.Execution]:
    """One execution."""
    return Call("GetExecution", actions_pb2.GetExecutionRequest(id=execution_id), timeout)


def list_executions(
    *,
    states: Iterable[actions_pb2.ExecutionState] = (),
    action: str = "",
    connection_id: str = "",
    page_size: int = 0,
    timeout: float = DEADLINE,
) -> Page[actions_pb2.Execution]:
    """The executions of the workspace, newest first: those in any of the states, of the action, to the connection."""
    request = actions_pb2.ListExecutionsRequest(
        states=states, action=action, connection_id=connection_id, page_size=page_size
    )
    return Page("ListExecutions", request, timeout, "executions")


def list_attempts(execution_id: str, *, page_size: int = 0, timeout: float = DEADLINE) -> Page[actions_pb2.Attempt]:
    """The attempts of one execution, first to last."""
    request = actions_pb2.ListAttemptsRequest(execution_id=execution_id, page_size=page_size)
    return Page("ListAttempts", request, timeout, "attempts")


# AuditService


def list_events(
    *,
    action: str = "",
    provider: str = "",
    outcome: audit_pb2.EventOutcome = audit_pb2.EVENT_OUTCOME_UNSPECIFIED,
    actor_id: str = "",
    request_id: str = "",
    start_time: datetime | None = None,
    end_time: datetime | None = None,
    page_size: int = 0,
    timeout: float = DEADLINE,
) -> Page[audit_pb2.Event]:
    """The audit events of the workspace, newest first, from start_time on and before end_time."""
    request = audit_pb2.ListEventsRequest(
        action=action,
        provider=provider,
        outcome=outcome,
        actor_id=actor_id,
        request_id=request_id,
        start_time=_aware(start_time),
        end_time=_aware(end_time),
        page_size=page_size,
    )
    return Page("ListEvents", request, timeout, "events")


def _aware(time: datetime | None) -> datetime | None:
    """Refuses a time without a time zone: protobuf would take local time for UTC."""
    if time is not None and time.tzinfo is None:
        raise ValueError("a time needs a time zone, as in datetime.now(UTC)")
    return time


def _check_integers(value: object, path: str) -> None:
    """Refuses integers that a Struct, whose numbers are IEEE 754 doubles, would round in silence."""
    match value:
        case int() if abs(value) > 2**53:
            raise ValueError(f"{path}: integers beyond 2^53 lose digits as JSON numbers; send a string")
        case Mapping():
            for key, member in value.items():
                _check_integers(member, f"{path}.{key}")
        case list() | tuple():
            for index, member in enumerate(value):
                _check_integers(member, f"{path}[{index}]")
