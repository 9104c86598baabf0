"""Spending through a limiter, as the tests of this folder do it."""

import asyncio
from uuid import uuid4

from relay_grpc.ratelimit.limiter import Limiter, LocalLimiter, RedisLimiter
from relay_grpc.ratelimit.window import Charge, Decision, Window
from relay_grpc.settings import Settings

INSTANCES = 4
REDIS_TIMEOUT: float = Settings.model_fields["redis_timeout"].default  # seconds


def new_subject() -> str:
    return f"{{{uuid4()}}}:executions"


def charge(subject: str, cost: int, limit: int) -> Charge:
    return Charge(subject, cost, limit, "executions", "workspace")


async def take(limiter: Limiter, subject: str, cost: int, limit: int) -> Decision:
    """Spends from one budget alone."""
    return await limiter.spend([charge(subject, cost, limit)])


async def admitted(calls: int, subject: str, limit: int, *limiters: Limiter) -> int:
    """Makes the calls at once, in turns on each limiter."""
    spending = [take(limiters[i % len(limiters)], subject, 1, limit) for i in range(calls)]
    return sum(decision.allowed for decision in await asyncio.gather(*spending))


async def connected(url: str) -> RedisLimiter:
    """A limiter that is patient, for a machine with other things to do may hold a server up for 50 ms."""
    limiter = RedisLimiter(url, LocalLimiter(lambda: INSTANCES), answer_timeout=10)
    await until(limiter, degraded=False)
    return limiter


async def until(limiter: RedisLimiter, *, degraded: bool) -> None:
    async with asyncio.timeout(10):
        while True:
            await take(limiter, new_subject(), 0, 1)
            if limiter.degraded == degraded:
                return
            await asyncio.sleep(0.01)


def as_kept(window: Window) -> bytes:
    """What Redis keeps of a window."""
    return b"%d %d %d" % window
