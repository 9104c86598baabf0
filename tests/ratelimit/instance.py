"""An instance that only lives. usage: instance.py DATABASE_URL INTERVAL STALE_AFTER. It prints a line when it does."""

import asyncio
import sys

from relay_grpc.db import Database
from relay_grpc.instances import Instances


async def main(url: str, interval: float, stale_after: float) -> None:
    db = await Database.open(url)
    await Instances(db, interval=interval, stale_after=stale_after).start()
    print("alive", flush=True)
    await asyncio.Event().wait()


asyncio.run(main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))
