"""What a preview tells of the delivery: what it costs, how it is tried, and how its connection does."""

import json
from typing import Any

import pytest
from relay.v1 import actions_pb2, connections_pb2

from relay_grpc.actions.execution import RETRY_SCHEDULE
from relay_grpc.interceptors.policy import methods
from tests.actions.caller import Caller, answer
from tests.harness import Relay


async def configure(caller: Caller, **values: Any) -> None:
    """Adds to the configuration of the caller's connection, behind its version's back."""
    await caller.relay.sql(
        "UPDATE connections SET configuration = configuration || $2::jsonb WHERE id = $1",
        caller.connection.id,
        json.dumps(values),
    )


async def test_it_tells_where_how_often_and_for_how_much(caller: Caller) -> None:
    plan = (await caller.preview()).delivery_plan
    assert plan.host == "127.0.0.1"
    assert plan.egress_verdict == actions_pb2.EGRESS_VERDICT_ALLOWED
    assert plan.breaker_state == connections_pb2.BREAKER_STATE_CLOSED
    assert [delay.ToTimedelta() for delay in plan.retry_delays] == list(RETRY_SCHEDULE)
    assert plan.max_attempts == len(RETRY_SCHEDULE) + 1
    assert plan.quota_cost == methods()["/relay.v1.ActionsService/Execute"].executions
    assert list(plan.signatures) == ["v1"]


async def test_it_goes_by_the_connection(caller: Caller) -> None:
    await configure(caller, retry_delays=[1, 2.5], timeout=3)
    plan = (await caller.preview()).delivery_plan
    assert [delay.ToTimedelta().total_seconds() for delay in plan.retry_delays] == [1, 2.5]
    assert (plan.max_attempts, plan.timeout.ToTimedelta().total_seconds()) == (3, 3)


async def test_a_name_that_does_not_resolve_is_told(caller: Caller) -> None:
    await configure(caller, url="http://nowhere.invalid/hook")
    plan = (await caller.preview()).delivery_plan
    assert (plan.host, list(plan.addresses)) == ("nowhere.invalid", [])
    assert plan.egress_verdict == actions_pb2.EGRESS_VERDICT_UNRESOLVED


@pytest.mark.parametrize(
    ("open_until", "state"),
    [
        ("now() + interval '1 h'", connections_pb2.BREAKER_STATE_OPEN),
        ("now() - interval '1 h'", connections_pb2.BREAKER_STATE_HALF_OPEN),
    ],
)
async def test_it_tells_of_an_open_breaker(relay: Relay, caller: Caller, open_until: str, state: int) -> None:
    await relay.sql(f"UPDATE connections SET open_until = {open_until} WHERE id = $1", caller.connection.id)
    assert (await caller.preview()).delivery_plan.breaker_state == state


async def test_a_preview_of_the_previous_version_can_be_read(relay: Relay, caller: Caller) -> None:
    preview = await caller.preview()
    await relay.sql(
        "UPDATE previews SET shown = shown - '{host,egress_verdict,breaker,retry_delays,quota_cost}'::text[]"
        " WHERE id = $1",
        preview.id,
    )
    request = actions_pb2.GetPreviewRequest(id=preview.id)
    read = await answer(caller.stub.GetPreview(request, metadata=caller.metadata))
    assert (read.delivery_plan.url, read.delivery_plan.host) == (preview.delivery_plan.url, "")
