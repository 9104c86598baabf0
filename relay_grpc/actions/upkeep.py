"""What every instance does for executions besides making them: recoveries go on, what is old goes, lateness is told.

Any number of instances do it side by side; each step is a short transaction, after which a crash loses nothing.
"""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from relay_grpc import errors
from relay_grpc.actions import recovery_store, retention
from relay_grpc.actions.catalogue import CATALOGUE
from relay_grpc.actions.leases import READY
from relay_grpc.audit.event import Outcome
from relay_grpc.db import Database
from relay_grpc.jobs import Jobs
from relay_grpc.telemetry import Metrics

if TYPE_CHECKING:
    from relay_grpc.db import Connection

RECOVERIES_SECONDS = 1.0
ROUNDS = 50  # batches of each recovery, before what was held up is looked at again
RETENTION_SECONDS = 60.0
LATENESS_SECONDS = 5.0
UNUSED_PREVIEWS = timedelta(days=1)  # what they are kept for after they expired, for whoever looks why
_ACTIONS = [action.name for action in CATALOGUE]


class Upkeep:
    """One per process. Start it, and stop it.

    retention: how long executions that ended are kept.
    """

    def __init__(self, db: Database, metrics: Metrics, *, retention: timedelta) -> None:
        self._db = db
        self._metrics = metrics
        self._retention = retention
        self._jobs = Jobs(
            {
                "recoveries": (RECOVERIES_SECONDS, self.recover),
                "retention": (RETENTION_SECONDS, self.retain),
                "the look at lateness": (LATENESS_SECONDS, self._tell_lateness),
            }
        )

    def start(self) -> None:
        self._jobs.start()

    async def stop(self) -> None:
        await self._jobs.stop()

    async def recover(self) -> None:
        """Advances all recoveries in turns, by ROUNDS batches at most."""
        left: set[UUID] = set()
        for _ in range(ROUNDS):
            async with self._db.worker() as connection:
                ids = [id_ for id_ in await recovery_store.under_way(connection) if id_ not in left]
            if not ids:
                return
            left.update([id_ for id_ in ids if not await self._advance(id_)])

    async def _advance(self, id_: UUID) -> bool:
        """Whether there may be more of it to do now."""
        try:
            async with self._db.worker() as connection:
                recovery = await recovery_store.advance(connection, id_, _ACTIONS)
        except errors.Contention:  # somebody holds what is next in it: the others need not wait for that
            return False
        if recovery is None:
            return False
        if recovery["completed_at"]:
            self._metrics.audit_events.labels(Outcome.SUCCESS).inc()
        return not recovery["completed_at"]

    async def retain(self) -> None:
        """Deletes what has been kept long enough."""
        await self._delete(retention.delete_executions, self._retention)
        await self._delete(retention.delete_unused_previews, UNUSED_PREVIEWS)
        await self._delete(retention.delete_recoveries, self._retention)

    async def _delete(self, delete: Callable[["Connection", timedelta], Awaitable[int]], age: timedelta) -> None:
        deleted = retention.BATCH
        while deleted == retention.BATCH:
            async with self._db.worker() as connection:  # given back in between: others need it too
                deleted = await delete(connection, age)

    async def _tell_lateness(self) -> None:
        async with self._db.worker() as connection:
            self._metrics.oldest_due.set(await _oldest_due(connection))


async def _oldest_due(connection: "Connection") -> float:
    """Seconds since the earliest time at which an execution was due that nothing holds back; 0: none is late."""
    seconds: float = await connection.fetchval(
        f"""
        WITH RECURSIVE {READY}
        SELECT coalesce(extract(epoch FROM now() - min(next_attempt_at)), 0)::float8 FROM ready
        """,  # noqa: S608  # the names are ours
        _ACTIONS,
    )
    return seconds
