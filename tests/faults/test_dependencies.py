"""PostgreSQL gone, and PostgreSQL frozen: retryable answers in bounded time, and back to work without a restart."""

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit
from uuid import UUID

import aiohttp
import grpc
import psutil
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from relay import errors
from relay.errors import from_rpc_error
from relay.v1 import actions_pb2, audit_pb2, auth_pb2, connections_pb2

from relay_grpc.db import Database
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.interceptors.policy import methods
from relay_grpc.schema import migrate
from tests.actions.caller import Caller, calling, eventually
from tests.harness import Receiver, Relay, running, settings_for

AT_ONCE = 8.0  # seconds in which a call is answered while nothing listens: less than any time limit of the code
NOTICED = 10.0  # seconds until health and readiness tell: twice the promise, on a shared machine
COMMAND_TIMEOUT = 1.0  # seconds, in place of the server's 10
NOBODY = str(UUID(int=1))
INTERNAL = re.compile(r"socket|/tmp|postgres|asyncpg|errno|connection|traceback|\.py", re.IGNORECASE)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Postgres:
    """A PostgreSQL that can be stopped, started and frozen. Its URL stays the same, by a link to its socket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._link = folder / "socket"
        self._server = EmbeddedPostgres(folder / "postgres", durable=False)
        self.url = f"postgresql://relay@/relay?host={quote(str(self._link), safe='')}&port=5432"

    def start(self) -> None:
        self._server.start()
        self._link.unlink(missing_ok=True)
        self._link.symlink_to(parse_qs(urlsplit(self._server.url()).query)["host"][0])

    def stop(self) -> None:
        self._server.stop()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to every process of the server."""
        pid = int((self._folder / "postgres" / "data" / "postmaster.pid").read_text().splitlines()[0])
        postmaster = psutil.Process(pid)
        for process in (postmaster, *postmaster.children(recursive=True)):
            process.send_signal(number)

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        await asyncio.to_thread(self.stop)
        try:
            yield
        finally:
            await asyncio.to_thread(self.start)

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)


@pytest.fixture(scope="module")
async def private(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Postgres]:
    made = Postgres(tmp_path_factory.mktemp("pg"))
    await asyncio.to_thread(made.start)
    try:
        await asyncio.to_thread(migrate, made.url)
        yield made
    finally:
        await asyncio.to_thread(made.stop)


@pytest.fixture(scope="module")
async def relay(private: Postgres, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Relay]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relay_grpc.db.COMMAND_TIMEOUT", COMMAND_TIMEOUT)
        # What a frozen database commits when it thaws, unheard, runs when its lease is over.
        settings = settings_for(tmp_path_factory.mktemp("data"), RELAY_ATTEMPT_TIMEOUT="0.5", RELAY_LEASE="1.5")
        async with running(private.url, settings) as made:
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


async def refusal(call: Any) -> errors.RelayError:
    with pytest.raises(grpc.RpcError) as raised:
        await call
    return from_rpc_error(raised.value)


async def assert_unavailable(channel: grpc.aio.Channel, key: str, path: str, request: bytes) -> None:
    started = time.monotonic()
    error = await refusal(channel.unary_unary(path)(request, metadata=(("x-api-key", key),), timeout=20))
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
        "ActionsService/Preview": actions_pb2.PreviewRequest(action="webhook.send", parameters={"payload": {}}),
        "ActionsService/GetPreview": actions_pb2.GetPreviewRequest(id=preview.id),
        "ActionsService/Execute": actions_pb2.ExecuteRequest(preview_id=preview.id, digest=preview.digest),
        "ActionsService/GetExecution": actions_pb2.GetExecutionRequest(id=NOBODY),
        "ActionsService/ListExecutions": actions_pb2.ListExecutionsRequest(),
        "ActionsService/ListAttempts": actions_pb2.ListAttemptsRequest(execution_id=NOBODY),
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
    private: Postgres, relay: Relay, caller: Caller
) -> None:
    preview = await caller.preview()
    async with wire(relay) as channel:
        async with private.stopped():
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
    private: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay_grpc.db.COMMAND_TIMEOUT", 10.0)
    db = await Database.open(private.url)
    try:
        assert await db.answers()
        async with private.frozen():
            started = time.monotonic()
            assert [await db.answers() for _ in range(2)] == [False, False]
            assert time.monotonic() - started < NOTICED
        assert await db.answers()
    finally:
        await db.close()


async def test_while_postgres_is_frozen_calls_end_in_time_and_afterwards_it_serves_again(
    private: Postgres, relay: Relay, caller: Caller
) -> None:
    previews = [await caller.preview() for _ in range(3)]
    async with wire(relay) as channel:
        async with private.frozen():
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
