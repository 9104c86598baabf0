"""ActionsService: preview, execute, and looking at what became of it."""

import json
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from relay.v1 import actions_pb2

from relay_grpc import errors
from relay_grpc.actions import leases, messages, store
from relay_grpc.actions.catalogue import CATALOGUE, Action, find
from relay_grpc.actions.dispatcher import Dispatcher
from relay_grpc.actions.execution import MAX_ATTEMPTS, Plan
from relay_grpc.actions.preview import digest, fingerprint
from relay_grpc.actions.providers import Provider
from relay_grpc.audit.event import of_call
from relay_grpc.audit.recorder import Recorder
from relay_grpc.audit.redaction import masked_prefix
from relay_grpc.call import Call
from relay_grpc.connections import store as connections
from relay_grpc.db import Database
from relay_grpc.ids import uuid7
from relay_grpc.paging import page_of

DEFAULT_TTL = timedelta(hours=1)
DEFAULT_WAIT = timedelta(seconds=10)
ANSWER_MARGIN = 0.2  # seconds of the caller's deadline that are kept for the way back


class ActionsService:
    """enabled: whether this server previews and executes anything."""

    def __init__(
        self,
        db: Database,
        recorder: Recorder,
        dispatcher: Dispatcher,
        providers: tuple[Provider, ...],
        *,
        enabled: bool,
    ) -> None:
        self._db = db
        self._recorder = recorder
        self._dispatcher = dispatcher
        self._providers = {provider.name: provider for provider in providers}
        self._enabled = enabled

    async def ListActions(self, request: Any, call: Call) -> actions_pb2.ListActionsResponse:
        page = page_of(request, call, str)
        actions = sorted(
            (action for action in CATALOGUE if action.name > (page.cursor or "")), key=lambda action: action.name
        )
        return page.answer(
            actions_pb2.ListActionsResponse,
            "actions",
            [{"name": action.name, "action": action} for action in actions],
            lambda row: messages.action(row["action"], self._why_disabled(row["action"])),
            cursor="name",
        )

    async def Preview(self, request: Any, call: Call) -> actions_pb2.Preview:
        action = find(request.action)
        if why := self._why_disabled(action):
            raise errors.FailedPrecondition(why, reason="ACTION_DISABLED")
        parameters = messages.plain(request.parameters)
        canonical = action.canonical(parameters)
        target = await self._connection_for(request.connection_id, action, call)
        provider = self._providers[action.provider]
        try:
            plan = await provider.plan(action.name, parameters, json.loads(target["configuration"]))
        except errors.InvalidRequest as error:  # of the connection's fields, which this request does not have
            problems = [("connection_id", problem) for _, problem in error.violations]
            raise errors.InvalidRequest(problems, reason=error.reason) from error
        caller = call.principal.caller
        async with self._recorder.change(call) as (connection, event):
            row = await store.insert_preview(
                connection,
                id_=uuid7(),
                workspace_id=call.workspace_id,
                caller=caller,
                action=action,
                target=target,
                parameters=canonical,
                params_hash=self._recorder.hash(call.workspace_id, canonical),
                params_prefix=masked_prefix(parameters, action.names),
                digest=digest(
                    action=action.name,
                    action_version=action.version,
                    workspace_id=call.workspace_id,
                    caller=caller,
                    connection_id=target["id"],
                    connection_version=target["version"],
                    parameters=parameters,
                ),
                fingerprint=fingerprint(
                    action=action.name, version=action.version, connection_id=target["id"], parameters=parameters
                ),
                shown=_shown(action, plan, provider.timeout),
                ttl=request.ttl.ToTimedelta() if request.HasField("ttl") else DEFAULT_TTL,
            )
            event.target = f"previews/{row['id']}"
            event.action_type, event.provider = action.name, action.provider
            event.params_hash, event.params_prefix = row["params_hash"], row["params_prefix"]
        return messages.preview(row)

    async def GetPreview(self, request: Any, call: Call) -> actions_pb2.Preview:
        async with self._db.workspace(call.workspace_id) as connection:
            row = await store.get_preview(connection, call.workspace_id, call.principal.caller, UUID(request.id))
        if row is None:
            raise errors.NotFound("preview", request.id)
        return messages.preview(row)

    async def Execute(self, request: Any, call: Call) -> actions_pb2.Execution:
        if not self._enabled:
            raise errors.FailedPrecondition(_SWITCHED_OFF, reason="ACTION_DISABLED")
        idempotency_key = request.idempotency_key or request.preview_id
        execution_id = uuid7()
        event = of_call(call)
        event.target = f"executions/{execution_id}"
        event.idempotency_key_hash = self._recorder.hash(call.workspace_id, idempotency_key)
        order = leases.Order(
            execution_id=execution_id,
            workspace_id=call.workspace_id,
            caller=call.principal.caller,
            preview_id=UUID(request.preview_id),
            digest=request.digest,
            idempotency_key=idempotency_key,
            lease_token=uuid4(),
            event=event,
            call=call,
        )
        row = await self._dispatcher.execute(order)
        if row is None:
            return await self._replay_or_refuse(order)
        wait = (request.wait.ToTimedelta() if request.HasField("wait") else DEFAULT_WAIT).total_seconds()
        outcome = await self._dispatcher.first_outcome(execution_id, min(wait, call.time_remaining() - ANSWER_MARGIN))
        return messages.execution(outcome or row)

    async def GetExecution(self, request: Any, call: Call) -> actions_pb2.Execution:
        return messages.execution(await self._execution(UUID(request.id), call))

    async def ListExecutions(self, request: Any, call: Call) -> actions_pb2.ListExecutionsResponse:
        page = page_of(request, call, UUID)
        async with self._db.workspace(call.workspace_id) as connection:
            rows = await store.list_executions(
                connection,
                call.workspace_id,
                states=[messages.state_word(state) for state in request.states],
                action=request.action,
                connection_id=UUID(request.connection_id) if request.connection_id else None,
                before=page.cursor,
                limit=page.fetch,
            )
        return page.answer(actions_pb2.ListExecutionsResponse, "executions", rows, messages.execution)

    async def ListAttempts(self, request: Any, call: Call) -> actions_pb2.ListAttemptsResponse:
        page = page_of(request, call, _number)
        execution_id = UUID(request.execution_id)
        await self._execution(execution_id, call)
        async with self._db.workspace(call.workspace_id) as connection:
            rows = await store.list_attempts(
                connection, call.workspace_id, execution_id, after=page.cursor or 0, limit=page.fetch
            )
        return page.answer(actions_pb2.ListAttemptsResponse, "attempts", rows, messages.attempt, cursor="number")

    def _why_disabled(self, action: Action) -> str:
        """Empty: the action is enabled here."""
        if not self._enabled:
            return _SWITCHED_OFF
        return "" if action.provider in self._providers else f"this server has no provider {action.provider!r}"

    async def _connection_for(self, id_: str, action: Action, call: Call) -> asyncpg.Record:
        async with self._db.workspace(call.workspace_id) as connection:
            if id_:
                target = await connections.get(connection, call.workspace_id, UUID(id_))
            else:
                default = await connections.get_default(connection, call.workspace_id)
                if default is None:
                    raise errors.InvalidRequest(
                        [("connection_id", "is empty, and this workspace has no default connection")]
                    )
                target = default
        if target["provider"] != action.provider:
            raise errors.InvalidRequest(
                [
                    (
                        "connection_id",
                        f"is a connection of {target['provider']!r}; {action.name} needs {action.provider!r}",
                    )
                ]
            )
        if not target["enabled"]:
            raise errors.FailedPrecondition(
                f"the connection {target['name']!r} is disabled", reason="CONNECTION_DISABLED"
            )
        return target

    async def _execution(self, id_: UUID, call: Call) -> asyncpg.Record:
        async with self._db.workspace(call.workspace_id) as connection:
            row = await store.get_execution(connection, call.workspace_id, id_)
        if row is None:
            raise errors.NotFound("execution", str(id_))
        return row

    async def _replay_or_refuse(self, order: leases.Order) -> actions_pb2.Execution:
        async with self._db.workspace(order.workspace_id) as connection:
            facts = await store.explain(
                connection, order.workspace_id, order.caller, order.preview_id, order.idempotency_key
            )
            if facts["execution_id"] and facts["same_request"] and order.digest in ("", facts["digest"]):
                order.call.target = f"executions/{facts['execution_id']}"
                earlier = await store.get_execution(connection, order.workspace_id, facts["execution_id"])
                return messages.execution(earlier, replayed=True)
        raise _refusal(order, facts)


def _number(text: str) -> int:
    number = int(text)
    if number not in range(2**31):
        raise ValueError("no column holds this number")
    return number


_SWITCHED_OFF = "actions are switched off on this server (ACTIONS_ENABLED)"


def _refusal(order: leases.Order, facts: asyncpg.Record) -> errors.RelayError:
    """Why an Execute was not carried out, the most telling reason first."""
    if facts["preview_id"] is None:
        return errors.NotFound("preview", str(order.preview_id))
    if facts["execution_id"] and not facts["same_request"]:
        return errors.FailedPrecondition(
            "this idempotency key belongs to a different request; use a new key for a new request",
            reason="IDEMPOTENCY_KEY_REUSED",
        )
    if order.digest not in ("", facts["digest"]):
        return _drifted("digest")
    if facts["used_by"]:
        return errors.FailedPrecondition(
            "this preview was executed already, under another idempotency key; preview again",
            reason="PREVIEW_USED",
            metadata={"execution_id": str(facts["used_by"])},
        )
    if facts["expired"]:
        return errors.FailedPrecondition("this preview has expired; preview again", reason="PREVIEW_EXPIRED")
    if not facts["enabled"]:
        return errors.FailedPrecondition("the connection is disabled", reason="CONNECTION_DISABLED")
    changed = []
    if find(facts["action_type"]).version != facts["action_version"]:
        changed.append("action_version")
    if not facts["same_connection"]:
        changed.append("connection_version")
    return _drifted(*changed) if changed else errors.Contention("another call holds this preview; try again")


def _drifted(*fields: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        f"what would run is not what was previewed ({', '.join(fields)} differs); preview again",
        reason="PREVIEW_DRIFTED",
        metadata={"fields": " ".join(fields)},
    )


def _shown(action: Action, plan: Plan, timeout: float) -> dict[str, Any]:
    return {
        "summary": f"{action.title}: {plan.summary}",
        "warnings": plan.warnings,
        "method": plan.method,
        "url": plan.url,
        "addresses": plan.addresses,
        "body_bytes": plan.body_bytes,
        "signatures": plan.signatures,
        "timeout": timeout,
        "max_attempts": MAX_ATTEMPTS,
        "delivery": action.delivery,
    }
