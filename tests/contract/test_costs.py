"""What calls cost: every method its policy's units of the right budget, refused once that is spent."""

import math
from dataclasses import replace
from typing import Any

import pytest
from google.rpc import error_details_pb2

from relay_grpc import errors
from relay_grpc.call import Call, Method
from relay_grpc.interceptors.rate_limit import rate_limit
from relay_grpc.principal import Principal, PrincipalType
from relay_grpc.ratelimit.limiter import LocalLimiter
from relay_grpc.telemetry import Metrics
from tests.contract.conftest import LIMIT
from tests.contract.requests import fitting
from tests.harness import Relay
from tests.rpc.wire import METHODS, Wire, wired


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
async def test_a_call_is_charged_its_cost_and_told_what_is_left(
    relay: Relay, wire: Wire, spent: Any, method: Method
) -> None:
    answer = await wire.call(method, fitting(method.input_type.DESCRIPTOR))
    assert await spent() == (method.calls, method.executions)
    budget = "executions" if method.executions else "calls"
    decision = await relay.app.limiter.spend(f"{budget}:{relay.tenant.workspace_id}", 0, LIMIT)
    assert answer.trailing["ratelimit-limit"] == str(LIMIT)
    assert answer.trailing["ratelimit-remaining"] == str(decision.remaining)
    assert answer.trailing["ratelimit-reset"] == str(math.ceil(decision.reset_after))
    assert "retry-after" not in answer.trailing


@pytest.mark.usefixtures("spent")  # the time stands still
async def test_a_spent_budget_refuses_every_method_and_counts_the_refusals(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    for budget in ("calls", "executions"):
        subject = f"{budget}:{tenant.workspace_id}"
        left = (await relay.app.limiter.spend(subject, 0, LIMIT)).remaining
        await relay.app.limiter.spend(subject, left, LIMIT)
    async with wired(relay, tenant.admin) as wire:
        for method in METHODS.values():
            for _ in range(2):
                answer = await wire.call(method)
                assert (answer.code, answer.reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")
            budget = "executions" if method.executions else "calls"
            assert answer.trailing["ratelimit-remaining"] == "0"
            (violation,) = answer.detail(error_details_pb2.QuotaFailure).violations
            assert (violation.quota_metric, violation.quota_value) == (budget, LIMIT)
            assert str(tenant.workspace_id) in violation.subject
            delay = answer.detail(error_details_pb2.RetryInfo).retry_delay.ToTimedelta().total_seconds()
            assert 0 < delay <= 120
            assert delay <= int(answer.trailing["retry-after"]) < delay + 1
    await relay.app.recorder.flush(everything=True)
    rows = await relay.sql(
        "SELECT action, sum(count) FROM audit_logs WHERE workspace_id = $1 AND status = 'denied' "
        "AND reason = 'RATE_LIMITED' AND actor_type = 'api_key' GROUP BY action",
        tenant.workspace_id,
    )
    assert dict(map(tuple, rows)) == dict.fromkeys(METHODS, 2)


async def test_a_method_may_cost_several_units_of_both_budgets(relay: Relay) -> None:
    limiter = LocalLimiter(clock=lambda: 43_200.0)
    layer = rate_limit(limiter, Metrics(), calls_per_minute=100, executions_per_minute=5)
    method = replace(METHODS["AuthService.WhoAmI"], calls=2, executions=3)
    handled: list[Any] = []

    async def handler(_call: Call, request: Any) -> None:
        handled.append(request)

    call = Call(method, {}, "192.0.2.1", "", math.inf, handled.append)  # type: ignore[arg-type]
    call.principal = Principal(PrincipalType.USER, "u", "u", "u", relay.tenant.workspace_id, "admin", frozenset())
    await layer(method, handler)(call, "first")
    assert call.trailing["ratelimit-remaining"] == "2"
    with pytest.raises(errors.RateLimited):
        await layer(method, handler)(call, "second")
    assert handled == ["first"]
    assert (await limiter.spend(f"executions:{relay.tenant.workspace_id}", 0, 5)).remaining == 2
