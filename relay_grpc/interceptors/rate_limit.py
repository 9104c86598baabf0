"""How much the caller may: every call is charged to its workspace's budgets, and its caller's own, before it runs."""

import math
from typing import Any

from relay_grpc import errors
from relay_grpc.call import Call, Method
from relay_grpc.interceptors.base import Handler, Layer
from relay_grpc.ratelimit.budgets import BUDGETS, HOLDERS, Price, charges, holder_name
from relay_grpc.ratelimit.limiter import Limiter
from relay_grpc.telemetry import Metrics


def rate_limit(
    limiter: Limiter, metrics: Metrics, *, calls_per_minute: int, executions_per_minute: int, shadow: bool
) -> Layer:
    """calls_per_minute, executions_per_minute: a workspace's. shadow: counts and tells, and refuses nothing."""
    counter = metrics.rate_limit_shadowed if shadow else metrics.rate_limited
    refusals = {(budget, holder): counter.labels(budget, holder) for budget in BUDGETS for holder in HOLDERS}
    refused_anyway = (Price("calls", 1, calls_per_minute),)

    def layer(method: Method, handler: Handler) -> Handler:
        both = (
            Price("calls", method.calls, calls_per_minute),
            Price("executions", method.executions, executions_per_minute),
        )
        prices = tuple(price for price in both if price.cost)

        async def limited(call: Call, request: Any) -> Any:
            principal = call.principal
            charged = charges(principal, prices if method.scopes <= principal.scopes else refused_anyway)
            decision = await limiter.spend(charged)
            call.trailing["ratelimit-limit"] = str(decision.limit)
            call.trailing["ratelimit-remaining"] = str(decision.remaining)
            call.trailing["ratelimit-reset"] = str(math.ceil(decision.reset_after))
            if not decision.allowed:
                tightest = charged[decision.tightest]
                refusals[tightest.budget, tightest.holder].inc()
                if not shadow:
                    call.trailing["retry-after"] = str(math.ceil(decision.retry_after))
                    raise errors.RateLimited(
                        subject=holder_name(tightest, principal),
                        quota=tightest.budget,
                        limit=decision.limit,
                        retry_after=decision.retry_after,
                    )
            return await handler(call, request)

        return limited

    return layer
