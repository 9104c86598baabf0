"""Group commit: whatever arrived while the last statement ran goes out together in the next one.

There is no timer. Alone, an item goes out at once; under load batches form by themselves: 2 to 5 times
the throughput of a transaction each.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from relay_grpc import errors
from relay_grpc.db import Database, is_lost, translated
from relay_grpc.telemetry import Metrics

if TYPE_CHECKING:
    from relay_grpc.db import Connection

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_BATCH = 256
CLOSE_SECONDS = 5.0


class GroupCommit(Generic[Item, Result]):
    """One flusher on one kept connection. flush: one statement over all items, one result each, in their order.

    A batch that fails for one item's sake is done again item by item, so flush must change nothing when it raises.
    """

    def __init__(
        self,
        name: str,
        db: Database,
        metrics: Metrics,
        flush: Callable[["Connection", Sequence[Item]], Awaitable[Sequence[Result]]],
    ) -> None:
        self._db = db
        self._flush = flush
        self._observe_size = metrics.group_commit_size.labels(name).observe
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._flusher = asyncio.create_task(self._run())

    async def submit(self, item: Item) -> Result:
        """The item's result, once it is committed.

        Cancelled before the item is on its way, it takes the item back: nothing happens. Cancelled later, it waits for
        the end all the same, so that whoever cancelled can tell what was done.
        """
        if self._flusher.done():
            raise errors.Overloaded("this instance is stopping; try again")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        entry = (item, future)
        self._waiting.append(entry)
        self._idle.clear()
        self._arrived.set()
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            elif not future.done():
                await asyncio.wait([future])
            if future.done() and not future.cancelled():
                future.exception()  # seen: nobody else will look
            raise

    async def close(self) -> None:
        """Lets what has arrived go out first, for at most CLOSE_SECONDS."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._idle.wait()
        except TimeoutError:
            pass
        self._closed = True  # for a cancellation that meets the end of a connection: asyncpg can lose it
        self._flusher.cancel()
        await asyncio.gather(self._flusher, return_exceptions=True)
        self._refuse_waiting(errors.Overloaded("this instance is stopping; try again"))

    async def _run(self) -> None:
        while not self._closed:
            await self._arrived.wait()
            try:
                async with self._db.worker() as connection:
                    while not (self._closed or is_lost(connection)):
                        await self._go_out(connection)
                        if not self._waiting:
                            self._idle.set()
                        await self._arrived.wait()
            except errors.DependencyUnavailable as error:
                self._refuse_waiting(error)

    def _refuse_waiting(self, error: errors.RelayError) -> None:
        while self._waiting:
            self._waiting.popleft()[1].set_exception(error)
        self._arrived.clear()
        self._idle.set()

    async def _go_out(self, connection: "Connection") -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
        if not self._waiting:
            self._arrived.clear()
        if not batch:
            return  # its caller took it back
        self._observe_size(len(batch))
        try:
            try:
                await self._attempt(connection, batch)
            except errors.DependencyUnavailable:
                raise
            except Exception:
                if len(batch) == 1:
                    raise
                for entry in batch:
                    await self._alone(connection, entry)
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError)
            told = errors.Overloaded("this instance is stopping; try again") if stopped else error
            for _, future in batch:
                if not future.done():
                    future.set_exception(told)
            if stopped or isinstance(error, errors.DependencyUnavailable):
                raise  # the connection is not worth keeping

    async def _alone(self, connection: "Connection", entry: tuple[Item, "asyncio.Future[Result]"]) -> None:
        try:
            await self._attempt(connection, [entry])
        except errors.DependencyUnavailable:
            raise
        except Exception as error:
            entry[1].set_exception(error)

    async def _attempt(self, connection: "Connection", batch: Sequence[tuple[Item, "asyncio.Future[Result]"]]) -> None:
        with translated():
            results = await self._flush(connection, [item for item, _ in batch])
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
