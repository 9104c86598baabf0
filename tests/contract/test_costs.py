"""What calls cost: every method its policy's units of the right budgets, refused once one of them is spent."""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from google.rpc import error_details_pb2

from relay_grpc import errors
from relay_grpc.call import Call, Method
from relay_grpc.interceptors.rate_limit import rate_limit
from relay_grpc.principal import Limits, Principal, PrincipalType
from relay_grpc.ratelimit.budgets import Price, charges
from relay_grpc.ratelimit.limiter import LocalLimiter
from relay_grpc.telemetry import Metrics
from tests.contract.conftest import LIMIT, spend
from tests.contract.requests import fitting
from tests.harness import Databases, Relay, running, settings_for
from tests.rpc.wire import ENDLESS, METHODS, Answer, Wire, wired
from tests.valkey import running as valkey_running

TOLD = ("ratelimit-limit", "ratelimit-remaining", "ratelimit-reset", "retry-after")


def told(answer: Answer) -> dict[str, str | bytes]:
    return {name: answer.trailing[name] for name in TOLD if name in answer.trailing}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
async def test_a_call_is_charged_its_cost_and_told_what_is_left(
    relay: Relay, wire: Wire, spent: Any, method: Method
) -> None:
    answer = await wire.call(method, fitting(method.input_type.DESCRIPTOR))
    assert await spent() == (method.calls, method.executions)
    decision = await spend(relay, "executions" if method.executions else "calls")
    if method.name in ENDLESS:  # its caller ends it, and waits for no trailers
        assert (answer.code, told(answer)) == ("DEADLINE_EXCEEDED", {})
        return
    assert told(answer) == {
        "ratelimit-limit": str(LIMIT),
        "ratelimit-remaining": str(decision.remaining),
        "ratelimit-reset": str(math.ceil(decision.reset_after)),
    }


async def test_a_call_that_means_another_workspace_is_charged_too(wire: Wire, spent: Any) -> None:
    """It leaves an event, of which nobody may write any number."""
    method = METHODS["AuthService.CreateApiKey"]
    answer = await wire.call(method, fitting(method.input_type.DESCRIPTOR), x_relay_workspace=str(uuid4()))
    assert (answer.code, list(answer.violations)) == ("INVALID_ARGUMENT", ["x-relay-workspace"])
    assert await spent() == (method.calls, method.executions)


@pytest.mark.usefixtures("spent")  # the time stands still
async def test_a_spent_budget_refuses_every_method_and_counts_the_refusals(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    of_tenant = replace(relay, tenant=tenant)
    for budget in ("calls", "executions"):
        await spend(of_tenant, budget, (await spend(of_tenant, budget)).remaining)
    async with wired(relay, tenant.admin) as wire:
        for method in METHODS.values():
            for _ in range(2):
                answer = await wire.call(method)
                assert (answer.code, answer.reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")
            check_refusal(
                answer, f"workspace {tenant.workspace_id}", "executions" if method.executions else "calls", LIMIT
            )
    await relay.app.recorder.flush(everything=True)
    rows = await relay.sql(
        "SELECT action, sum(count) FROM audit_events WHERE workspace_id = $1 AND status = 'denied' "
        "AND reason = 'RATE_LIMITED' AND actor_type = 'api_key' GROUP BY action",
        tenant.workspace_id,
    )
    assert dict(map(tuple, rows)) == dict.fromkeys(METHODS, 2)


def check_refusal(answer: Answer, subject: str, budget: str, limit: int) -> None:
    """Metadata and details tell the same: whose budget is spent, and when to come back."""
    assert (answer.code, answer.reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")
    (violation,) = answer.detail(error_details_pb2.QuotaFailure).violations
    assert (violation.subject, violation.quota_metric, violation.quota_value) == (subject, budget, limit)
    assert violation.description == answer.text
    assert subject in answer.text
    delay = answer.detail(error_details_pb2.RetryInfo).retry_delay.ToTimedelta().total_seconds()
    assert 0 < delay <= 120
    assert answer.trailing["ratelimit-limit"] == str(limit)
    assert answer.trailing["ratelimit-remaining"] == "0"
    assert delay <= int(answer.trailing["retry-after"]) < delay + 1
    assert int(answer.trailing["ratelimit-reset"]) <= int(answer.trailing["retry-after"])


@pytest.mark.usefixtures("spent")  # the time stands still
async def test_refusals_for_missing_scopes_are_limited_too(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    of_tenant = replace(relay, tenant=tenant)
    execute = METHODS["ActionsService.Execute"]
    async with wired(relay, tenant.viewer) as wire:
        left = (await spend(of_tenant, "calls")).remaining
        await spend(of_tenant, "calls", left - 3)
        for remaining in ("2", "1", "0"):
            answer = await wire.call(execute)
            assert (answer.code, answer.reason) == ("PERMISSION_DENIED", "SCOPE_MISSING")
            assert answer.trailing["ratelimit-remaining"] == remaining
        check_refusal(await wire.call(execute), f"workspace {tenant.workspace_id}", "calls", LIMIT)
        assert (await spend(of_tenant, "executions")).remaining == LIMIT


@pytest.mark.usefixtures("spent")  # the time stands still
async def test_a_key_and_its_successor_share_limits_of_their_own_within_their_workspaces(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    of_tenant = replace(relay, tenant=tenant)
    async with relay.connect(tenant.admin) as client:
        key = await client.auth.create_api_key("narrow", "viewer", calls_per_minute=5)
        successor = await client.auth.rotate_api_key(key.id, timedelta(hours=1))
    before = (await spend(of_tenant, "calls")).remaining
    async with wired(relay, tenant.admin) as wire:
        answers = [
            await wire.call("AuthService.WhoAmI", key=one.secret) for one in (key, successor, key, key, successor)
        ]
        assert [told(answer)["ratelimit-remaining"] for answer in answers] == ["4", "3", "2", "1", "0"]
        assert {told(answer)["ratelimit-limit"] for answer in answers} == {"5"}
        for one in (key, successor):
            check_refusal(await wire.call("AuthService.WhoAmI", key=one.secret), f"key {one.id}", "calls", 5)
        assert (await spend(of_tenant, "calls")).remaining == before - 5
        assert told(await wire.call("AuthService.WhoAmI"))["ratelimit-limit"] == str(LIMIT)
        await spend(of_tenant, "calls", before - 6)
        check_refusal(await wire.call("AuthService.WhoAmI"), f"workspace {tenant.workspace_id}", "calls", LIMIT)


async def test_a_limit_that_the_operator_set_replaces_the_settings(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    await relay.sql("UPDATE workspaces SET executions_per_minute = 7 WHERE id = $1", tenant.workspace_id)
    async with wired(relay, tenant.developer) as wire:
        answer = await wire.call(
            "ActionsService.Execute", fitting(METHODS["ActionsService.Execute"].input_type.DESCRIPTOR)
        )
        assert told(answer)["ratelimit-limit"] == "7"
        assert told(await wire.call("AuthService.WhoAmI"))["ratelimit-limit"] == str(LIMIT)


def caller(**limits: Any) -> Principal:
    workspace = uuid4()
    return Principal(
        PrincipalType.API_KEY, "id", "key:lineage", "name", workspace, "admin", frozenset(), None, **limits
    )


def test_a_call_is_charged_to_its_workspace_and_to_its_caller_in_one_slot_of_a_cluster() -> None:
    prices = (Price("calls", 1, 600), Price("executions", 2, 60))
    plain = caller()
    tag = f"{{{plain.workspace_id}}}"
    assert [charge[:3] for charge in charges(plain, prices)] == [(f"{tag}:calls", 1, 600), (f"{tag}:executions", 2, 60)]
    bound = caller(limits=Limits(calls=5, executions=3), workspace_limits=Limits(executions=30))
    tag = f"{{{bound.workspace_id}}}"
    assert charges(bound, prices) == [
        (f"{tag}:calls", 1, 600, "calls", "workspace"),
        (f"{tag}:calls:key:lineage", 1, 5, "calls", "caller"),
        (f"{tag}:executions", 2, 30, "executions", "workspace"),
        (f"{tag}:executions:key:lineage", 2, 3, "executions", "caller"),
    ]


async def test_a_method_may_cost_several_units_of_both_budgets() -> None:
    limiter, handled, principal = LocalLimiter(clock=lambda: 43_200.0), [], caller()
    layer = rate_limit(limiter, Metrics(), calls_per_minute=100, executions_per_minute=5, shadow=False)
    method = replace(METHODS["AuthService.WhoAmI"], calls=2, executions=3)

    async def handler(_call: Call, request: Any) -> None:
        handled.append(request)

    call = Call(method, {}, "192.0.2.1", "", math.inf, handled.append)  # type: ignore[arg-type]
    call.principal = principal
    await layer(method, handler)(call, "first")
    assert call.trailing["ratelimit-remaining"] == "2"
    with pytest.raises(errors.RateLimited) as refusal:
        await layer(method, handler)(call, "second")
    assert (refusal.value.quota, handled) == ("executions", ["first"])
    left = [
        await limiter.spend(charges(principal, [Price(*price)])) for price in (("calls", 0, 100), ("executions", 0, 5))
    ]
    assert [decision.remaining for decision in left] == [98, 2]


@asynccontextmanager
async def limited_to_one_more(
    databases: Databases, folder: Path, **environ: str
) -> AsyncIterator[tuple[Relay, Sequence[Answer]]]:
    """A server, and the answers to five calls of a workspace that may make one more."""
    async with databases.new() as url, running(url, settings_for(folder, **environ)) as relay:
        tenant = await relay.new_tenant()
        await relay.sql("UPDATE workspaces SET calls_per_minute = 2 WHERE id = $1", tenant.workspace_id)
        async with wired(relay, tenant.developer) as wire:
            yield relay, [await wire.call("AuthService.WhoAmI") for _ in range(5)]


def count(relay: Relay, name: str, holder: str = "workspace") -> float | None:
    return relay.app.metrics.registry.get_sample_value(name, {"budget": "calls", "holder": holder})


async def test_in_shadow_mode_limits_are_counted_and_told_and_refuse_nothing(
    databases: Databases, tmp_path: Path
) -> None:
    async with limited_to_one_more(databases, tmp_path, RELAY_RATE_LIMIT_SHADOW="true") as (relay, answers):
        assert [answer.code for answer in answers] == ["OK"] * 5
        assert {(told(answer)["ratelimit-limit"], told(answer)["ratelimit-remaining"]) for answer in answers} == {
            ("2", "0")
        }
        assert not any("retry-after" in answer.trailing for answer in answers)
        assert count(relay, "relay_rate_limit_shadowed_total") == 4
        assert count(relay, "relay_rate_limited_total") is None
        await relay.app.recorder.flush(everything=True)
        assert not await relay.sql("SELECT FROM audit_events WHERE reason = 'RATE_LIMITED'")


async def test_out_of_shadow_mode_the_same_calls_are_refused(databases: Databases, tmp_path: Path) -> None:
    async with limited_to_one_more(databases, tmp_path) as (relay, answers):
        assert [answer.code for answer in answers] == ["OK"] + ["RESOURCE_EXHAUSTED"] * 4
        assert count(relay, "relay_rate_limited_total") == 4
        assert count(relay, "relay_rate_limited_total", "caller") == 0
        assert count(relay, "relay_rate_limit_shadowed_total") is None


async def test_switched_off_there_are_no_limits_no_numbers_and_no_redis(databases: Databases, tmp_path: Path) -> None:
    with valkey_running() as valkey:
        off = {"RATE_LIMIT_ENABLED": "false", "RELAY_RATE_LIMIT_SHADOW": "true", "REDIS_URL": valkey.url}
        async with limited_to_one_more(databases, tmp_path, **off) as (relay, answers):
            assert [(answer.code, told(answer)) for answer in answers] == [("OK", {})] * 5
            assert relay.app.limiter is None
            assert count(relay, "relay_rate_limit_shadowed_total") is None
            await asyncio.sleep(0.1)
            assert valkey.client.info("stats")["total_connections_received"] == 1  # this one
            assert not valkey.client.dbsize()
