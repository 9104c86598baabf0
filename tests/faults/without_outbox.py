"""`relay` with a seeded defect: executions are recorded as done at once, and their deliveries wait in memory.

A crash loses what waits.
"""

import asyncio
from typing import Any

from relay_grpc import app
from relay_grpc.actions.dispatcher import Dispatcher
from relay_grpc.cli import main

MEMORY_SECONDS = 0.3
memory: list[asyncio.Task[None]] = []


class WithoutOutbox(Dispatcher):
    def _start(self, row: Any, leased_at: float) -> None:
        memory.append(asyncio.create_task(self._deliver_later(row)))

    async def _deliver_later(self, row: Any) -> None:
        async with self._db.worker() as connection:
            await connection.execute(
                """
                UPDATE action_executions SET status = 'success', lease_token = NULL, lease_until = NULL,
                       completed_at = now() WHERE id = $1
                """,
                row["id"],
            )
        await asyncio.sleep(MEMORY_SECONDS)
        await self._attempts.make(row)


app.Dispatcher = WithoutOutbox  # type: ignore[misc]

if __name__ == "__main__":
    main()
