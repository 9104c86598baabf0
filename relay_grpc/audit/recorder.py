"""How events get into the log.

A change and its event share a transaction (`change`). What has no transaction gets one of its own (`write`). Refusals
that anybody can cause in any number are counted per method, reason, caller and minute, and written as one event.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import UUID

from relay_grpc import errors, failpoints
from relay_grpc.audit import store
from relay_grpc.audit.event import SYSTEM_WORKSPACE, ActorType, Event, keyed_hash, of_call
from relay_grpc.call import Call
from relay_grpc.db import Database
from relay_grpc.telemetry import Metrics

if TYPE_CHECKING:
    from relay_grpc.db import Connection

log = logging.getLogger(__name__)
MAX_COUNTED = 10_000  # different refusals of one minute; more are counted under no caller's name


class Recorder:
    """Writes audit events. One per process; close it."""

    def __init__(self, db: Database, hash_key: bytes, metrics: Metrics) -> None:
        self._db = db
        self._hash_key = hash_key
        self._metrics = metrics
        self._refusals: dict[tuple[str, str, str, int], Event] = {}
        self._late: set[asyncio.Task[None]] = set()

    def hash(self, workspace_id: UUID, text: str) -> str:
        """The keyed hash of an idempotency key or of parameters."""
        return keyed_hash(self._hash_key, workspace_id, text)

    @asynccontextmanager
    async def change(self, call: Call) -> AsyncIterator[tuple["Connection", Event]]:
        """A transaction in the caller's workspace whose event commits with it. The body fills in the target."""
        event = of_call(call)

        def committed() -> None:
            call.recorded = True
            self._metrics.audit_events.labels(event.status).inc()

        async with self._db.workspace(call.workspace_id, committed) as connection:
            yield connection, event
            failpoints.reach("audit.appending")
            await store.insert(connection, [event])

    async def write(self, event: Event) -> None:
        """Writes an event in a transaction of its own, to the end even when its caller goes away meanwhile."""
        await asyncio.shield(self.write_later(event))

    def write_later(self, event: Event) -> "asyncio.Task[None]":
        """Writes an event whose call can't wait for it: its caller went away."""
        task = asyncio.create_task(self._write(event))
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # logged, and seen where awaited
        return task

    async def _write(self, event: Event) -> None:
        try:
            async with self._db.workspace(event.workspace_id) as connection:
                await store.insert(connection, [event])
        except errors.RelayError:
            log.error("an audit event could not be written: %s %s %s", event.action, event.status, event.reason)
            raise
        self._metrics.audit_events.labels(event.status).inc()

    def count(self, event: Event) -> None:
        """Counts a refusal with its likes of this minute."""
        caller, minute = event.actor_id or event.peer, int(time.time() // 60)
        counted = self._refusals.get((event.action, event.reason, caller, minute))
        if counted is None and len(self._refusals) >= MAX_COUNTED:
            event, caller = Event(SYSTEM_WORKSPACE, event.action, event.status, event.reason), ""
            event.actor_type = ActorType.UNKNOWN
            counted = self._refusals.get((event.action, event.reason, caller, minute))
        if counted is None:
            self._refusals[event.action, event.reason, caller, minute] = event
        else:
            counted.count += 1

    async def flush(self, *, everything: bool = False) -> None:
        """Writes the counted refusals of past minutes, or all of them. Those that can't be written are kept."""
        now = int(time.time() // 60)
        ready = [key for key in self._refusals if everything or key[-1] < now]
        for key in ready:
            event = self._refusals.pop(key)
            try:
                await self.write(event)
            except errors.RelayError:
                self._refusals[key] = event
                raise

    async def close(self) -> None:
        """Writes everything that is still to be written."""
        if self._late:
            await asyncio.wait(self._late)
        try:
            await self.flush(everything=True)
        except errors.RelayError:
            log.error("%d counted refusals could not be written", len(self._refusals))
