"""The instances of Relay that serve from one database: each of them beats, and knows how many live."""

import asyncio
import logging
import time
from datetime import timedelta

from relay_grpc import errors
from relay_grpc.db import Database
from relay_grpc.ids import uuid7

INTERVAL = 2.0  # seconds between beats
STALE_AFTER = 12.0  # seconds without a beat; with an interval to notice it, a killed instance counts for 15 at most

log = logging.getLogger(__name__)


class Instances:
    """This instance among the others. Start it before it serves, stop it when it no longer does.

    live: how many there are, this one among them. While the database does not answer, as many as there were.
    interval, stale_after: in seconds. Whether another one is stale goes by the database's clock.
    """

    def __init__(self, db: Database, *, interval: float = INTERVAL, stale_after: float = STALE_AFTER) -> None:
        self.live = 1
        self._db = db
        self._interval = interval
        self._stale_after = stale_after
        self._id = uuid7()
        self._beaten_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Beats for the first time, and goes on."""
        await self._try_to_beat()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """The others no longer count this one, at once if the database answers."""
        while self._task is not None and not self._task.done():
            self._task.cancel()  # again, where it met the end of a connection: asyncpg can lose it then
            await asyncio.wait({self._task}, timeout=1)
        try:
            async with self._db.worker() as connection:
                await connection.execute("DELETE FROM instances WHERE id = $1", self._id)
        except errors.RelayError as error:
            log.warning("this instance counts as alive for %.0f s more: %s", self._stale_after, error)

    async def beat(self) -> None:
        """Says that this instance lives, removes those that no longer say so, and counts. Raises RelayError."""
        async with self._db.worker() as connection:
            others = await connection.fetchval(
                """
                WITH stale AS (
                  DELETE FROM instances WHERE id IN (
                    SELECT id FROM instances WHERE seen_at < now() - $2::interval AND id <> $1
                       FOR UPDATE SKIP LOCKED)  -- another instance removes it, or it beats again
                ), beat AS (
                  INSERT INTO instances (id) VALUES ($1) ON CONFLICT (id) DO UPDATE SET seen_at = now()
                )
                SELECT count(*) FROM instances WHERE seen_at >= now() - $2::interval AND id <> $1
                """,
                self._id,
                timedelta(seconds=self._stale_after),
            )
        now = time.monotonic()
        late, self._beaten_at = now - self._beaten_at > self._stale_after - self._interval, now
        # Where this instance could not beat, neither could the others: they get an interval to catch up.
        self.live = max(self.live, others + 1) if late else others + 1

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._try_to_beat()

    async def _try_to_beat(self) -> None:
        try:
            await self.beat()
        except errors.RelayError:  # health tells of it
            log.debug("no heartbeat: %d instances are believed to live", self.live)
        except Exception:
            log.exception("the heartbeat stumbled")
