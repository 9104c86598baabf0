"""PostgreSQL gone or frozen, Redis frozen: answers in bounded time, and back to work without a restart."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import aiohttp
import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from relay import errors
from relay.errors import from_rpc_error
from relay.v1 import actions_pb2, audit_pb2, auth_pb2, connections_pb2

from relay_grpc.db import Database
from relay_grpc.interceptors.policy import methods
from tests import valkey
from tests.actions.caller import Caller, calling, eventually, held
from tests.contract.requests import fitting
from tests.faults.postgres import Postgres, private
from tests.harness import Receiver, Relay, running, settings_for
from tests.rpc.wire import METHODS, Wire
from tests.valkey import Valkey

AT_ONCE = 8.0  # seconds in which a call is answered while nothing listens: less than any time limit of the code
NOTICED = 10.0  # seconds until health and readiness tell: twice the promise, on a shared machine
COMMAND_TIMEOUT = 1.0  # seconds, in place of the server's 10
DEADLINE = 1.0  # seconds that callers give
LATE = 0.5  # seconds after which they must have heard
NOBODY = str(UUID(int=1))
INTERNAL = re.compile(r"socket|/tmp|postgres|asyncpg|errno|connection|traceback|\.py", re.IGNORECASE)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
async def postgres(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Postgres]:
    async with private(tmp_path_factory.mktemp("pg"), durable=False) as made:
        yield made


@pytest.fixture(scope="module")
def redis() -> Iterator[Valkey]:
    with valkey.running() as server:
        yield server


@pytest.fixture(scope="module")
async def relay(postgres: Postgres, redis: Valkey, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Relay]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relay_grpc.db.COMMAND_TIMEOUT", COMMAND_TIMEOUT)
        # What a frozen database commits when it thaws, unheard, runs when its lease is over.
        environ = {"RELAY_ATTEMPT_TIMEOUT": "0.5", "RELAY_LEASE": "1.5", "REDIS_URL": redis.url}
        settings = settings_for(tmp_path_factory.mktemp("data"), **environ)
        async with running(postgres.url, settings) as made:
            yield made


@pytest.fixture
async def caller(relay: Relay, receiver: Receiver) -> AsyncIterator[Caller]:
    async with calling(relay, receiver) as made:
        yield made


@asynccontextmanager
async def wire(relay: Relay) -> AsyncIterator[grpc.aio.Channel]:
    """A channel that repeats nothing by itself."""
    async with grpc.aio.insecure_channel(str(relay.app.listen), (("grpc.enable_retries", 0),)) as channel:
        yield channel


async def ended(call: Any) -> None:
    """Awaits an answer, or the end of a stream of them."""
    if isinstance(call, grpc.aio.UnaryStreamCall):
        async for _ in call:
            pass
    else:
        await call


async def refusal(call: Any) -> errors.RelayError:
    with pytest.raises(grpc.RpcError) as raised:
        await call
    return from_rpc_error(raised.value)


async def assert_unavailable(channel: grpc.aio.Channel, key: str, path: str, request: bytes) -> None:
    started = time.monotonic()
    call = (channel.unary_stream if methods()[path].streams else channel.unary_unary)(path)
    error = await refusal(ended(call(request, metadata=(("x-api-key", key),), timeout=20)))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE"), path
    assert error.retry_after, path
    assert time.monotonic() - started < AT_ONCE, path
    assert not INTERNAL.search(error.message), error.message


def requests_of(preview: actions_pb2.Preview) -> dict[str, Message]:
    """A request that needs the database, for each method that is built."""
    return {
        "AuthService/CreateApiKey": auth_pb2.CreateApiKeyRequest(name="k", role="viewer"),
        "AuthService/ListApiKeys": auth_pb2.ListApiKeysRequest(),
        "AuthService/RevokeApiKey": auth_pb2.RevokeApiKeyRequest(id=NOBODY),
        "ConnectionsService/CreateConnection": connections_pb2.CreateConnectionRequest(
            name="c", webhook=connections_pb2.WebhookConfiguration(url="http://127.0.0.1:9")
        ),
        "ConnectionsService/GetConnection": connections_pb2.GetConnectionRequest(id=NOBODY),
        "ConnectionsService/ListConnections": connections_pb2.ListConnectionsRequest(),
        "ConnectionsService/DeleteConnection": connections_pb2.DeleteConnectionRequest(id=NOBODY),
        "ConnectionsService/RotateSecret": connections_pb2.RotateSecretRequest(id=NOBODY),
        "ActionsService/Preview": actions_pb2.PreviewRequest(action="webhook.send", parameters={"payload": {}}),
        "ActionsService/GetPreview": actions_pb2.GetPreviewRequest(id=preview.id),
        "ActionsService/Execute": actions_pb2.ExecuteRequest(preview_id=preview.id, digest=preview.digest),
        "ActionsService/GetExecution": actions_pb2.GetExecutionRequest(id=NOBODY),
        "ActionsService/ListExecutions": actions_pb2.ListExecutionsRequest(),
        "ActionsService/ListAttempts": actions_pb2.ListAttemptsRequest(execution_id=NOBODY),
        "ActionsService/WatchExecution": actions_pb2.WatchExecutionRequest(id=NOBODY),
        "ActionsService/CancelExecution": actions_pb2.CancelExecutionRequest(id=NOBODY),
        "ActionsService/ResendExecution": actions_pb2.ResendExecutionRequest(id=NOBODY),
        "ActionsService/ReconcileExecution": fitting(actions_pb2.ReconcileExecutionRequest.DESCRIPTOR),
        "ActionsService/RecoverExecutions": fitting(actions_pb2.RecoverExecutionsRequest.DESCRIPTOR),
        "ActionsService/GetRecovery": actions_pb2.GetRecoveryRequest(id=NOBODY),
        "ActionsService/CancelRecovery": actions_pb2.CancelRecoveryRequest(id=NOBODY),
        "AuditService/ListEvents": audit_pb2.ListEventsRequest(),
    }


async def http_status(relay: Relay, path: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"http://{relay.app.http_listen}{path}") as response:
        return response.status


async def assert_health(relay: Relay, channel: grpc.aio.Channel, *, serving: bool) -> None:
    """Health of every service and readiness tell it in time; liveness does not depend on it."""
    started = time.monotonic()
    stub = health_pb2_grpc.HealthStub(channel)
    services = {path.split("/")[1] for path in methods()} | {""}

    async def told() -> bool:
        states = {(await stub.Check(health_pb2.HealthCheckRequest(service=service))).status for service in services}
        ready = await http_status(relay, "/readyz")
        return (states, ready) == ({SERVING if serving else NOT_SERVING}, 200 if serving else 503)

    await eventually(told)
    assert time.monotonic() - started < NOTICED
    assert await http_status(relay, "/livez") == 200


async def test_while_postgres_is_gone_every_call_is_retryable_and_afterwards_it_serves_again(
    postgres: Postgres, relay: Relay, caller: Caller
) -> None:
    preview = await caller.preview()
    async with wire(relay) as channel:
        async with postgres.stopped():
            for name, request in requests_of(preview).items():
                await assert_unavailable(channel, relay.tenant.admin, f"/relay.v1.{name}", request.SerializeToString())
            for path in methods():
                await assert_unavailable(channel, relay.tenant.developer, path, b"")
            await assert_health(relay, channel, serving=False)
        await assert_health(relay, channel, serving=True)
    execution = await caller.execute(preview)
    assert execution.state == actions_pb2.EXECUTION_STATE_SUCCESS
    assert caller.receiver.ids() == [execution.id]


async def test_whether_postgres_answers_is_found_out_sooner_than_a_command_times_out(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay_grpc.db.COMMAND_TIMEOUT", 10.0)
    db = await Database.open(postgres.url)
    try:
        assert await db.answers()
        async with postgres.frozen():
            started = time.monotonic()
            assert [await db.answers() for _ in range(2)] == [False, False]
            assert time.monotonic() - started < NOTICED
        assert await db.answers()
    finally:
        await db.close()


async def test_while_postgres_is_frozen_calls_end_in_time_and_afterwards_it_serves_again(
    postgres: Postgres, relay: Relay, caller: Caller
) -> None:
    previews = [await caller.preview() for _ in range(3)]
    async with wire(relay) as channel:
        async with postgres.frozen():
            started = time.monotonic()
            hasty, patient, *reads = await asyncio.gather(
                refusal(caller.call(previews[0], deadline=0.5)),
                refusal(caller.call(previews[1], deadline=30)),
                *(
                    refusal(
                        channel.unary_unary("/relay.v1.ActionsService/GetPreview")(
                            actions_pb2.GetPreviewRequest(id=previews[0].id).SerializeToString(),
                            metadata=caller.metadata,
                            timeout=30,
                        )
                    )
                    for _ in range(40)  # more than there are connections
                ),
            )
            assert hasty.code == grpc.StatusCode.DEADLINE_EXCEEDED
            for error in (patient, *reads):
                assert error.code == grpc.StatusCode.UNAVAILABLE
                assert error.retry_after
                assert not INTERNAL.search(error.message)
            assert time.monotonic() - started < 20
            await assert_health(relay, channel, serving=False)
        await assert_health(relay, channel, serving=True)
    for preview in previews:
        execution = await caller.execute(preview)
        await caller.ended(execution.id)
    assert len(await caller.executions(*previews)) == len(previews)
    assert len(caller.receiver.ids()) == len(set(caller.receiver.ids())) == len(previews)


async def all_ended(relay: Relay, channel: grpc.aio.Channel, watched: str) -> dict[str, tuple[str, float]]:
    """How every RPC of the API ended that is called now, and how long after its call. watched: an execution's id."""
    wire = Wire(channel, relay.tenant.admin)

    async def one(name: str) -> tuple[str, float]:
        request = fitting(METHODS[name].input_type.DESCRIPTOR)
        if name == "ActionsService.WatchExecution":
            request.id = watched
        started = time.monotonic()
        answer = await wire.call(name, request, timeout=DEADLINE)
        return answer.code, time.monotonic() - started

    return dict(zip(METHODS, await asyncio.gather(*map(one, METHODS)), strict=True))


def rpcs_ended(relay: Relay) -> float:
    return sum(
        sample.value
        for metric in relay.app.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "relay_rpc_total"
    )


async def test_while_postgres_is_frozen_every_call_ends_by_its_deadline(
    postgres: Postgres, relay: Relay, caller: Caller, figure: Callable[[str], None]
) -> None:
    release = held(caller.receiver)
    watched = (await caller.execute(await caller.preview(), wait=0)).id
    ended_before = rpcs_ended(relay)
    async with wire(relay) as channel:
        watching = asyncio.create_task(
            Wire(channel, relay.tenant.admin).call(
                "ActionsService.WatchExecution", actions_pb2.WatchExecutionRequest(id=watched), timeout=DEADLINE
            )
        )
        started = time.monotonic()
        async with postgres.frozen():
            ends = await all_ended(relay, channel, watched)
            assert (await watching).code == "DEADLINE_EXCEEDED"
            assert time.monotonic() - started <= DEADLINE + LATE
        release.set()
        await eventually(lambda: rpcs_ended(relay) == ended_before + len(ends) + 1)  # none is left behind
        await assert_health(relay, channel, serving=True)
    latest = max(took for _, took in ends.values())
    assert latest <= DEADLINE + LATE
    figure(f"{len(ends)} RPCs, deadline {DEADLINE} s: the last ended after {latest:.2f} s")


async def test_while_redis_is_frozen_every_call_is_answered(
    redis: Valkey, relay: Relay, caller: Caller, figure: Callable[[str], None]
) -> None:
    watched = await caller.ended((await caller.execute(await caller.preview())).id)
    logged = "SELECT FROM audit_checkpoints WHERE workspace_id = $1"
    await eventually(lambda: relay.sql(logged, relay.tenant.workspace_id))
    async with wire(relay) as channel:
        redis.freeze()
        try:
            ends = await all_ended(relay, channel, watched.id)
        finally:
            redis.thaw()
    unanswered = {"DEADLINE_EXCEEDED", "UNAVAILABLE", "INTERNAL", "UNKNOWN"}
    assert {path: code for path, (code, _) in ends.items() if code in unanswered} == {
        "AuditService.TailEvents": "DEADLINE_EXCEEDED"  # it has no other end
    }
    figure(f"{len(ends)} RPCs: the last was answered after {max(took for _, took in ends.values()):.2f} s")
