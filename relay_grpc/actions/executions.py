"""The RPCs of ActionsService about executions that there are: looking at them, and changing what becomes of them."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
from relay.v1 import actions_pb2

from relay_grpc import errors
from relay_grpc.actions import execution_store, messages, refusals, store
from relay_grpc.actions.catalogue import find
from relay_grpc.actions.dispatcher import Dispatcher
from relay_grpc.actions.execution import ENDED, Delivery, State
from relay_grpc.audit import reading
from relay_grpc.audit.event import Event
from relay_grpc.audit.recorder import Recorder
from relay_grpc.call import Call
from relay_grpc.db import Database
from relay_grpc.paging import page_of

if TYPE_CHECKING:
    from relay_grpc.db import Connection

MAX_EVENTS = 200  # of an execution
RECHECK_SECONDS = 5.0  # at most, between looks at the credential of a watch


class Executions:
    """runs: the providers whose actions this server executes."""

    def __init__(self, db: Database, recorder: Recorder, dispatcher: Dispatcher, runs: frozenset[str]) -> None:
        self._db = db
        self._recorder = recorder
        self._dispatcher = dispatcher
        self._runs = runs

    async def GetExecution(self, request: Any, call: Call) -> actions_pb2.Execution:
        async with self._db.workspace(call.workspace_id) as connection:
            row = await execution_store.get(connection, call.workspace_id, UUID(request.id))
            if row is None:
                raise errors.NotFound("execution", request.id)
            targets = [f"executions/{row['id']}", f"previews/{row['preview_id']}"]
            logged = await reading.about(connection, call.workspace_id, targets, row["preview_id"], MAX_EVENTS)
        return messages.execution(row, events=map(messages.logged_event, logged))

    async def ListExecutions(self, request: Any, call: Call) -> actions_pb2.ListExecutionsResponse:
        page = page_of(request, call, UUID)
        async with self._db.workspace(call.workspace_id) as connection:
            rows = await execution_store.list_(
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
        await self._get(request.execution_id, call)
        async with self._db.workspace(call.workspace_id) as connection:
            rows = await execution_store.list_attempts(
                connection, call.workspace_id, UUID(request.execution_id), after=page.cursor or 0, limit=page.fetch
            )
        return page.answer(actions_pb2.ListAttemptsResponse, "attempts", rows, messages.attempt, cursor="number")

    async def WatchExecution(self, request: Any, call: Call) -> AsyncIterator[actions_pb2.Execution]:
        watching = self._dispatcher.watching
        row = await self._get(request.id, call)
        yield messages.execution(row)
        while row["status"] not in ENDED:
            newer = await watching.newer(call.workspace_id, row, RECHECK_SECONDS)
            await call.recheck()
            if newer is not None:
                row = newer
                yield messages.execution(row)
            elif watching.stopped:
                raise errors.Overloaded("this instance is stopping; watch again")

    async def CancelExecution(self, request: Any, call: Call) -> actions_pb2.Execution:
        async with self._recorder.change(call) as (connection, event):
            row = await self._lock(connection, request.id, call, event)
            if row["status"] not in (State.PENDING, State.EXECUTING):
                raise _wrong_state(row, "cancelled")
            changed = await execution_store.cancel(connection, call.workspace_id, row["id"])
        return self._changed(changed)

    async def ResendExecution(self, request: Any, call: Call) -> actions_pb2.Execution:
        async with self._recorder.change(call) as (connection, event):
            row = await self._lock(connection, request.id, call, event)
            once = row["delivery"] == Delivery.AT_MOST_ONCE
            if row["status"] not in ENDED or (once and row["status"] == State.SUCCESS):
                raise _wrong_state(row, "sent again")
            halts = await store.list_halts(connection, call.workspace_id)
            if why := refusals.why_disabled(find(row["action_type"]), halts, self._runs):
                raise refusals.disabled_action(why)
            if not row["enabled"]:
                raise refusals.disabled_connection(row)
            changed = await execution_store.resend(connection, call.workspace_id, row["id"])
        self._dispatcher.due.set()
        return self._changed(changed)

    async def ReconcileExecution(self, request: Any, call: Call) -> actions_pb2.Execution:
        state = messages.state_word(request.state)
        async with self._recorder.change(call) as (connection, event):
            row = await self._lock(connection, request.id, call, event)
            if row["status"] != State.UNKNOWN:
                raise _wrong_state(row, "settled")
            changed = await execution_store.reconcile(connection, call.workspace_id, row["id"], state)
            event.reason, event.note = state.upper(), request.reason
        return self._changed(changed)

    async def _get(self, id_: str, call: Call) -> asyncpg.Record:
        async with self._db.workspace(call.workspace_id) as connection:
            row = await execution_store.get(connection, call.workspace_id, UUID(id_))
        if row is None:
            raise errors.NotFound("execution", id_)
        return row

    async def _lock(self, connection: "Connection", id_: str, call: Call, event: Event) -> asyncpg.Record:
        """The execution to change, which nobody else changes meanwhile."""
        event.target = call.target = f"executions/{id_}"
        row = await execution_store.lock(connection, call.workspace_id, UUID(id_))
        if row is None:
            raise errors.NotFound("execution", id_)
        event.action_type, event.provider = row["action_type"], row["provider"]
        return row

    def _changed(self, row: asyncpg.Record) -> actions_pb2.Execution:
        self._dispatcher.watching.tell(row)
        return messages.execution(row)


def _wrong_state(row: asyncpg.Record, wanted: str) -> errors.FailedPrecondition:
    state = row["status"]
    return errors.FailedPrecondition(
        f"an execution that is {state} can't be {wanted}",
        reason="EXECUTION_STATE",
        metadata={"state": state.upper()},
    )


def _number(text: str) -> int:
    number = int(text)
    if number not in range(2**31):
        raise ValueError("no column holds this number")
    return number
