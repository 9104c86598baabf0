"""ActionsService: what there is to do, what it would do, and doing it."""

import json
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import asyncpg
from relay.v1 import actions_pb2

from relay_grpc import errors
from relay_grpc.actions import execution_store, messages, refusals, store
from relay_grpc.actions.catalogue import CATALOGUE, Action, find
from relay_grpc.actions.dispatcher import Dispatcher
from relay_grpc.actions.execution import ENDED, Plan, timeout
from relay_grpc.actions.orders import Order
from relay_grpc.actions.preview import digest, fingerprint
from relay_grpc.actions.providers import Provider
from relay_grpc.actions.signing import Scheme
from relay_grpc.audit.event import of_call
from relay_grpc.audit.recorder import Recorder
from relay_grpc.audit.redaction import masked_prefix
from relay_grpc.call import Call
from relay_grpc.connections import store as connections
from relay_grpc.db import Database
from relay_grpc.ids import uuid7
from relay_grpc.paging import page_of

if TYPE_CHECKING:
    from relay_grpc.db import Connection

DEFAULT_TTL = timedelta(hours=1)
DEFAULT_WAIT = timedelta(seconds=10)
ANSWER_MARGIN = 0.2  # seconds of the caller's deadline that are kept for the way back


class ActionsService:
    """providers: those whose actions this server previews and executes. quota_cost: of an Execute."""

    def __init__(
        self,
        db: Database,
        recorder: Recorder,
        dispatcher: Dispatcher,
        providers: tuple[Provider, ...],
        *,
        quota_cost: int,
    ) -> None:
        self._db = db
        self._recorder = recorder
        self._dispatcher = dispatcher
        self._providers = {provider.name: provider for provider in providers}
        self._quota_cost = quota_cost

    async def ListActions(self, request: Any, call: Call) -> actions_pb2.ListActionsResponse:
        page = page_of(request, call, str)
        async with self._db.workspace(call.workspace_id) as connection:
            halts = await store.list_halts(connection, call.workspace_id)
        actions = sorted(
            (action for action in CATALOGUE if action.name > (page.cursor or "")), key=lambda action: action.name
        )
        return page.answer(
            actions_pb2.ListActionsResponse,
            "actions",
            [{"name": action.name, "action": action} for action in actions],
            lambda row: messages.action(row["action"], refusals.why_disabled(row["action"], halts, self._providers)),
            cursor="name",
        )

    async def Preview(self, request: Any, call: Call) -> actions_pb2.Preview:
        action = find(request.action)
        parameters = messages.plain(request.parameters)
        canonical = action.canonical(parameters)
        target = await self._target(request.connection_id, action, call)
        plan = await self._plan(action, parameters, target)
        shown = messages.shown(
            action,
            plan,
            target,
            timeout=timeout(json.loads(target["configuration"]), self._providers[action.provider].timeout),
            quota_cost=self._quota_cost,
        )
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
                shown=shown,
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
        if not self._providers:
            raise refusals.disabled_action(refusals.SWITCHED_OFF)
        idempotency_key = request.idempotency_key or request.preview_id
        execution_id = uuid7()
        call.idempotency_key_hash = self._recorder.hash(call.workspace_id, idempotency_key)
        event = of_call(call)
        event.target = f"executions/{execution_id}"
        order = Order(
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
        if request.validate_only:
            return await self._validate(order)
        row = await self._dispatcher.execute(order)
        if row is None:
            return await self._replay_or_refuse(order)
        wait = (request.wait.ToTimedelta() if request.HasField("wait") else DEFAULT_WAIT).total_seconds()
        return await self._outcome(row, min(wait, call.time_remaining() - ANSWER_MARGIN))

    async def _target(self, id_: str, action: Action, call: Call) -> asyncpg.Record:
        """The connection to preview for. Raises the reasons why there is nothing to preview."""
        async with self._db.workspace(call.workspace_id) as connection:
            halts = await store.list_halts(connection, call.workspace_id)
            if why := refusals.why_disabled(action, halts, self._providers):
                raise refusals.disabled_action(why)
            target: asyncpg.Record | None
            if id_:
                target = await connections.get(connection, call.workspace_id, UUID(id_))
            else:
                target = await connections.get_default(connection, call.workspace_id)
        if target is None:
            raise errors.InvalidRequest([("connection_id", "is empty, and this workspace has no default connection")])
        if target["provider"] != action.provider:
            problem = f"is a connection of {target['provider']!r}; {action.name} needs {action.provider!r}"
            raise errors.InvalidRequest([("connection_id", problem)])
        if not target["enabled"]:
            raise refusals.disabled_connection(target)
        return target

    async def _plan(self, action: Action, parameters: Any, target: asyncpg.Record) -> Plan:
        schemes = [Scheme(key["kind"]) for key in json.loads(target["signing_keys"])]
        provider = self._providers[action.provider]
        try:
            return await provider.plan(action.name, parameters, json.loads(target["configuration"]), schemes)
        except errors.InvalidRequest as error:  # of the connection's fields, which this request does not have
            problems = [("connection_id", problem) for _, problem in error.violations]
            raise errors.InvalidRequest(problems, reason=error.reason) from error

    async def _validate(self, order: Order) -> actions_pb2.Execution:
        async with self._recorder.change(order.call) as (connection, event):
            facts = await self._facts(connection, order)
            event.reason = "VALIDATE_ONLY"
            event.action_type, event.provider = facts["action_type"] or "", facts["provider"] or ""
            if replay := await self._replay(connection, order, facts):
                event.target = f"executions/{replay.id}"
                return replay
            if obstacle := self._obstacle(order, facts):
                raise obstacle
            event.target = f"previews/{order.preview_id}"
        return messages.planned(facts, str(order.preview_id), order.idempotency_key)

    async def _replay_or_refuse(self, order: Order) -> actions_pb2.Execution:
        async with self._db.workspace(order.workspace_id) as connection:
            facts = await self._facts(connection, order)
            if replay := await self._replay(connection, order, facts):
                order.call.target = f"executions/{replay.id}"
                return replay
        raise self._obstacle(order, facts) or errors.Contention("another call holds this preview; try again")

    async def _facts(self, connection: "Connection", order: Order) -> asyncpg.Record:
        return await store.explain(
            connection, order.workspace_id, order.caller, order.preview_id, order.idempotency_key
        )

    async def _replay(
        self, connection: "Connection", order: Order, facts: asyncpg.Record
    ) -> actions_pb2.Execution | None:
        """The execution that there is for this request under this key."""
        if not facts["execution_id"] or not facts["same_request"] or order.digest not in ("", facts["digest"]):
            return None
        earlier = await execution_store.get(connection, order.workspace_id, facts["execution_id"])
        if earlier is None:
            raise errors.Contention("the execution of this idempotency key is being deleted; try again")
        return messages.execution(earlier, replayed=True)

    def _obstacle(self, order: Order, facts: asyncpg.Record) -> errors.RelayError | None:
        return refusals.obstacle(str(order.preview_id), order.digest, facts, self._providers)

    async def _outcome(self, row: asyncpg.Record, patience: float) -> actions_pb2.Execution:
        """The execution after its first attempt, or as it is when `patience` seconds are over. row: as committed."""
        if row["lease_token"]:
            return messages.execution(await self._dispatcher.first_outcome(row, patience) or row)
        workspace_id, until = row["workspace_id"], time.monotonic() + patience
        while row.get("number") is None and row["status"] not in ENDED:
            newer = await self._dispatcher.watching.newer(workspace_id, row, until - time.monotonic())
            if newer is None:
                break
            row = newer
        return messages.execution(row)
