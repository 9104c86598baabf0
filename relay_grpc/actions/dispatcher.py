"""Where executions happen: in tasks of this process that no caller's cancellation can touch.

`execute` commits an order and starts its first attempt; `claim` starts what is due, and `rescue` ends the attempts
whose worker stopped. Every attempt runs under a lease; what it records is fenced by the lease's token. Nothing is
leased that does not begin at once.
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

from relay_grpc import errors, failpoints
from relay_grpc.actions import leases, orders
from relay_grpc.actions.attempts import INTERRUPTED, NOT_BEGUN, Attempts, event_of
from relay_grpc.actions.catalogue import Action
from relay_grpc.actions.execution import AttemptResult, Delivery, State, Transition, after, delays
from relay_grpc.actions.health import Health
from relay_grpc.actions.lanes import Lanes
from relay_grpc.actions.watching import Watching
from relay_grpc.db import Database
from relay_grpc.groupcommit import GroupCommit
from relay_grpc.telemetry import Metrics

if TYPE_CHECKING:
    from relay_grpc.db import Connection

log = logging.getLogger(__name__)
BATCH = 50  # rows, each with parameters of up to 256 KiB


class Dispatcher:
    """Runs attempts. One per process; construct it in the event loop, stop it before the database closes.

    actions: what may run here. lease: seconds that an attempt may go unrecorded before another worker takes over;
    longer than any provider's total time. concurrency: the most attempts for one connection at a time. floor: the
    least seconds that follow a timeout or an answer of 429.
    due: set when there may be work that could not be claimed before.
    """

    def __init__(
        self,
        db: Database,
        attempts: Attempts,
        health: Health,
        watching: Watching,
        actions: Sequence[Action],
        metrics: Metrics,
        *,
        lease: float,
        concurrency: int,
        floor: float,
    ) -> None:
        self.watching = watching
        self.due = asyncio.Event()
        self._attempts = attempts
        self._health = health
        self._actions = actions
        self._metrics = metrics
        self._lease = lease
        self._floor = timedelta(seconds=floor)
        self._db = db
        self._lanes = Lanes(concurrency)
        self._leasing = asyncio.Lock()  # from the look at the room for a commit until it is taken
        self._running: dict[tuple[UUID, UUID], asyncio.Task[asyncpg.Record | None]] = {}  # by execution and lease
        self._unanswered: set[UUID] = set()  # executions that may be committed
        self._commits: GroupCommit[orders.Order, asyncpg.Record | None] = GroupCommit(
            "commit", db, metrics, self._commit
        )
        self._completions: GroupCommit[leases.Completion, asyncpg.Record | None] = GroupCommit(
            "complete", db, metrics, self._complete
        )

    async def execute(self, order: orders.Order) -> asyncpg.Record | None:
        """Commits the order and starts its first attempt, if there is room; else it waits for its turn.

        None: it can't be carried out; store.explain tells why.
        """
        try:
            return await self._commits.submit(order)
        except errors.DependencyUnavailable:
            row = await self._recall(order) if order.execution_id in self._unanswered else None
            if row is None:
                raise
            return row
        finally:
            self._unanswered.discard(order.execution_id)

    async def first_outcome(self, row: asyncpg.Record, patience: float) -> asyncpg.Record | None:
        """The execution as the attempt under this lease left it, if it ends within `patience` seconds.

        None: the attempt goes on, or is not made here, or its outcome could not be recorded.
        """
        task = self._running.get((row["id"], row["lease_token"]))
        if task is None:
            return None
        done, _ = await asyncio.wait([task], timeout=max(patience, 0))
        return task.result() if done and not task.cancelled() and not task.exception() else None

    async def claim(self) -> bool:
        """Starts what is due and has room. Whether there may be more of it: a lane may have got room meanwhile."""
        async with self._db.worker() as connection:
            room = self._lanes.room
            found = await leases.find_due(connection, self._actions, room, BATCH) if room.in_all else []
            if not found:
                return False
            async with self._leasing:  # a commit under way has yet to take the room that it saw
                wanted = [row for row in found if self._lanes.try_enter(row["workspace_id"], row["connection_id"])]
            leased_at, lease = time.monotonic(), timedelta(seconds=self._lease)
            try:
                rows = await leases.claim(connection, [row["id"] for row in wanted], uuid4(), lease) if wanted else []
            finally:
                for row in wanted:
                    self._lanes.leave(row["workspace_id"], row["connection_id"])
            for row in rows:
                self._start(row, leased_at)
        return bool(rows)

    async def rescue(self) -> bool:
        """Ends the attempts whose worker is gone: what may be sent again is due again. Whether there may be more."""
        async with self._db.worker() as connection:
            rows = await leases.list_lapsed(connection, BATCH)
        ended = 0
        for row in rows:
            try:
                await self._complete_once(row, INTERRUPTED, self._transition(row, INTERRUPTED), 0)
                ended += 1
            except errors.RelayError:
                raise
            except Exception:
                log.exception("execution %s can't be taken over", row["id"])
            failpoints.reach("rescue.midway")
        return ended > 0 and len(rows) == BATCH

    async def stop(self, grace: float) -> None:
        """Starts nothing more and gives what runs `grace` seconds; the leases of the rest run out."""
        await self._commits.close()
        if self._running:
            await asyncio.wait(self._running.values(), timeout=grace)
        unfinished = list(self._running.values())
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        await self._completions.close()

    async def _commit(self, connection: "Connection", batch: Sequence[orders.Order]) -> Sequence[asyncpg.Record | None]:
        async with self._leasing:
            failpoints.reach("execute.uncommitted")
            lease = timedelta(seconds=self._lease)
            self._unanswered.update(order.execution_id for order in batch)
            leased_at = time.monotonic()
            rows = await orders.commit(connection, batch, self._actions, lease, self._lanes.room)
            failpoints.reach("execute.committed")
            for order in batch:
                row = rows.get(order.execution_id)
                if row is not None:
                    self._committed(order)
                    if row["lease_token"]:
                        self._start(row, leased_at)
                    elif not self._lanes.is_full(row["workspace_id"], row["connection_id"]):
                        self.due.set()
        return [rows.get(order.execution_id) for order in batch]

    async def _recall(self, order: orders.Order) -> asyncpg.Record | None:
        """What was committed though the answer was lost with its connection. None: nothing was."""
        async with self._db.worker() as connection, self._leasing:
            looked_at = time.monotonic()
            row = await leases.get(connection, order.execution_id, timedelta(seconds=self._lease * 2 / 3))
            if row is None:
                return None
            self._committed(order)
            leased = row["lease_token"] == order.lease_token and row["in_time"]
            if leased and not self._lanes.is_full(row["workspace_id"], row["connection_id"]):
                self._start(row, looked_at - self._lease / 3)
        return row

    def _committed(self, order: orders.Order) -> None:
        order.call.recorded = True
        self._metrics.audit_events.labels(order.event.status).inc()

    async def _complete(
        self, connection: "Connection", batch: Sequence[leases.Completion]
    ) -> Sequence[asyncpg.Record | None]:
        rows = await leases.complete(connection, batch)
        return [rows.get(completion.event.id) for completion in batch]

    def _start(self, row: asyncpg.Record, leased_at: float) -> None:
        """leased_at: on time.monotonic(), when the lease cannot have begun yet."""
        self._lanes.enter(row["workspace_id"], row["connection_id"])
        task = asyncio.create_task(self._run(row, leased_at))
        self._running[row["id"], row["lease_token"]] = task
        task.add_done_callback(lambda done: self._ended(row, done))

    def _ended(self, row: asyncpg.Record, task: "asyncio.Task[asyncpg.Record | None]") -> None:
        del self._running[row["id"], row["lease_token"]]
        if self._lanes.is_full(row["workspace_id"], row["connection_id"]):
            self.due.set()
        self._lanes.leave(row["workspace_id"], row["connection_id"])
        if not task.cancelled() and task.exception():
            log.error("an attempt of execution %s broke", row["id"], exc_info=task.exception())

    async def _run(self, row: asyncpg.Record, leased_at: float) -> asyncpg.Record | None:
        """One attempt, recorded. None: another worker has taken over or will."""
        started = time.monotonic()
        failpoints.reach("attempt.claimed")
        result = NOT_BEGUN  # where an attempt, of a third of the lease at most, could outlive it
        if time.monotonic() - leased_at < self._lease * 2 / 3:
            with self._metrics.executions_in_flight.track_inprogress():
                result = await self._attempts.make(row)
        failpoints.reach("attempt.answered")
        completed = await self._record(row, result, started)
        failpoints.reach("attempt.recorded")
        if completed is not None and row["attempt_count"] == 1:
            took = (completed["finished_at"] - completed["created_at"]).total_seconds()
            self._metrics.action_duration.labels(row["provider"], row["action_type"]).observe(took)
        return completed

    async def _record(self, row: asyncpg.Record, result: AttemptResult, started: float) -> asyncpg.Record | None:
        """Writes down how an attempt ended, and what follows. None: the lease was lost."""
        transition = self._transition(row, result)
        if transition.state is State.PENDING:
            failpoints.reach("retry.scheduling")
        completed = None
        while True:  # after the lease too: who holds it is for the database to say, and nobody else may have come yet
            try:
                completed = await self._complete_once(row, result, transition, time.monotonic() - started)
            except (errors.DependencyUnavailable, errors.Contention):
                if time.monotonic() - started < self._lease:
                    await asyncio.sleep(0.5)  # what was delivered is worth remembering: else it is sent again
                    continue
            break
        if completed is None:
            log.warning("the outcome of execution %s came after its lease: %s", row["id"], result.outcome)
        return completed

    async def _complete_once(
        self, row: asyncpg.Record, result: AttemptResult, transition: Transition, took: float
    ) -> asyncpg.Record | None:
        """The execution as it is now; None: the lease was lost. took: seconds."""
        logged = event_of(row, result, took)
        completion = leases.Completion(row["id"], row["lease_token"], result, transition, logged)
        completed = await self._completions.submit(completion)
        if completed is not None:
            self._metrics.attempts.labels(row["provider"], result.outcome).inc()
            self._metrics.audit_events.labels(logged.status).inc()
            if completed["status"] != State.PENDING:
                self._metrics.executions.labels(row["provider"], row["action_type"], completed["status"]).inc()
            self._health.note(row, result)
            self.watching.tell(completed)
        return completed

    def _transition(self, row: asyncpg.Record, result: AttemptResult) -> Transition:
        return after(
            result,
            row["attempt_count"] - row["attempts_before"],
            delivery=Delivery(row["delivery"]),
            delays=delays(json.loads(row["configuration"])),
            floor=self._floor,
            jitter=random.uniform(-1, 1),  # noqa: S311
        )
