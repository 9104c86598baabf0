"""Relay on an embedded PostgreSQL with fsync on. usage: relay.py DATA_FOLDER. Ends when its standard input does."""

import asyncio
import sys
from pathlib import Path

from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.schema import migrate
from tests.harness import running, settings_for


async def main(folder: Path, url: str) -> None:
    async with running(url, settings_for(folder, RELAY_SWEEP_INTERVAL="1", RELAY_CONNECTION_CONCURRENCY="64")) as relay:
        print(relay.app.listen, relay.tenant.admin, flush=True)
        await asyncio.to_thread(sys.stdin.read)


with EmbeddedPostgres(Path(sys.argv[1])) as postgres:
    migrate(postgres.url())
    asyncio.run(main(Path(sys.argv[1]), postgres.url()))
