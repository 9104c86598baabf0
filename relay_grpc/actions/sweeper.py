"""What starts attempts that no call starts: retries that are due, work that found no room, and what a crash left."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from relay_grpc import errors
from relay_grpc.actions.dispatcher import Dispatcher

log = logging.getLogger(__name__)
STOP_SECONDS = 5.0
CANCEL_SECONDS = 1.0


class Sweeper:
    """Looks for work, at intervals and whenever some may be due. One per process; construct it in the event loop.

    interval: seconds.
    """

    def __init__(self, dispatcher: Dispatcher, interval: float) -> None:
        self._dispatcher = dispatcher
        self._interval = interval
        self._stopping = asyncio.Event()
        self._sweeping = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends the look that is under way: what it leases would else wait for the end of its lease."""
        self._stopping.set()
        self._dispatcher.due.set()
        await asyncio.wait([self._sweeping], timeout=STOP_SECONDS)
        self._sweeping.cancel()
        await asyncio.wait([self._sweeping], timeout=CANCEL_SECONDS)  # a database that hangs holds it longer

    async def _run(self) -> None:
        rescued = float("-inf")
        while not self._stopping.is_set():
            self._dispatcher.due.clear()
            if time.monotonic() - rescued >= self._interval:
                while await self._try(self._dispatcher.rescue):
                    pass
                rescued = time.monotonic()
            if await self._try(self._dispatcher.claim):
                continue
            if not self._stopping.is_set():
                await self._wait_for(self._dispatcher.due)

    async def _try(self, work: Callable[[], Awaitable[object]]) -> object:
        """What the work answers; None where it failed, which the next look makes good."""
        try:
            return await work()
        except errors.RelayError as error:
            log.warning("the sweeper waits: %s", error)
            await self._wait_for(self._stopping)
        except Exception:
            log.exception("the sweeper stumbled")
            await self._wait_for(self._stopping)
        return None

    async def _wait_for(self, event: asyncio.Event) -> None:
        """For an interval at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._interval):
                await event.wait()
