"""Where executions happen: in tasks of this process that no caller's cancellation can touch.

`execute` commits an order and starts its first attempt. The sweeper starts the others: retries that are due, and
attempts whose worker stopped. Every attempt runs under a lease; what it records is fenced by the lease's token.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg

from relay_grpc import errors
from relay_grpc.actions import leases
from relay_grpc.actions.catalogue import Action
from relay_grpc.actions.execution import AttemptResult, Job, Outcome, State, after
from relay_grpc.actions.providers import Provider
from relay_grpc.audit import event
from relay_grpc.connections.secrets import Sealed, Undecryptable, Vault
from relay_grpc.db import Database
from relay_grpc.groupcommit import GroupCommit
from relay_grpc.telemetry import Metrics, Tracer

if TYPE_CHECKING:
    from relay_grpc.db import Connection

log = logging.getLogger(__name__)
MAX_RUNNING = 256
SWEEP_BATCH = 50
INTERRUPTED = AttemptResult(
    Outcome.INTERRUPTED, error="the instance that ran it stopped or lost its lease; it may have been delivered"
)


class Dispatcher:
    """Runs attempts. One per process; construct it in the event loop, stop it before the database closes.

    actions: what may run here. lease: how long an attempt may go unrecorded before another worker takes over; longer
    than any provider's total time. sweep_interval: seconds between looks for what is due.
    """

    def __init__(
        self,
        db: Database,
        vault: Vault,
        providers: Sequence[Provider],
        actions: Sequence[Action],
        metrics: Metrics,
        tracer: Tracer,
        *,
        lease: float,
        sweep_interval: float,
    ) -> None:
        self._db = db
        self._vault = vault
        self._providers = {provider.name: provider for provider in providers}
        self._actions = actions
        self._metrics = metrics
        self._tracer = tracer
        self._lease = lease
        self._sweep_interval = sweep_interval
        self._slots = asyncio.Semaphore(MAX_RUNNING)
        self._running: dict[UUID, asyncio.Task[asyncpg.Record | None]] = {}
        self._commits: GroupCommit[leases.Order, asyncpg.Record | None] = GroupCommit(
            "commit", db, metrics, self._commit
        )
        self._completions: GroupCommit[leases.Completion, asyncpg.Record | None] = GroupCommit(
            "complete", db, metrics, self._complete
        )
        self._sweeper = asyncio.create_task(self._sweep())

    async def execute(self, order: leases.Order) -> asyncpg.Record | None:
        """Commits the order and starts its first attempt. None: it can't be carried out; store.explain tells why."""
        return await self._commits.submit(order)

    async def first_outcome(self, execution_id: UUID, patience: float) -> asyncpg.Record | None:
        """The execution as its attempt left it, if it ends within `patience` seconds.

        None: the attempt goes on, or its outcome could not be recorded.
        """
        task = self._running.get(execution_id)
        if task is None:
            return None
        done, _ = await asyncio.wait([task], timeout=max(patience, 0))
        return task.result() if done and not task.cancelled() and not task.exception() else None

    async def stop(self, grace: float) -> None:
        """Starts nothing more and gives what runs `grace` seconds; the leases of the rest run out."""
        self._sweeper.cancel()
        await asyncio.gather(self._sweeper, return_exceptions=True)
        await self._commits.close()
        if self._running:
            await asyncio.wait(self._running.values(), timeout=grace)
        unfinished = list(self._running.values())
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        await self._completions.close()

    async def _commit(
        self, connection: "Connection", orders: Sequence[leases.Order]
    ) -> Sequence[asyncpg.Record | None]:
        rows = await leases.commit(connection, orders, self._actions, timedelta(seconds=self._lease))
        for order in orders:
            row = rows.get(order.execution_id)
            if row is not None:
                order.call.recorded = True
                self._metrics.audit_events.labels(order.event.status).inc()
                self._start(row)
        return [rows.get(order.execution_id) for order in orders]

    async def _complete(
        self, connection: "Connection", completions: Sequence[leases.Completion]
    ) -> Sequence[asyncpg.Record | None]:
        rows = await leases.complete(connection, completions)
        return [rows.get(completion.event.id) for completion in completions]

    def _start(self, row: asyncpg.Record) -> None:
        task = asyncio.create_task(self._run(row))
        self._running[row["id"]] = task
        task.add_done_callback(lambda done: self._ended(row["id"], done))

    def _ended(self, execution_id: UUID, task: "asyncio.Task[asyncpg.Record | None]") -> None:
        if self._running.get(execution_id) is task:
            del self._running[execution_id]
        if not task.cancelled() and task.exception():
            log.error("an attempt of execution %s broke", execution_id, exc_info=task.exception())

    async def _run(self, row: asyncpg.Record) -> asyncpg.Record | None:
        """One attempt, recorded. None: another worker has taken over or will."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._lease / 3):  # enough of the lease is left then to end in time
                await self._slots.acquire()
        except TimeoutError:
            async with self._db.worker() as connection:
                await leases.hand_back(connection, row["id"], row["lease_token"])
            return None
        try:
            with self._metrics.executions_in_flight.track_inprogress():
                result = await self._attempt(row)
        finally:
            self._slots.release()
        completed = await self._record(row, result, started)
        if completed is not None and row["attempt_count"] == 1:
            took = time.monotonic() - started
            self._metrics.action_duration.labels(row["provider"], row["action_type"]).observe(took)
        return completed

    async def _record(self, row: asyncpg.Record, result: AttemptResult, started: float) -> asyncpg.Record | None:
        """Writes down how an attempt ended, and what follows. None: the lease was lost."""
        self._metrics.attempts.labels(row["provider"], result.outcome).inc()
        transition = after(result, row["attempt_count"], random.uniform(-1, 1))  # noqa: S311  # jitter
        logged = _attempt_event(row, result, time.monotonic() - started)
        completion = leases.Completion(row["id"], row["lease_token"], result, transition, logged)
        completed = None
        while time.monotonic() - started < self._lease:
            try:
                completed = await self._completions.submit(completion)
                break
            except (errors.DependencyUnavailable, errors.Contention):
                await asyncio.sleep(0.5)  # what was delivered is worth remembering: without a record it is sent again
        if completed is None:
            log.warning("the outcome of execution %s came after its lease: %s", row["id"], result.outcome)
            return None
        self._metrics.audit_events.labels(logged.status).inc()
        if transition.state is not State.PENDING:
            self._metrics.executions.labels(row["provider"], row["action_type"], transition.state).inc()
        return completed

    async def _attempt(self, row: asyncpg.Record) -> AttemptResult:
        attributes = {"relay.provider": row["provider"], "relay.action": row["action_type"]}
        with self._tracer.client("delivery.attempt", row["traceparent"], attributes) as trace:
            try:
                job = self._job(row, trace.traceparent)
            except Undecryptable as error:
                log.error("execution %s can't be signed: %s", row["id"], error)
                return AttemptResult(Outcome.UNSENDABLE, error="the connection's signing secret can't be decrypted")
            if not job.secrets:
                return AttemptResult(Outcome.UNSENDABLE, error="the connection has no valid signing secret")
            return await self._providers[row["provider"]].execute(job)

    def _job(self, row: asyncpg.Record, traceparent: str) -> Job:
        secrets = tuple(
            self._vault.open(
                Sealed(
                    secret["encryption_key_id"],
                    bytes.fromhex(secret["wrapped_key"]),
                    bytes.fromhex(secret["ciphertext"]),
                ),
                workspace_id=row["workspace_id"],
                connection_id=row["connection_id"],
                secret_id=UUID(secret["id"]),
            )
            for secret in json.loads(row["secrets"] or "[]")
        )
        return Job(
            execution_id=row["id"],
            action=row["action_type"],
            parameters=row["parameters"],
            configuration=json.loads(row["configuration"]),
            secrets=secrets,
            traceparent=traceparent,
        )

    async def _sweep(self) -> None:
        while True:
            try:
                await self._take_over()
                if not await self._claim():
                    await asyncio.sleep(self._sweep_interval)
            except errors.DependencyUnavailable:
                await asyncio.sleep(self._sweep_interval)
            except Exception:
                log.exception("the sweeper stumbled")
                await asyncio.sleep(self._sweep_interval)

    async def _take_over(self) -> None:
        """Ends the attempts whose worker is gone, which makes their executions due again."""
        async with self._db.worker() as connection:
            rows = await leases.list_lapsed(connection, SWEEP_BATCH)
        await asyncio.gather(*(self._record(row, INTERRUPTED, time.monotonic()) for row in rows))

    async def _claim(self) -> bool:
        """Starts what is due, no more than can run at once; whether there may be more."""
        free = min(SWEEP_BATCH, MAX_RUNNING - len(self._running))
        if free <= 0:
            return False
        async with self._db.worker() as connection:
            rows = await leases.claim(connection, uuid4(), timedelta(seconds=self._lease), free)
        for row in rows:
            self._start(row)
        return len(rows) == free


def _attempt_event(row: asyncpg.Record, result: AttemptResult, duration: float) -> event.Event:
    delivered = result.outcome is Outcome.SUCCESS
    return event.Event(
        workspace_id=row["workspace_id"],
        action="delivery.attempt",
        status=event.Outcome.SUCCESS if delivered else event.Outcome.FAILED,
        reason="" if delivered else result.outcome.name,
        target=f"executions/{row['id']}",
        action_type=row["action_type"],
        provider=row["provider"],
        trace_id=row["traceparent"][3:35],
        duration=duration,
    )
