"""`relay` with a seeded defect: an Execute is committed when it has been delivered.

A crash in between makes it forget what it did, and do it again under another id when the client asks again.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from relay_grpc import app
from relay_grpc.actions.dispatcher import Dispatcher
from relay_grpc.cli import main

COMMIT_SECONDS = 0.1


class SendingFirst(Dispatcher):
    async def _commit(self, connection: Any, batch: Sequence[Any]) -> Any:
        async with connection.transaction():
            rows = await super()._commit(connection, batch)  # their attempts begin
            await asyncio.sleep(COMMIT_SECONDS)
        return rows


app.Dispatcher = SendingFirst  # type: ignore[misc]

if __name__ == "__main__":
    main()
