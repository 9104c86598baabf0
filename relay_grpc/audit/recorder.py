"""How events get into the log.

A change and its event share a transaction (`change`). What has no transaction gets one of its own (`write`). All that
tells of one call has one id, so that where it is not known whether a change was committed, Postgres keeps the event
that came first and refuses the other, with its change. What anybody can cause in any number, without a good credential
or beyond a limit, is counted per method, reason, caller and minute, and written as one event when the minute is over.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
from google.protobuf.message import DecodeError

from relay_grpc import errors, failpoints
from relay_grpc.audit import store
from relay_grpc.audit.event import SYSTEM_WORKSPACE, ActorType, Event, Outcome, keyed_hash, of_call
from relay_grpc.audit.redaction import MASK, request_prefix, told_apart_by
from relay_grpc.call import Call
from relay_grpc.db import Database
from relay_grpc.telemetry import Metrics

if TYPE_CHECKING:
    from relay_grpc.db import Connection

log = logging.getLogger(__name__)
MAX_COUNTED = 10_000  # different refusals at one time; more are counted under no caller's name
BATCH = 500  # of them, in one transaction
Refusal = tuple[str, str, str, str, int]  # what is counted together: workspace, action, reason, caller, minute


class Recorder:
    """Writes audit events. One per process; close it."""

    def __init__(self, db: Database, hash_key: bytes, metrics: Metrics) -> None:
        self._db = db
        self._hash_key = hash_key
        self._metrics = metrics
        self._refusals: dict[Refusal, Event] = {}
        self._late: set[asyncio.Task[None]] = set()

    def hash(self, workspace_id: UUID, text: str) -> str:
        """The keyed hash of an idempotency key or of parameters."""
        return keyed_hash(self._hash_key, workspace_id, text.encode())

    def of_call(self, call: Call, status: Outcome = Outcome.SUCCESS, reason: str = "") -> Event:
        """The event of an RPC with what may be told of its request."""
        event = of_call(call, status, reason)
        self._describe(event, call)
        return event

    @asynccontextmanager
    async def change(self, call: Call) -> AsyncIterator[tuple["Connection", Event]]:
        """A transaction in the caller's workspace whose event commits with it. The body fills in the target.

        It may fill in parameters too; else they are the request.
        """
        event = of_call(call)

        def committed() -> None:
            call.recorded = True
            self._metrics.audit_events.labels(event.status).inc()

        async with self._db.workspace(call.workspace_id, committed) as connection:
            yield connection, event
            if not event.params_hash:
                self._describe(event, call)
            failpoints.reach("audit.appending")
            await store.insert(connection, [event])
        failpoints.reach("audit.committed")

    def _describe(self, event: Event, call: Call) -> None:
        """A request that was refused before it was validated is parsed here."""
        try:
            parse = call.method.input_type.FromString
            request = parse(call.request) if isinstance(call.request, bytes) else call.request
            content, event.params_prefix = told_apart_by(request), request_prefix(request)
        except DecodeError:
            content, event.params_prefix = call.request, MASK
        event.params_hash = keyed_hash(self._hash_key, event.workspace_id, content)

    async def write(self, event: Event) -> None:
        """Writes an event in a transaction of its own, to the end even when its caller goes away meanwhile."""
        await asyncio.shield(self.write_later(event))

    def write_later(self, event: Event) -> "asyncio.Task[None]":
        """Writes an event whose call can't wait for it: its caller went away."""
        return self._begin([event])

    def _begin(self, events: Sequence[Event]) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._write(events))
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # logged, and seen where awaited
        return task

    async def _write(self, events: Sequence[Event]) -> None:
        """events: of one workspace. Those whose ids are in the log already are told there."""
        try:
            async with self._db.workspace(events[0].workspace_id) as connection:
                await store.insert(connection, events)
        except asyncpg.UniqueViolationError:
            for event in events if len(events) > 1 else ():
                await self._write([event])
            return
        except errors.RelayError:
            first = events[0]
            told = (len(events), first.action, first.status, first.reason)
            log.error("%d audit events could not be written, the first of them: %s %s %s", *told)
            raise
        for event in events:
            self._metrics.audit_events.labels(event.status).inc()

    def count(self, event: Event) -> None:
        """Counts a refusal with its likes of this minute."""
        key = _counted_as(event)
        if key not in self._refusals and len(self._refusals) >= MAX_COUNTED:
            event = Event(SYSTEM_WORKSPACE, event.action, event.status, event.reason, actor_type=ActorType.UNKNOWN)
            key = _counted_as(event)
        if (counted := self._refusals.setdefault(key, event)) is not event:
            counted.count += 1

    async def flush(self, *, everything: bool = False) -> None:
        """Writes the counted refusals of past minutes, or all of them. Those that can't be written are kept."""
        now = int(time.time() // 60)
        ready = sorted(key for key in self._refusals if everything or key[-1] < now)
        for _, of_workspace in groupby(ready, key=itemgetter(0)):
            keys = list(of_workspace)
            for first in range(0, len(keys), BATCH):
                await self._flush(keys[first : first + BATCH])

    async def _flush(self, keys: Sequence[Refusal]) -> None:
        """keys: of one workspace."""
        events = {key: self._refusals.pop(key) for key in keys}
        try:
            await asyncio.shield(self._begin([*events.values()]))
        except errors.RelayError:
            self._refusals |= events
            raise

    async def close(self) -> None:
        """Writes everything that is still to be written."""
        if self._late:
            await asyncio.wait(self._late)
        try:
            await self.flush(everything=True)
        except errors.RelayError:
            log.error("%d counted refusals could not be written", len(self._refusals))


def _counted_as(event: Event) -> Refusal:
    caller, minute = event.actor_id or event.peer, int(time.time() // 60)
    return str(event.workspace_id), event.action, event.reason, caller, minute
