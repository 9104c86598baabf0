"""What deciding on a limit costs this process: the layer around a handler that does nothing."""

import asyncio
import math
import statistics
import time
from typing import Any
from uuid import uuid4

from rich.table import Table

from relay_grpc.call import Call
from relay_grpc.interceptors.policy import methods
from relay_grpc.interceptors.rate_limit import rate_limit
from relay_grpc.principal import Limits, Principal, PrincipalType
from relay_grpc.ratelimit.limiter import Limiter, LocalLimiter, RedisLimiter
from relay_grpc.telemetry import Metrics
from tests.valkey import running

DECISIONS = 10_000
ROUNDS = 5
PLENTY = 10_000_000
METHOD = methods()["/relay.v1.AuthService/WhoAmI"]
OWN = {"its workspace's": Limits(), "its workspace's and its own": Limits(PLENTY, PLENTY)}


async def decide(limiter: Limiter, metrics: Metrics, concurrency: int, own: Limits) -> float:
    """Microseconds of CPU for one decision."""
    principal = Principal(PrincipalType.API_KEY, "", "key:bench", "", uuid4(), "admin", METHOD.scopes, None, own)

    async def handler(_call: Call, _request: Any) -> None:
        """Nothing."""

    layer = rate_limit(limiter, metrics, calls_per_minute=PLENTY, executions_per_minute=PLENTY, shadow=False)
    limited = layer(METHOD, handler)

    async def caller() -> None:
        call = Call(METHOD, {}, "", "", math.inf, None)  # type: ignore[arg-type]
        call.principal = principal
        for _ in range(DECISIONS // concurrency):
            await limited(call, None)

    started = time.process_time()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return (time.process_time() - started) / DECISIONS * 1e6


async def measure() -> Table:
    metrics, taken = Metrics(), {}
    with running() as valkey:
        redis = RedisLimiter(valkey.url, LocalLimiter(), answer_timeout=10)
        counting: list[tuple[str, Limiter, int]] = [
            ("in this process", LocalLimiter(), 1),
            ("Valkey, one call at a time", redis, 1),
            ("Valkey, 32 at a time", redis, 32),
        ]
        for _ in range(ROUNDS):
            for name, limiter, concurrency in counting:
                for limits, own in OWN.items():
                    cost = await decide(limiter, metrics, concurrency, own)
                    taken.setdefault((name, limits), []).append(cost)
        await redis.close()
    table = Table(title=f"CPU for deciding on a call's limits, us, {ROUNDS} rounds, medians")
    for column in ("counted", *OWN):
        table.add_column(column, justify="right")
    for name, *_ in counting:
        table.add_row(name, *(f"{statistics.median(taken[name, limits]):.1f}" for limits in OWN))
    return table
