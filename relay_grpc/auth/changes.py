"""Word of changes: whether what was read of a workspace a while ago still holds.

Whoever changes keys, roles or limits, Postgres tells every instance of which workspace they were, when the change
commits. While nobody listens, because the connection is lost or frozen, changes are missed: readers believe nothing for
longer than a few seconds anyway, and what was read before the connection was back holds no more.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from contextlib import suppress
from uuid import UUID

from relay_grpc.db import Database
from relay_grpc.telemetry import Metrics

log = logging.getLogger(__name__)
CHANNEL = "relay_changes"  # of the triggers in migration 0002; the payload is a workspace id
PING_INTERVAL = 2.0  # seconds after which a connection that froze is found out, and
PING_TIMEOUT = 2.0  # seconds that it has to answer
RECONNECT_INTERVAL = 0.5  # seconds
MAX_WORKSPACES = 10_000  # whose latest change is known; of more, the floor is


class Changes:
    """Hears of changes from all instances. One per process; construct it in a running event loop, and close it."""

    def __init__(self, db: Database, metrics: Metrics) -> None:
        self._db = db
        self._listening = metrics.changes_listening
        self._is_lost = False
        self._heard: OrderedDict[UUID, float] = OrderedDict()  # the latest change on time.monotonic(), oldest first
        self._floor = time.monotonic()  # nothing that was read before it holds
        self._listener = asyncio.create_task(self._run())

    def hold(self, workspace_id: UUID, read_at: float) -> bool:
        """Whether no change of this workspace was heard of since `read_at`: time.monotonic() before a read of it.

        Word of a change can be late or lost: believe what was read for some seconds only.
        """
        return read_at > self._heard.get(workspace_id, self._floor)

    def heard(self, workspace_id: UUID) -> None:
        """What was read of this workspace until now holds no more. For this process's own changes, which can't wait."""
        self._heard[workspace_id] = time.monotonic()
        self._heard.move_to_end(workspace_id)
        if len(self._heard) > MAX_WORKSPACES:
            _, self._floor = self._heard.popitem(last=False)

    async def close(self) -> None:
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)

    def _anything_changed(self) -> None:
        self._heard.clear()
        self._floor = time.monotonic()

    def _notified(self, payload: str) -> None:
        try:
            self.heard(UUID(payload))
        except ValueError:  # anybody with a connection may notify; it costs reading anew
            self._anything_changed()

    async def _run(self) -> None:
        while True:
            try:
                await self._listen()
            except Exception as error:  # whatever it is: it is better to try again than to be deaf for good
                if not self._is_lost:
                    log.warning("changes by other instances are noticed late: %r", error.__cause__ or error)
                self._is_lost = True
            await asyncio.sleep(RECONNECT_INTERVAL)

    async def _listen(self) -> None:
        """Listens until the connection fails, which it raises."""
        lost = asyncio.Event()
        async with self._db.listening(CHANNEL, self._notified, lost.set) as connection:
            self._anything_changed()  # what changed before this moment was not heard
            self._listening.set(1)
            if self._is_lost:
                log.info("changes by other instances are noticed at once again")
            self._is_lost = False
            try:
                while True:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(lost.wait(), PING_INTERVAL)
                    await connection.execute("SELECT", timeout=PING_TIMEOUT)
            finally:
                self._listening.set(0)
