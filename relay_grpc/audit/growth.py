"""Who waits for a log to grow: one look per tick for all of them."""

import asyncio
import logging
from uuid import UUID

from relay_grpc import errors
from relay_grpc.audit import tree_store
from relay_grpc.db import Database

log = logging.getLogger(__name__)
TICK = 0.5  # seconds


class Growth:
    """Tells how long logs are. One per process; construct it in the event loop, and stop it."""

    def __init__(self, db: Database, tick: float = TICK) -> None:
        self._db = db
        self._tick = tick
        self._waiting: dict[asyncio.Future[int], tuple[UUID, int]] = {}  # the workspace, and the size that is known
        self._wanted = asyncio.Event()
        self.stopped = False
        self._looking = asyncio.create_task(self._run())

    async def beyond(self, workspace_id: UUID, size: int, patience: float) -> int | None:
        """The log's size, once it is larger than this.

        None: it was not after `patience` seconds, or when this process was told to stop.
        """
        if self.stopped:
            return None
        grown: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[grown] = workspace_id, size
        self._wanted.set()
        try:
            await asyncio.wait([grown], timeout=patience)
        finally:
            del self._waiting[grown]
        return grown.result() if grown.done() and not self.stopped else None

    async def stop(self) -> None:
        """Lets everybody go who waits."""
        self.stopped = True  # for a cancellation that meets the end of a connection: asyncpg can lose it
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)
        for grown in self._waiting:
            if not grown.done():
                grown.set_result(0)

    async def _run(self) -> None:
        while not self.stopped:
            await self._wanted.wait()
            await asyncio.sleep(self._tick)
            if not self._waiting:
                self._wanted.clear()
                continue
            try:
                async with self._db.worker() as connection:
                    asked = {workspace_id for workspace_id, _ in self._waiting.values()}
                    newest = await tree_store.newest_checkpoints(connection, asked)
            except errors.RelayError:
                continue  # the next look will tell
            except Exception:
                log.exception("the look at the logs' growth stumbled")
                continue
            for grown, (workspace_id, known) in self._waiting.items():
                row = newest.get(workspace_id)
                if row is not None and row["tree_size"] > known and not grown.done():
                    grown.set_result(row["tree_size"])
