"""What callers find without any of Relay's code: the standard health service, and reflection for grpcurl and buf."""

import asyncio
import json
import platform
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.text_format import MessageToString
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from relay_grpc.call import Method
from relay_grpc.settings import Settings
from tests.contract.requests import fitting
from tests.harness import Databases, Relay, running, settings_for
from tests.rpc.wire import ENDLESS, METHODS, Wire

SERVICES = {f"relay.v1.{name}" for name in ("AuthService", "ConnectionsService", "ActionsService", "AuditService")}
STANDARD = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
SERVING, NOT_SERVING, SERVICE_UNKNOWN = (
    getattr(health_pb2.HealthCheckResponse, name) for name in ("SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
)
PROGRAMS = Path(sys.executable).parent


@pytest.fixture
async def health(relay: Relay) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(str(relay.app.listen)) as channel:
        yield health_pb2_grpc.HealthStub(channel)


@pytest.mark.parametrize("service", ["", *sorted(SERVICES)])
async def test_check_and_watch_answer_without_a_key(health: Any, service: str) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    assert (await health.Check(request, timeout=5)).status == SERVING
    watch = health.Watch(request, timeout=5)
    assert (await watch.read()).status == SERVING
    watch.cancel()


async def test_list_tells_of_every_service(health: Any) -> None:
    answer = await health.List(health_pb2.HealthListRequest(), timeout=5)
    assert {name: one.status for name, one in answer.statuses.items()} == dict.fromkeys({"", *SERVICES}, SERVING)


async def test_a_service_that_is_not_there_is_unknown(health: Any) -> None:
    request = health_pb2.HealthCheckRequest(service="relay.v1.NoService")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(request, timeout=5)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(request, timeout=5)
    assert (await watch.read()).status == SERVICE_UNKNOWN
    watch.cancel()


async def test_whoever_watches_learns_of_the_shutdown_before_it(databases: Databases, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(databases.new())
        server = await stack.enter_async_context(AsyncExitStack())
        relay = await server.enter_async_context(running(url, settings_for(tmp_path)))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(str(relay.app.listen)))
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [
            stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=30) for service in ("", *SERVICES)
        ]
        assert [(await watch.read()).status for watch in watches] == [SERVING] * 5
        stopping = asyncio.create_task(server.aclose())
        assert [(await watch.read()).status for watch in watches] == [NOT_SERVING] * 5
        assert not stopping.done()
        for watch in watches:
            watch.cancel()
        await stopping


async def run(*command: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a program. The server runs in this very event loop."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


async def buf_curl(relay: Relay, *arguments: str) -> tuple[int, str, str]:
    flags = ("--http2-prior-knowledge", "--protocol", "grpc", "-H", f"authorization: Bearer {relay.tenant.admin}")
    return await run(PROGRAMS / "buf", "curl", *flags, *arguments)


async def test_buf_curl_lists_and_calls_by_reflection(relay: Relay) -> None:
    url = f"http://{relay.app.listen}"
    status, output, errors = await buf_curl(relay, "--list-methods", url)
    assert (status, errors) == (0, "")
    paths = {method.path.removeprefix("/") for method in METHODS.values()}
    assert paths <= set(output.split())
    status, output, errors = await buf_curl(relay, f"{url}/relay.v1.AuthService/WhoAmI")
    assert (status, errors) == (0, "")
    assert json.loads(output)["workspaceId"] == str(relay.tenant.workspace_id)
    status, _, errors = await buf_curl(relay, "-d", '{"id": "x"}', f"{url}/relay.v1.ConnectionsService/GetConnection")
    assert status != 0
    assert json.loads(errors)["code"] == "invalid_argument"


if (sys.platform, platform.machine()) == ("linux", "x86_64"):  # the one that its wheel is for

    async def grpcurl(relay: Relay, *arguments: str, flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
        key = ("-H", f"authorization: Bearer {relay.tenant.admin}")
        return await run(PROGRAMS / "grpcurl", "-plaintext", *key, *flags, str(relay.app.listen), *arguments)

    async def test_grpcurl_lists_and_describes_by_reflection(relay: Relay) -> None:
        assert set((await grpcurl(relay, "list"))[1].split()) == SERVICES | STANDARD
        for service in SERVICES:
            names = {
                method.path.removeprefix("/").replace("/", ".")
                for method in METHODS.values()
                if method.path.startswith(f"/{service}/")
            }
            assert set((await grpcurl(relay, "list", service))[1].split()) == names
            status, output, errors = await grpcurl(relay, "describe", service)
            assert (status, errors) == (0, "")
            assert all(f"rpc {name.rpartition('.')[2]} (" in output for name in names)
        status, output, _ = await grpcurl(relay, "describe", "relay.v1.ExecuteRequest")
        assert status == 0
        assert "string idempotency_key = 3" in output

    async def test_grpcurl_calls_every_method_by_reflection(relay: Relay, wire: Wire) -> None:
        _, output, errors = await grpcurl(relay, "relay.v1.AuthService/WhoAmI")
        assert errors == ""
        assert json.loads(output)["workspaceId"] == str(relay.tenant.workspace_id)

        async def call(method: Method) -> None:
            request = fitting(method.input_type.DESCRIPTOR)
            for _ in range(2):  # what the first call makes is there for the second, as it is for grpcurl's
                expected = (await wire.call(method, request)).code
            flags = ("-format", "text", "-d", MessageToString(request))  # this release reads no FieldMask as JSON
            flags += ("-max-time", "1") if method.name in ENDLESS else ()
            status, _, errors = await grpcurl(relay, method.path.removeprefix("/"), flags=flags)
            if expected == "OK":
                assert (status, errors) == (0, ""), method.name
            else:
                assert f"Code: {expected.title().replace('_', '')}" in errors, method.name
                assert "google.rpc.ErrorInfo" in errors or method.name in ENDLESS, method.name  # its caller ended it

        await asyncio.gather(*map(call, METHODS.values()))

    async def test_grpcurl_asks_the_health_service(relay: Relay) -> None:
        _, output, errors = await grpcurl(relay, "grpc.health.v1.Health/Check", flags=("-d", '{"service": ""}'))
        assert errors == ""
        assert json.loads(output) == {"status": "SERVING"}


async def test_reflection_answers_only_where_it_is_on(databases: Databases, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(databases.new())
        relay = await stack.enter_async_context(running(url, settings_for(tmp_path, RELAY_REFLECTION="false")))
        async with grpc.aio.insecure_channel(str(relay.app.listen)) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == SERVING


@pytest.mark.parametrize(
    ("environ", "on"),
    [
        ({"RELAY_ENV": "development"}, True),
        ({"RELAY_ENV": "production"}, False),
        ({"RELAY_ENV": "production", "RELAY_REFLECTION": "true"}, True),
        ({"RELAY_ENV": "development", "RELAY_REFLECTION": "false"}, False),
    ],
)
def test_reflection_is_off_in_production_unless_allowed(environ: dict[str, str], on: bool) -> None:
    assert Settings.model_validate(environ).reflection_is_on == on
