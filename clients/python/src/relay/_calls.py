"""The calls that both clients offer, as data.

Each function describes one RPC and sends nothing; the clients make methods of them. Messages are those of relay.v1,
whose comments give the bounds and errors. Every function takes `timeout`, the seconds until the call's deadline (for
lists: of each page; for streams: of the whole), and durations and times as timedelta and aware datetime.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from relay._call import DEADLINE, Call, Page, Stream, Tail, Watch
from relay.v1 import actions_pb2, audit_pb2, auth_pb2, connections_pb2

WATCH_DEADLINE = EXPORT_DEADLINE = 3600.0  # seconds

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
    calls_per_minute: int = 0,
    executions_per_minute: int = 0,
    timeout: float = DEADLINE,
) -> Call[auth_pb2.ApiKey]:
    """Makes a key; only this answer holds its `secret`. scopes: those of the role to keep, none for all of them.

    calls_per_minute, executions_per_minute: its share of the workspace's budgets, 0 for all of it. Never repeated by
    the client: after an Unavailable or DeadlineExceeded, look in list_api_keys first.
    """
    request = auth_pb2.CreateApiKeyRequest(name=name, role=role, scopes=scopes, expire_time=_aware(expire_time))
    if calls_per_minute or executions_per_minute:
        request.limits.calls_per_minute = calls_per_minute
        request.limits.executions_per_minute = executions_per_minute
    return Call("CreateApiKey", request, timeout)


def get_api_key(api_key_id: str, *, timeout: float = DEADLINE) -> Call[auth_pb2.ApiKey]:
    """One key, without its secret."""
    return Call("GetApiKey", auth_pb2.GetApiKeyRequest(id=api_key_id), timeout)


def list_api_keys(*, page_size: int = 0, timeout: float = DEADLINE) -> Page[auth_pb2.ApiKey]:
    """The keys of the workspace, newest first, revoked and expired ones included."""
    return Page("ListApiKeys", auth_pb2.ListApiKeysRequest(page_size=page_size), timeout, "api_keys")


def rotate_api_key(api_key_id: str, overlap: timedelta, *, timeout: float = DEADLINE) -> Call[auth_pb2.ApiKey]:
    """Makes the key that replaces this one; only this answer holds its `secret`.

    overlap: how long the old key keeps working, 0 to 30 days; never past its own expiry. Never repeated by the client:
    after an Unavailable or DeadlineExceeded, look in list_api_keys first.
    """
    return Call("RotateApiKey", auth_pb2.RotateApiKeyRequest(id=api_key_id, overlap=overlap), timeout)


def revoke_api_key(api_key_id: str, *, timeout: float = DEADLINE) -> Call[auth_pb2.ApiKey]:
    """Revokes a key for good and answers it."""
    return Call("RevokeApiKey", auth_pb2.RevokeApiKeyRequest(id=api_key_id), timeout)


def verify_api_key(
    key: str, *, scopes: Iterable[str] = (), timeout: float = DEADLINE
) -> Call[auth_pb2.VerifyApiKeyResponse]:
    """Whether a key that somebody presented is a valid one of this workspace and holds the scopes: look at `code`."""
    return Call("VerifyApiKey", auth_pb2.VerifyApiKeyRequest(key=key, scopes=scopes), timeout)


def create_role(name: str, parent: str, scopes: Iterable[str], *, timeout: float = DEADLINE) -> Call[auth_pb2.Role]:
    """Makes a role that keeps these scopes of a built-in one: "admin", "developer" or "viewer".

    Never repeated by the client: after an Unavailable or DeadlineExceeded, look in list_roles first.
    """
    return Call("CreateRole", auth_pb2.CreateRoleRequest(name=name, parent=parent, scopes=scopes), timeout)


def list_roles(*, page_size: int = 0, timeout: float = DEADLINE) -> Page[auth_pb2.Role]:
    """The built-in roles and then those of the workspace, by name."""
    return Page("ListRoles", auth_pb2.ListRolesRequest(page_size=page_size), timeout, "roles")


def delete_role(name: str, *, timeout: float = DEADLINE) -> Call[Empty]:
    """Deletes a role that no user has, and no key that was not revoked.

    Never repeated by the client: the second time, it would not be found.
    """
    return Call("DeleteRole", auth_pb2.DeleteRoleRequest(name=name), timeout)


def assign_role(
    user_id: str, role: str, *, issuer: str = "", timeout: float = DEADLINE
) -> Call[auth_pb2.RoleAssignment]:
    """Gives a user its one role in the workspace. user_id, issuer: the claims "sub" and "iss" of the user's tokens.

    issuer: empty for the only one that the server knows. Never repeated by the client, which could undo what somebody
    else did in between.
    """
    request = auth_pb2.AssignRoleRequest(user_id=user_id, role=role, issuer=issuer)
    return Call("AssignRole", request, timeout)


def list_role_assignments(*, page_size: int = 0, timeout: float = DEADLINE) -> Page[auth_pb2.RoleAssignment]:
    """The users of the workspace and their roles, newest first."""
    request = auth_pb2.ListRoleAssignmentsRequest(page_size=page_size)
    return Page("ListRoleAssignments", request, timeout, "role_assignments")


def remove_role(user_id: str, *, issuer: str = "", timeout: float = DEADLINE) -> Call[Empty]:
    """Takes a user's role away. issuer: empty for the only one that the server knows.

    Never repeated by the client: the second time, there would be no role to take.
    """
    return Call("RemoveRole", auth_pb2.RemoveRoleRequest(user_id=user_id, issuer=issuer), timeout)


# ConnectionsService


def create_webhook(
    name: str,
    url: str,
    *,
    body_signature: bool = False,
    headers: Mapping[str, str] | None = None,
    retry_delays: Iterable[timedelta] | None = None,
    attempt_timeout: timedelta | None = None,
    signing_secret: str = "",
    signature_scheme: connections_pb2.SignatureScheme = connections_pb2.SIGNATURE_SCHEME_UNSPECIFIED,
    default: bool = False,
    validate_only: bool = False,
    timeout: float = DEADLINE,
) -> Call[connections_pb2.Connection]:
    """Makes a connection to a webhook receiver; only this answer holds its `signing_secret`.

    body_signature: send the older header X-Signature too. headers: sent with every delivery, kept encrypted.
    retry_delays: the waits between attempts, none of them for a single attempt; None for the server's. attempt_timeout:
    the most that an attempt may take; None for the server's. signing_secret: "whsec_" and base64, empty to have one
    made. signature_scheme: with SIGNATURE_SCHEME_ED25519 the answer's `signing_keys` hold the public key instead of a
    secret. default: serve previews that name no connection. validate_only: checks everything and makes nothing. Never
    repeated by the client: after an Unavailable or DeadlineExceeded, look in connections.list first.
    """
    request = connections_pb2.CreateConnectionRequest(
        name=name,
        webhook=connections_pb2.WebhookConfiguration(
            url=url,
            body_signature=body_signature,
            headers=headers,
            retry_policy=None if retry_delays is None else connections_pb2.RetryPolicy(delays=retry_delays),
            timeout=attempt_timeout,
        ),
        signing_secret=signing_secret,
        signature_scheme=signature_scheme,
        default=default,
        validate_only=validate_only,
    )
    return Call("CreateConnection", request, timeout)


def get_connection(connection_id: str, *, timeout: float = DEADLINE) -> Call[connections_pb2.Connection]:
    """One connection."""
    return Call("GetConnection", connections_pb2.GetConnectionRequest(id=connection_id), timeout)


def list_connections(*, page_size: int = 0, timeout: float = DEADLINE) -> Page[connections_pb2.Connection]:
    """The connections of the workspace, newest first."""
    return Page("ListConnections", connections_pb2.ListConnectionsRequest(page_size=page_size), timeout, "connections")


def update_connection(
    connection: connections_pb2.Connection,
    fields: Iterable[str],
    *,
    validate_only: bool = False,
    timeout: float = DEADLINE,
) -> Call[connections_pb2.Connection]:
    """Changes these fields of the connection with the message's id to what the message says.

    connection: as it was answered, or made of its id and the new values. With a version, it is changed only if it is
    still at that one; otherwise Contention. Headers with empty values stay as they are. fields: such as "name",
    "enabled" or "webhook.url".
    validate_only: checks everything and changes nothing; the answer is what would be. Never repeated by the client: the
    second time, it would find a newer version, or undo what somebody else did in between.
    """
    request = connections_pb2.UpdateConnectionRequest(
        connection=connection, update_mask=FieldMask(paths=fields), validate_only=validate_only
    )
    return Call("UpdateConnection", request, timeout)


def delete_connection(connection_id: str, *, timeout: float = DEADLINE) -> Call[Empty]:
    """Deletes a connection that no unfinished execution uses, and its secrets; its executions stay.

    Never repeated by the client: the second time, it would not be found.
    """
    return Call("DeleteConnection", connections_pb2.DeleteConnectionRequest(id=connection_id), timeout)


def rotate_secret(
    connection_id: str,
    *,
    overlap: timedelta | None = None,
    signing_secret: str = "",
    signature_scheme: connections_pb2.SignatureScheme = connections_pb2.SIGNATURE_SCHEME_UNSPECIFIED,
    timeout: float = DEADLINE,
) -> Call[connections_pb2.Connection]:
    """Gives the connection a new signing secret; only this answer holds it.

    overlap: how long those that it has sign beside it, 0 to 7 days; None for 24 hours. signing_secret: empty to have
    one made. signature_scheme: unspecified for that of the newest secret. Never repeated by the client: after an
    Unavailable or DeadlineExceeded, look at the `signing_keys` of connections.get first.
    """
    request = connections_pb2.RotateSecretRequest(
        id=connection_id, overlap=overlap, signing_secret=signing_secret, signature_scheme=signature_scheme
    )
    return Call("RotateSecret", request, timeout)


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
    validate_only: bool = False,
    timeout: float | None = None,
) -> Call[actions_pb2.Execution]:
    """Does what `preview` showed, once, and answers the execution as it then is: look at its `state`.

    The preview's digest goes with it: what was shown is what is confirmed. idempotency_key: recognises a repetition, 1
    to 255 printable ASCII characters; empty for the preview's id. wait: for the first attempt's outcome, 0 to 30
    seconds; None for 10. validate_only: checks everything and does nothing; the answer has no id. timeout: None for 30
    seconds more than `wait`. Raises ValueError for a preview without an id or a digest.
    """
    if not (preview.id and preview.digest):
        raise ValueError("execute needs a preview that Relay answered: this one has no id or no digest")
    request = actions_pb2.ExecuteRequest(
        preview_id=preview.id,
        digest=preview.digest,
        idempotency_key=idempotency_key,
        wait=wait,
        validate_only=validate_only,
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


def watch_execution(execution_id: str, *, timeout: float = WATCH_DEADLINE) -> Watch[actions_pb2.Execution]:
    """The execution as it is and whenever it has changed, until it ends: one whose outcome is unknown goes on.

    A watch that breaks off goes on by itself, with whatever has changed meanwhile; one that nobody answers from the
    start raises Unavailable.
    """
    return Watch("WatchExecution", actions_pb2.WatchExecutionRequest(id=execution_id), timeout)


def cancel_execution(execution_id: str, *, timeout: float = DEADLINE) -> Call[actions_pb2.Execution]:
    """Stops further attempts of an execution; one that is under way may yet succeed: look at `state`.

    Never repeated by the client: the second time, it could find the execution ended.
    """
    return Call("CancelExecution", actions_pb2.CancelExecutionRequest(id=execution_id), timeout)


def resend_execution(execution_id: str, *, timeout: float = DEADLINE) -> Call[actions_pb2.Execution]:
    """Delivers an ended execution once more, under the same webhook-id and with all its attempts anew.

    Never repeated by the client, which could deliver it a third time: after an Unavailable or DeadlineExceeded, look at
    the `resend_count` of get_execution first.
    """
    return Call("ResendExecution", actions_pb2.ResendExecutionRequest(id=execution_id), timeout)


def reconcile_execution(
    execution_id: str, state: actions_pb2.ExecutionState, reason: str, *, timeout: float = DEADLINE
) -> Call[actions_pb2.Execution]:
    """Settles an execution whose outcome is unknown.

    state: what happened, EXECUTION_STATE_SUCCESS or EXECUTION_STATE_FAILED. reason: how that is known, 1 to 512
    characters, kept in the audit log. Never repeated by the client: the second time, it would find it settled.
    """
    request = actions_pb2.ReconcileExecutionRequest(id=execution_id, state=state, reason=reason)
    return Call("ReconcileExecution", request, timeout)


def recover_executions(
    start_time: datetime,
    *,
    end_time: datetime | None = None,
    connection_id: str = "",
    validate_only: bool = False,
    timeout: float = DEADLINE,
) -> Call[actions_pb2.Recovery]:
    """Begins to deliver again whatever failed of what was made from start_time on and before end_time (None: now).

    connection_id: empty for all of them. validate_only: only counts; the answer has no id. get_recovery tells how far
    it is. Never repeated by the client: after an Unavailable or DeadlineExceeded, count again to see what is left.
    """
    request = actions_pb2.RecoverExecutionsRequest(
        start_time=_aware(start_time),
        end_time=_aware(end_time),
        connection_id=connection_id,
        validate_only=validate_only,
    )
    return Call("RecoverExecutions", request, timeout)


def get_recovery(recovery_id: str, *, timeout: float = DEADLINE) -> Call[actions_pb2.Recovery]:
    """How far a recovery is: it goes on as long as it has no `end_time`."""
    return Call("GetRecovery", actions_pb2.GetRecoveryRequest(id=recovery_id), timeout)


def cancel_recovery(recovery_id: str, *, timeout: float = DEADLINE) -> Call[actions_pb2.Recovery]:
    """Stops a recovery where it is; what it has handed over goes on."""
    return Call("CancelRecovery", actions_pb2.CancelRecoveryRequest(id=recovery_id), timeout)


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


def get_event(event_id: str, *, timeout: float = DEADLINE) -> Call[audit_pb2.Event]:
    """One event."""
    return Call("GetEvent", audit_pb2.GetEventRequest(id=event_id), timeout)


def export_events(
    export_format: audit_pb2.ExportFormat = audit_pb2.EXPORT_FORMAT_JSONL,
    *,
    start_time: datetime | None = None,
    end_time: datetime | None = None,
    timeout: float = EXPORT_DEADLINE,
) -> Stream[audit_pb2.ExportEventsResponse]:
    """The events that were added to the log from start_time on and before end_time, as pieces of a file: its `chunk`s.

    Never repeated by the client, which could not go on within a file: whatever it raises, the file is not whole.
    """
    request = audit_pb2.ExportEventsRequest(
        format=export_format, start_time=_aware(start_time), end_time=_aware(end_time)
    )
    return Stream("ExportEvents", request, timeout)


def tail_events(*, cursor: str = "", timeout: float = WATCH_DEADLINE) -> Tail:
    """Events as they are added to the log, in order, from a cursor on; empty: from now on.

    The first message has a cursor and no event. Whoever keeps the `cursor` of what was last dealt with misses nothing
    and may see the newest twice. A tail that breaks off goes on by itself; one that nobody answers from the start
    raises Unavailable.
    """
    return Tail("TailEvents", audit_pb2.TailEventsRequest(cursor=cursor), timeout)


def get_checkpoint(*, timeout: float = DEADLINE) -> Call[audit_pb2.Checkpoint]:
    """The newest signed checkpoint of the workspace's log. Keep its `note` elsewhere, to prove later what it holds."""
    return Call("GetCheckpoint", audit_pb2.GetCheckpointRequest(), timeout)


def get_inclusion_proof(
    event_id: str, *, tree_size: int = 0, timeout: float = DEADLINE
) -> Call[audit_pb2.InclusionProof]:
    """Proof that an event is in the log of a checkpoint of this size; 0: the newest. relay.proofs verifies it."""
    request = audit_pb2.GetInclusionProofRequest(event_id=event_id, tree_size=tree_size)
    return Call("GetInclusionProof", request, timeout)


def get_consistency_proof(
    first_tree_size: int, *, second_tree_size: int = 0, timeout: float = DEADLINE
) -> Call[audit_pb2.ConsistencyProof]:
    """Proof that the log of the first size is a prefix of the second's; 0: the newest. relay.proofs verifies it."""
    request = audit_pb2.GetConsistencyProofRequest(first_tree_size=first_tree_size, second_tree_size=second_tree_size)
    return Call("GetConsistencyProof", request, timeout)


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
