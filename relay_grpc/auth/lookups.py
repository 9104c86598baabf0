"""Who calls, as Postgres has it, in batches: whatever was asked while the last query ran goes out in the next one."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from relay_grpc import errors
from relay_grpc.db import Database

if TYPE_CHECKING:
    from relay_grpc.db import Connection

MAX_BATCH = 256
Name = TypeVar("Name", bound=Hashable)
Row = TypeVar("Row")


class Found(NamedTuple, Generic[Row]):
    """row: None where there is none of this name. read_at: time.monotonic() before the query."""

    row: Row | None
    read_at: float


class Lookups(Generic[Name, Row]):
    """One query at a time, and so one connection, however many callers come at once. One per process; close it.

    read: from names to the rows of those that there are.
    """

    def __init__(
        self, db: Database, read: Callable[["Connection", Collection[Name]], Awaitable[Mapping[Name, Row]]]
    ) -> None:
        self._db = db
        self._read = read
        self._waiting: dict[Name, asyncio.Future[Found[Row]]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def find(self, name: Name) -> Found[Row]:
        """The row, as it is at some moment after this call. Raises DependencyUnavailable."""
        future = self._waiting.get(name)
        if future is None:
            future = self._waiting[name] = asyncio.get_running_loop().create_future()
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._run())
        return await asyncio.shield(future)

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _run(self) -> None:
        batch: dict[Name, asyncio.Future[Found[Row]]] = {}
        try:
            while self._waiting:
                batch = {name: self._waiting.pop(name) for name in [*islice(self._waiting, MAX_BATCH)]}
                async with self._db.anyone() as connection:
                    read_at = time.monotonic()
                    rows = await self._read(connection, batch)
                for name, future in batch.items():
                    future.set_result(Found(rows.get(name), read_at))
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError)
            self._refuse(batch, errors.Overloaded("this instance is stopping; try again") if stopped else error)
            if stopped:
                raise

    def _refuse(self, batch: dict[Name, "asyncio.Future[Found[Row]]"], error: BaseException) -> None:
        """Those who came meanwhile too: they would wait as long for the same answer."""
        waiting, self._waiting = self._waiting, {}
        for future in (*batch.values(), *waiting.values()):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: its callers may have gone
