"""Who waits for an execution to change: one look per tick for all of them, and none where this process changed it."""

import asyncio
import logging
from uuid import UUID

import asyncpg

from relay_grpc import errors
from relay_grpc.actions import execution_store, leases
from relay_grpc.db import Database

log = logging.getLogger(__name__)
_Change = asyncio.Future[asyncpg.Record | None]  # the execution as it is now; None: whoever waits is to look
TICK = 0.5  # seconds within which a change by another instance is noticed


class Watching:
    """Tells of changes. One per process; construct it in the event loop, and stop it."""

    def __init__(self, db: Database, tick: float = TICK) -> None:
        self._db = db
        self._tick = tick
        self._waiting: dict[UUID, dict[_Change, int]] = {}  # by execution: who waits, and what revision they know
        self._wanted = asyncio.Event()
        self.stopped = False
        self._looking = asyncio.create_task(self._run())

    async def newer(self, workspace_id: UUID, row: asyncpg.Record, patience: float) -> asyncpg.Record | None:
        """The execution, once it is no longer as in this row. Raises NotFound where it is there no more.

        None: it still was so after `patience` seconds, or when this process was told to stop.
        """
        if self.stopped or patience <= 0:
            return None
        change: _Change = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(row["id"], {})
        waiting[change] = row["revision"]
        self._wanted.set()
        try:
            await asyncio.wait([change], timeout=patience)
        finally:
            del waiting[change]
            if not waiting and self._waiting.get(row["id"]) is waiting:
                del self._waiting[row["id"]]
        if not change.done() or self.stopped:
            return None
        return change.result() or await self._read(workspace_id, row["id"])

    def tell(self, row: asyncpg.Record) -> None:
        """This process has changed the execution, which is now as in this row, with its last attempt."""
        for change, known in self._waiting.get(row["id"], {}).items():
            if row["revision"] > known and not change.done():
                change.set_result(row)

    async def stop(self) -> None:
        """Lets everybody go who waits."""
        self.stopped = True  # for a cancellation that meets the end of a connection: asyncpg can lose it
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)
        for execution_id in self._waiting:
            self._let_look(execution_id, None)

    async def _read(self, workspace_id: UUID, id_: UUID) -> asyncpg.Record:
        async with self._db.workspace(workspace_id) as connection:
            row = await execution_store.get(connection, workspace_id, id_)
        if row is None:
            raise errors.NotFound("execution", str(id_))
        return row

    def _let_look(self, execution_id: UUID, revision: int | None) -> None:
        """None: the execution is there no more."""
        for change, known in self._waiting[execution_id].items():
            if (revision is None or revision > known) and not change.done():
                change.set_result(None)

    async def _run(self) -> None:
        while not self.stopped:
            await self._wanted.wait()
            await asyncio.sleep(self._tick)
            asked = list(self._waiting)
            if not asked:
                self._wanted.clear()
                continue
            try:
                async with self._db.worker() as connection:
                    revisions = await leases.revisions(connection, asked)
            except errors.RelayError:
                continue  # the next look will tell
            except Exception:
                log.exception("the watch stumbled")
                continue
            for execution_id in self._waiting.keys() & asked:
                self._let_look(execution_id, revisions.get(execution_id))
