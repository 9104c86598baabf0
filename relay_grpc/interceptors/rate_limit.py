"""How much the caller may: every call is charged to its workspace's budgets before it runs."""

import math
from typing import Any

from relay_grpc import errors
from relay_grpc.call import Call, Method
from relay_grpc.interceptors.base import Handler, Layer
from relay_grpc.ratelimit.limiter import Limiter
from relay_grpc.telemetry import Metrics


def rate_limit(limiter: Limiter, metrics: Metrics, *, calls_per_minute: int, executions_per_minute: int) -> Layer:
    def layer(method: Method, handler: Handler) -> Handler:
        charges = [
            (budget, cost, limit, metrics.rate_limited.labels(budget))
            for budget, cost, limit in (
                ("calls", method.calls, calls_per_minute),
                ("executions", method.executions, executions_per_minute),
            )
            if cost
        ]

        async def limited(call: Call, request: Any) -> Any:
            for budget, cost, limit, refused in charges:
                decision = await limiter.spend(f"{budget}:{call.workspace_id}", cost, limit)
                call.trailing["ratelimit-limit"] = str(decision.limit)
                call.trailing["ratelimit-remaining"] = str(decision.remaining)
                call.trailing["ratelimit-reset"] = str(math.ceil(decision.reset_after))
                if not decision.allowed:
                    refused.inc()
                    call.trailing["retry-after"] = str(math.ceil(decision.retry_after))
                    raise errors.RateLimited(
                        subject=f"workspace {call.workspace_id}",
                        quota=budget,
                        limit=decision.limit,
                        retry_after=decision.retry_after,
                    )
            return await handler(call, request)

        return limited

    return layer
