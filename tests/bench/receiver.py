"""A receiver that takes every webhook. Ends when its standard input does."""

import asyncio
import sys

from tests.harness import receiving


async def main() -> None:
    async with receiving() as receiver:
        print(receiver.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


asyncio.run(main())
