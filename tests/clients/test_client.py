"""Both Python clients over the wire, against a gRPC server that answers what each case tells it to."""

import ast
import asyncio
import contextlib
import datetime as dt
import inspect
import pickle
import re
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import any as any_pb
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from relay import _call, _channel, aio, client, errors
from relay.v1 import (
    actions_pb2,
    actions_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    auth_pb2,
    auth_pb2_grpc,
    connections_pb2,
    connections_pb2_grpc,
)

KEY = "rk_test_0123456789abcdef"
NOON = dt.datetime(2026, 5, 4, 14, tzinfo=dt.timezone(dt.timedelta(hours=2)))  # in UTC
PREVIEW = actions_pb2.Preview(id="018f0000-0000-7000-8000-000000000001", digest="ab" * 32)
FILES = (auth_pb2, connections_pb2, actions_pb2, audit_pb2)
METHODS = {
    method.name: method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


class Failure(NamedTuple):
    """An answer that is an error, with google.rpc details or with trailers of its own."""

    code: grpc.StatusCode
    details: tuple[Message, ...] = ()
    trailers: tuple[tuple[str, str | bytes], ...] = ()
    message: str = "what is wrong"


class Received(NamedTuple):
    method: str
    request: Any
    metadata: dict[str, str]
    seconds_left: float
    time: float


class Server(
    auth_pb2_grpc.AuthServiceServicer,
    connections_pb2_grpc.ConnectionsServiceServicer,
    actions_pb2_grpc.ActionsServiceServicer,
    audit_pb2_grpc.AuditServiceServicer,
):
    """Gives each call the next of the answers told for its method, or an empty message; keeps what it received."""

    def __init__(self) -> None:
        self.answers: dict[str, deque[Message | Failure | float]] = {}
        self.streams: deque[tuple[Message | Failure | float, ...]] = deque()
        self.received: list[Received] = []
        self.target = ""

    def tell(self, method: str, *answers: Message | Failure | float) -> None:
        """A float: seconds to hang, before the next answer."""
        self.answers[method] = deque(answers)

    async def answer(self, method: str, request: Message, context: Any) -> Message:
        metadata = dict(context.invocation_metadata())
        self.received.append(Received(method, request, metadata, context.time_remaining(), time.monotonic()))
        queue = self.answers.get(method)
        answer = queue.popleft() if queue else METHODS[method].output_type._concrete_class()
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = queue.popleft()
        if isinstance(answer, Failure):
            trailers = answer.trailers
            if answer.details:
                packed = [any_pb.pack(detail) for detail in answer.details]
                status = status_pb2.Status(code=answer.code.value[0], message=answer.message, details=packed)
                trailers += tuple(rpc_status.to_status(status).trailing_metadata)
            await context.abort(answer.code, answer.message, trailers)
        return answer

    async def stream(self, method: str, request: Message, context: Any) -> AsyncIterator[Message]:
        """The next of `streams`, answer by answer; then it ends."""
        metadata = dict(context.invocation_metadata())
        self.received.append(Received(method, request, metadata, context.time_remaining(), time.monotonic()))
        for answer in self.streams.popleft() if self.streams else ():
            if isinstance(answer, float):
                await asyncio.sleep(answer)
            elif isinstance(answer, Failure):
                await context.abort(answer.code, answer.message)
            else:
                yield answer

    def methods(self) -> list[str]:
        return [received.method for received in self.received]


def scripted(name: str) -> Callable[..., Any]:
    async def handler(self: Server, request: Message, context: Any) -> Message:
        return await self.answer(name, request, context)

    async def stream(self: Server, request: Message, context: Any) -> AsyncIterator[Message]:
        async for answer in self.stream(name, request, context):
            yield answer

    return stream if METHODS[name].server_streaming else handler


for _name in METHODS:
    setattr(Server, _name, scripted(_name))


@contextlib.asynccontextmanager
async def listening(bind: Callable[[grpc.aio.Server], str]) -> AsyncIterator[Server]:
    grpc_server, server = grpc.aio.server(), Server()
    auth_pb2_grpc.add_AuthServiceServicer_to_server(server, grpc_server)
    connections_pb2_grpc.add_ConnectionsServiceServicer_to_server(server, grpc_server)
    actions_pb2_grpc.add_ActionsServiceServicer_to_server(server, grpc_server)
    audit_pb2_grpc.add_AuditServiceServicer_to_server(server, grpc_server)
    server.target = bind(grpc_server)
    await grpc_server.start()
    try:
        yield server
    finally:
        await grpc_server.stop(None)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with listening(lambda grpc_server: f"localhost:{grpc_server.add_insecure_port('localhost:0')}") as server:
        yield server


@pytest.fixture(params=["aio", "client"])
def connect(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Either client, as an asynchronous context manager."""

    @contextlib.asynccontextmanager
    async def connected(target: str, **options: Any) -> AsyncIterator[Any]:
        options = {"api_key": KEY, **options}
        if request.param == "aio":
            async with aio.connect(target, **options) as relay:
                yield relay
        else:
            with client.connect(target, **options) as relay:
                yield relay

    return connected


@pytest.fixture
async def relay(connect: Callable[..., Any], server: Server) -> AsyncIterator[Any]:
    async with connect(server.target) as relay:
        yield relay


async def run(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a method of either client; blocking ones in a thread, because the server lives in this loop."""
    if inspect.iscoroutinefunction(method) or isinstance(method, grpc.aio.UnaryUnaryMultiCallable):
        return await method(*args, **kwargs)
    return await asyncio.to_thread(method, *args, **kwargs)


async def take(items: Any, count: int = sys.maxsize) -> list[Any]:
    """The next `count` items of either client's iterator, or all that are left."""
    taken, end = [], object()
    while len(taken) < count:
        item = await (anext(items, end) if hasattr(items, "__anext__") else asyncio.to_thread(next, items, end))
        if item is end:
            break
        taken.append(item)
    return taken


def info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain="relay.v1", metadata=metadata)


def retry_in(seconds: float) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=dt.timedelta(seconds=seconds))


CONTENTION = Failure(grpc.StatusCode.ABORTED, (info("CONTENTION"), retry_in(0.05)))
UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE, (info("OVERLOADED"),))


# What would do something else the second time, or find it done and fail.
SENT_ONCE = (
    "CreateApiKey",
    "RotateApiKey",
    "CreateRole",
    "DeleteRole",
    "AssignRole",
    "RemoveRole",
    "CreateConnection",
    "UpdateConnection",
    "DeleteConnection",
    "RotateSecret",
    "CancelExecution",
    "ResendExecution",
    "ReconcileExecution",
    "RecoverExecutions",
    "ExportEvents",
    "Approve",
)


async def call_everything(relay: Any) -> None:
    await run(relay.auth.who_am_i)
    await run(relay.auth.create_api_key, "ci", "developer")
    await run(relay.auth.get_api_key, "id")
    await take(relay.auth.list_api_keys())
    await run(relay.auth.rotate_api_key, "id", dt.timedelta(hours=1))
    await run(relay.auth.revoke_api_key, "id")
    await run(relay.auth.verify_api_key, "rk_live_somebodys")
    await run(relay.auth.create_role, "ops", "developer", ["actions:read"])
    await take(relay.auth.list_roles())
    await run(relay.auth.delete_role, "ops")
    await run(relay.auth.assign_role, "user", "ops")
    await take(relay.auth.list_role_assignments())
    await run(relay.auth.remove_role, "user")
    await run(relay.connections.create_webhook, "orders", "https://example.com/hook")
    await run(relay.connections.get, "id")
    await take(relay.connections.list())
    await run(relay.connections.update, connections_pb2.Connection(id="id"), ["enabled"])
    await run(relay.connections.delete, "id")
    await run(relay.connections.rotate_secret, "id")
    await take(relay.actions.list())
    await run(relay.actions.preview, "webhook.send", {})
    await run(relay.actions.get_preview, "id")
    await run(relay.actions.execute, PREVIEW)
    await run(relay.actions.get_execution, "id")
    await take(relay.actions.list_executions())
    await take(relay.actions.list_attempts("id"))
    await run(relay.actions.cancel_execution, "id")
    await run(relay.actions.resend_execution, "id")
    await run(relay.actions.reconcile_execution, "id", actions_pb2.EXECUTION_STATE_SUCCESS, "it is in their ledger")
    await run(relay.actions.recover_executions, NOON)
    await run(relay.actions.get_recovery, "id")
    await run(relay.actions.cancel_recovery, "id")
    await take(relay.actions.watch_execution("id", timeout=30))
    await take(relay.audit.list_events())
    await run(relay.audit.get_event, "id")
    await take(relay.audit.export_events(timeout=30))
    await take(relay.audit.tail_events(timeout=30))
    await run(relay.audit.get_checkpoint)
    await run(relay.audit.get_inclusion_proof, "id")
    await run(relay.audit.get_consistency_proof, 5)
    await run(relay.actions.call, "Approve", actions_pb2.ApproveRequest(preview_id="id"))


async def test_every_method_sends_the_key_and_a_deadline(relay: Any, server: Server) -> None:
    await call_everything(relay)
    repeatable = [method for methods in _channel.REPEATABLE.values() for method in methods]
    assert sorted(server.methods()) == sorted([*repeatable, *SENT_ONCE])
    for received in server.received:
        assert received.metadata["authorization"] == f"Bearer {KEY}"
        assert 20 < received.seconds_left <= 30.5, received.method


def test_the_retry_policy_names_methods_that_exist() -> None:
    for service, methods in _channel.REPEATABLE.items():
        assert all(METHODS[method].containing_service.full_name == service for method in methods)


async def test_python_values_become_the_messages_fields(relay: Any, server: Server) -> None:
    parameters = {"payload": {"amount": 5, "tags": ["a", None, True]}, "fields": {"id": "9007199254740993"}}
    await run(relay.actions.preview, "webhook.send", parameters, connection_id="c", ttl=dt.timedelta(minutes=5))
    await run(relay.auth.create_api_key, "ci", "developer", scopes={"actions:read"}, expire_time=NOON)
    await run(relay.auth.create_api_key, "ci", "ops", calls_per_minute=60, executions_per_minute=5)
    await run(relay.auth.rotate_api_key, "id", dt.timedelta(days=1))
    await run(relay.auth.verify_api_key, "rk_live_somebodys", scopes={"actions:read"})
    await run(relay.auth.assign_role, "user", "ops", issuer="https://login.example")
    await run(relay.auth.remove_role, "user", issuer="https://login.example")
    await run(relay.connections.create_webhook, "orders", "https://example.com", body_signature=True, default=True)
    await run(
        relay.connections.create_webhook,
        "patient",
        "https://example.com",
        headers={"x-tenant": "7"},
        retry_delays=[dt.timedelta(minutes=1)],
        attempt_timeout=dt.timedelta(seconds=5),
        signature_scheme=connections_pb2.SIGNATURE_SCHEME_ED25519,
    )
    await run(relay.connections.create_webhook, "once", "https://example.com", retry_delays=[], validate_only=True)
    changed = connections_pb2.Connection(id="id", version=3, webhook={"url": "https://example.net"})
    await run(relay.connections.update, changed, ["webhook.url"])
    await run(relay.connections.rotate_secret, "id", overlap=dt.timedelta(0))
    await take(relay.actions.list_executions(states=[actions_pb2.EXECUTION_STATE_FAILED], page_size=7))
    await run(relay.actions.reconcile_execution, "id", actions_pb2.EXECUTION_STATE_SUCCESS, "it is in their ledger")
    await run(relay.actions.recover_executions, NOON, connection_id="c", validate_only=True)
    await take(relay.audit.list_events(outcome=audit_pb2.EVENT_OUTCOME_DENIED, start_time=NOON))
    assert [MessageToDict(received.request) for received in server.received] == [
        {"action": "webhook.send", "connectionId": "c", "parameters": parameters, "ttl": "300s"},
        {"name": "ci", "role": "developer", "scopes": ["actions:read"], "expireTime": "2026-05-04T12:00:00Z"},
        {"name": "ci", "role": "ops", "limits": {"callsPerMinute": 60, "executionsPerMinute": 5}},
        {"id": "id", "overlap": "86400s"},
        {"key": "rk_live_somebodys", "scopes": ["actions:read"]},
        {"userId": "user", "role": "ops", "issuer": "https://login.example"},
        {"userId": "user", "issuer": "https://login.example"},
        {"name": "orders", "webhook": {"url": "https://example.com", "bodySignature": True}, "default": True},
        {
            "name": "patient",
            "webhook": {
                "url": "https://example.com",
                "headers": {"x-tenant": "7"},
                "retryPolicy": {"delays": ["60s"]},
                "timeout": "5s",
            },
            "signatureScheme": "SIGNATURE_SCHEME_ED25519",
        },
        {"name": "once", "webhook": {"url": "https://example.com", "retryPolicy": {}}, "validateOnly": True},
        {
            "connection": {"id": "id", "version": 3, "webhook": {"url": "https://example.net"}},
            "updateMask": "webhook.url",
        },
        {"id": "id", "overlap": "0s"},
        {"states": ["EXECUTION_STATE_FAILED"], "pageSize": 7},
        {"id": "id", "state": "EXECUTION_STATE_SUCCESS", "reason": "it is in their ledger"},
        {"startTime": "2026-05-04T12:00:00Z", "connectionId": "c", "validateOnly": True},
        {"outcome": "EVENT_OUTCOME_DENIED", "startTime": "2026-05-04T12:00:00Z"},
    ]


async def test_execute_confirms_the_digest_that_was_shown(relay: Any, server: Server) -> None:
    server.tell("Preview", PREVIEW)
    server.tell("Execute", actions_pb2.Execution(state=actions_pb2.EXECUTION_STATE_SUCCESS))
    preview = await run(relay.actions.preview, "webhook.send", {"payload": {"amount": 5}}, connection_id="")
    execution = await run(relay.actions.execute, preview, idempotency_key="order-4711", wait=dt.timedelta(seconds=0))
    assert execution.state == actions_pb2.EXECUTION_STATE_SUCCESS
    assert MessageToDict(server.received[1].request) == {
        "previewId": PREVIEW.id,
        "digest": PREVIEW.digest,
        "idempotencyKey": "order-4711",
        "wait": "0s",
    }


async def test_execute_may_only_ask_whether_it_could(relay: Any, server: Server) -> None:
    await run(relay.actions.execute, PREVIEW, validate_only=True)
    assert MessageToDict(server.received[0].request) == {
        "previewId": PREVIEW.id,
        "digest": PREVIEW.digest,
        "validateOnly": True,
    }


async def test_execute_outlasts_its_wait(relay: Any, server: Server) -> None:
    await run(relay.actions.execute, PREVIEW, wait=dt.timedelta(seconds=30))
    await run(relay.actions.execute, PREVIEW, timeout=3)
    assert server.received[0].seconds_left > 50
    assert server.received[1].seconds_left < 4


@pytest.mark.parametrize("preview", [actions_pb2.Preview(id=PREVIEW.id), actions_pb2.Preview(digest=PREVIEW.digest)])
async def test_execute_refuses_a_preview_without_id_or_digest(relay: Any, server: Server, preview: Message) -> None:
    with pytest.raises(ValueError, match="no id or no digest"):
        await run(relay.actions.execute, preview)
    assert server.received == []


@pytest.mark.parametrize("number", [2**53 + 1, -(2**60)])
async def test_integers_that_would_be_rounded_are_refused(relay: Any, server: Server, number: int) -> None:
    await run(relay.actions.preview, "webhook.send", {"id": 2**53})
    with pytest.raises(ValueError, match=re.escape("parameters.lines[1].id: integers beyond 2^53")):
        await run(relay.actions.preview, "webhook.send", {"lines": [{"id": 1}, {"id": number}]})
    assert server.methods() == ["Preview"]


async def test_times_without_a_time_zone_are_refused(relay: Any) -> None:
    with pytest.raises(ValueError, match="time zone"):
        await take(relay.audit.list_events(end_time=dt.datetime(2026, 5, 4)))
    with pytest.raises(ValueError, match="time zone"):
        await run(relay.actions.recover_executions, dt.datetime(2026, 5, 4))


async def test_lists_fetch_a_page_when_it_is_needed(relay: Any, server: Server) -> None:
    server.tell(
        "ListExecutions",
        *(
            actions_pb2.ListExecutionsResponse(
                executions=[actions_pb2.Execution(id=f"{page}{item}") for item in "ab"],
                next_page_token=token,
            )
            for page, token in (("1", "two"), ("2", "three"), ("3", ""))
        ),
    )
    executions = relay.actions.list_executions(action="webhook.send", page_size=2)
    assert server.received == []
    assert [execution.id for execution in await take(executions, 2)] == ["1a", "1b"]
    assert len(server.received) == 1
    assert [execution.id for execution in await take(executions, 1)] == ["2a"]
    assert len(server.received) == 2
    assert [execution.id for execution in await take(executions)] == ["2b", "3a", "3b"]
    assert [received.request.page_token for received in server.received] == ["", "two", "three"]
    assert {(received.request.action, received.request.page_size) for received in server.received} == {
        ("webhook.send", 2)
    }


async def test_an_empty_page_does_not_end_a_list(relay: Any, server: Server) -> None:
    server.tell(
        "ListApiKeys",
        auth_pb2.ListApiKeysResponse(next_page_token="more"),
        auth_pb2.ListApiKeysResponse(api_keys=[auth_pb2.ApiKey(name="ci")]),
    )
    assert [key.name for key in await take(relay.auth.list_api_keys())] == ["ci"]


CLASSES = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.ABORTED: errors.Contention,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.RateLimited,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
    grpc.StatusCode.INTERNAL: errors.Internal,
    grpc.StatusCode.UNKNOWN: errors.RelayError,
    grpc.StatusCode.DATA_LOSS: errors.RelayError,
}


async def failing(relay: Any, server: Server, failure: Failure) -> errors.RelayError:
    """What a method without retries raises for the failure."""
    server.tell("CreateApiKey", failure)
    with pytest.raises(errors.RelayError) as raised:
        await run(relay.auth.create_api_key, "ci", "developer")
    return raised.value


@pytest.mark.parametrize("code", CLASSES, ids=lambda code: code.name)
async def test_every_status_code_has_its_class(relay: Any, server: Server, code: grpc.StatusCode) -> None:
    for failure in (Failure(code, (info("SOME_REASON"),)), Failure(code)):
        error = await failing(relay, server, failure)
        assert type(error) is CLASSES[code]
        assert error.code is code
        assert error.message == "what is wrong"
        assert error.reason == ("SOME_REASON" if failure.details else code.name)
        assert isinstance(error.__cause__, grpc.RpcError)


async def test_errors_carry_what_the_details_tell(relay: Any, server: Server) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="parameters.url", description="must be a URL")
    details = (
        info("INVALID_REQUEST", request_id="r-1", hint="x"),
        error_details_pb2.Help(),
        retry_in(1.5),
        error_details_pb2.BadRequest(field_violations=[violation]),
    )
    error = await failing(relay, server, Failure(grpc.StatusCode.INVALID_ARGUMENT, details))
    assert error.metadata == {"request_id": "r-1", "hint": "x"}
    assert error.request_id == "r-1"
    assert error.retry_after == 1.5
    assert error.violations == (("parameters.url", "must be a URL"),)
    assert str(error) == "INVALID_REQUEST: what is wrong (request r-1)"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), vars(copy), str(copy)) == (type(error), vars(error), str(error))


async def test_errors_of_a_proxy_keep_their_class(relay: Any, server: Server) -> None:
    trailers = (("x-request-id", "r-2"), ("grpc-status-details-bin", b"\xff not a message"))
    error = await failing(relay, server, Failure(grpc.StatusCode.PERMISSION_DENIED, trailers=trailers))
    assert type(error) is errors.PermissionDenied
    assert (error.reason, error.request_id, error.retry_after) == ("PERMISSION_DENIED", "r-2", None)


async def test_a_call_ends_at_its_deadline(relay: Any, server: Server) -> None:
    server.tell("GetExecution", 20.0, actions_pb2.Execution())
    with pytest.raises(errors.DeadlineExceeded):
        await run(relay.actions.get_execution, "id", timeout=0.2)


async def test_no_server_is_unavailable(connect: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    async with connect(f"127.0.0.1:{port}") as relay:
        with pytest.raises(errors.Unavailable):
            await run(relay.auth.create_api_key, "ci", "developer")


async def test_what_is_safe_to_repeat_is_retried_while_unavailable(relay: Any, server: Server) -> None:
    server.tell("Preview", UNAVAILABLE, UNAVAILABLE, PREVIEW)
    server.tell("Execute", UNAVAILABLE, UNAVAILABLE, actions_pb2.Execution(id="done"))
    preview = await run(relay.actions.preview, "webhook.send", {})
    execution = await run(relay.actions.execute, preview, idempotency_key="order-4711")
    assert execution.id == "done"
    assert server.methods() == ["Preview"] * 3 + ["Execute"] * 3
    assert {received.request.idempotency_key for received in server.received[3:]} == {"order-4711"}


async def test_what_is_not_safe_to_repeat_is_sent_once(relay: Any, server: Server) -> None:
    for failure in (UNAVAILABLE, CONTENTION):
        calls = {
            "CreateApiKey": (relay.auth.create_api_key, "ci", "developer"),
            "RotateApiKey": (relay.auth.rotate_api_key, "id", dt.timedelta()),
            "CreateRole": (relay.auth.create_role, "ops", "developer", ["actions:read"]),
            "DeleteRole": (relay.auth.delete_role, "ops"),
            "AssignRole": (relay.auth.assign_role, "user", "ops"),
            "RemoveRole": (relay.auth.remove_role, "user"),
            "CreateConnection": (relay.connections.create_webhook, "orders", "https://example.com"),
            "UpdateConnection": (relay.connections.update, connections_pb2.Connection(id="id"), ["enabled"]),
            "DeleteConnection": (relay.connections.delete, "id"),
            "RotateSecret": (relay.connections.rotate_secret, "id"),
            "CancelExecution": (relay.actions.cancel_execution, "id"),
            "ResendExecution": (relay.actions.resend_execution, "id"),
            "ReconcileExecution": (relay.actions.reconcile_execution, "id", actions_pb2.EXECUTION_STATE_FAILED, "why"),
            "RecoverExecutions": (relay.actions.recover_executions, NOON),
            "Approve": (relay.actions.call, "Approve", actions_pb2.ApproveRequest(preview_id="id")),
        }
        assert {*calls, "ExportEvents"} == set(SENT_ONCE)  # which is a stream: see below
        for method, (send, *arguments) in calls.items():
            server.received.clear()
            server.tell(method, failure)
            with pytest.raises(CLASSES[failure.code]):
                await run(send, *arguments)
            assert server.methods() == [method]


async def test_a_failing_server_is_spared_retries(relay: Any, server: Server) -> None:
    """Four attempts cost four of ten tokens; the fifth failure leaves half of them, which ends retries."""
    server.tell("WhoAmI", *[UNAVAILABLE] * 9)
    for attempts in (4, 1, 1):
        server.received.clear()
        with pytest.raises(errors.Unavailable):
            await run(relay.auth.who_am_i)
        assert len(server.received) == attempts


async def test_execute_waits_out_contention_under_the_same_key(relay: Any, server: Server) -> None:
    server.tell("Execute", CONTENTION, CONTENTION, actions_pb2.Execution(id="done"))
    execution = await run(relay.actions.execute, PREVIEW, idempotency_key="order-4711", timeout=10)
    assert execution.id == "done"
    first, second, third = server.received
    assert first.request == second.request == third.request
    assert second.time - first.time >= 0.05 <= third.time - second.time


async def test_execute_does_not_wait_beyond_its_deadline(relay: Any, server: Server) -> None:
    server.tell("Execute", *[CONTENTION] * 100)
    with pytest.raises((errors.Contention, errors.DeadlineExceeded)):
        await run(relay.actions.execute, PREVIEW, timeout=0.4)
    assert 2 <= len(server.received) <= 8


@pytest.mark.parametrize("details", [(info("CONTENTION"),), (info("CONTENTION"), retry_in(3))])
async def test_contention_is_raised_where_waiting_is_no_use(relay: Any, server: Server, details: Any) -> None:
    server.tell("Execute", Failure(grpc.StatusCode.ABORTED, details))
    with pytest.raises(errors.Contention):
        await run(relay.actions.execute, PREVIEW, timeout=2)
    assert len(server.received) == 1


async def test_a_spent_budget_is_raised_at_once_with_its_delay(relay: Any, server: Server) -> None:
    server.tell("Execute", Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, (info("RATE_LIMITED"), retry_in(12.25))))
    with pytest.raises(errors.RateLimited) as raised:
        await run(relay.actions.execute, PREVIEW)
    assert raised.value.retry_after == 12.25
    assert len(server.received) == 1


async def test_methods_that_are_not_built_yet_can_be_called(relay: Any, server: Server) -> None:
    server.tell("Approve", Failure(grpc.StatusCode.UNIMPLEMENTED, (info("METHOD_UNIMPLEMENTED"),)))
    with pytest.raises(errors.Unimplemented):
        await run(relay.actions.call, "Approve", actions_pb2.ApproveRequest(preview_id="id"))
    await run(relay.actions.stub.GetExecution, actions_pb2.GetExecutionRequest(id="id"))
    assert server.received[1].request.id == "id"


def at(count: int) -> actions_pb2.Execution:
    """An execution after so many attempts."""
    return actions_pb2.Execution(id="id", attempt_count=count)


BROKEN = Failure(grpc.StatusCode.UNAVAILABLE)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_call, "RESUME_AFTER", 0.01)


async def test_a_watch_tells_each_change_until_the_server_ends_it(relay: Any, server: Server) -> None:
    server.streams.append((at(1), at(2), at(3)))
    watch = relay.actions.watch_execution("id")
    assert server.received == []
    assert await take(watch) == [at(1), at(2), at(3)]
    (received,) = server.received
    assert (received.request.id, received.metadata["authorization"]) == ("id", f"Bearer {KEY}")
    assert 3500 < received.seconds_left < 3700


@pytest.mark.usefixtures("at_once")
async def test_a_watch_goes_on_where_it_broke_and_tells_nothing_twice(relay: Any, server: Server) -> None:
    server.streams.extend([(at(1), at(2), 0.5, BROKEN), (BROKEN,), (at(2), BROKEN), (at(4),)])
    assert await take(relay.actions.watch_execution("id", timeout=5)) == [at(1), at(2), at(4)]
    assert len(server.received) == 4
    first, *others = (received.seconds_left for received in server.received)
    assert max(others) < first - 0.2, "the deadline is of the whole"


def told(cursor: str) -> audit_pb2.TailEventsResponse:
    return audit_pb2.TailEventsResponse(cursor=cursor)


@pytest.mark.usefixtures("at_once")
async def test_a_tail_goes_on_from_the_last_cursor(relay: Any, server: Server) -> None:
    server.streams.extend([(told("a"), told("b"), BROKEN), (BROKEN,), (told("b"), told("c"))])
    assert await take(relay.audit.tail_events(timeout=5)) == [told("a"), told("b"), told("c")]
    assert [received.request.cursor for received in server.received] == ["", "b", "b"]


@pytest.mark.usefixtures("at_once")
async def test_an_export_that_breaks_off_is_not_whole(relay: Any, server: Server) -> None:
    server.streams.append((audit_pb2.ExportEventsResponse(chunk=b"one\n"), BROKEN))
    export = relay.audit.export_events(audit_pb2.EXPORT_FORMAT_CSV, end_time=NOON)
    assert [piece.chunk for piece in await take(export, 1)] == [b"one\n"]
    with pytest.raises(errors.Unavailable):
        await take(export)
    (received,) = server.received
    assert (received.request.format, received.request.end_time.ToDatetime(dt.UTC)) == (2, NOON)


async def test_a_watch_that_nobody_answers_ends_as_any_other_call(relay: Any, server: Server) -> None:
    server.streams.extend([(BROKEN,)] * 9)
    with pytest.raises(errors.Unavailable):
        await take(relay.actions.watch_execution("id"))
    assert len(server.received) == 4, "the channel's attempts"


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("end", "raised"),
    [
        (Failure(grpc.StatusCode.UNAUTHENTICATED), errors.Unauthenticated),
        (Failure(grpc.StatusCode.NOT_FOUND), errors.NotFound),
        (Failure(grpc.StatusCode.INTERNAL), errors.Internal),
        (20.0, errors.DeadlineExceeded),
    ],
)
async def test_a_watch_ends_with_whatever_a_repetition_would_not_cure(
    relay: Any, server: Server, end: Any, raised: Any
) -> None:
    server.streams.append((at(1), end))
    watch = relay.actions.watch_execution("id", timeout=0.5)
    assert await take(watch, 1) == [at(1)]
    with pytest.raises(raised):
        await take(watch)
    assert len(server.received) == 1


async def test_a_watch_is_not_resumed_beyond_its_deadline(relay: Any, server: Server) -> None:
    server.streams.append((at(1), BROKEN))
    with pytest.raises(errors.Unavailable):
        await take(relay.actions.watch_execution("id", timeout=_call.RESUME_AFTER / 2))
    assert len(server.received) == 1


async def test_whoever_stops_watching_ends_the_call(relay: Any, server: Server) -> None:
    ended = asyncio.Event()

    async def endless(method: str, request: Message, context: Any) -> AsyncIterator[Message]:
        try:
            yield at(1)
            await asyncio.sleep(20)
        finally:
            ended.set()

    server.stream = endless  # type: ignore[method-assign]
    watch = relay.actions.watch_execution("id")
    assert await take(watch, 1) == [at(1)]
    await (watch.aclose() if hasattr(watch, "aclose") else asyncio.to_thread(watch.close))
    async with asyncio.timeout(5):
        await ended.wait()


async def test_the_key_is_never_shown(relay: Any, server: Server) -> None:
    error = await failing(relay, server, UNAVAILABLE)
    shown = [repr(relay), repr(relay.actions), repr(relay.actions.execute), repr(error), str(error), repr(vars(error))]
    shown += traceback.format_exception(error)
    assert not [text for text in shown if KEY in text]


async def test_a_token_goes_where_a_key_does_and_a_workspace_beside_it(
    connect: Callable[..., Any], server: Server
) -> None:
    workspace = "018f0000-0000-7000-8000-000000000001"
    async with connect(server.target, api_key=None, token="a.b.c", workspace=workspace) as relay:
        await run(relay.auth.who_am_i)
    async with connect(server.target, workspace=workspace) as relay:
        await run(relay.auth.who_am_i)
    async with connect(server.target) as relay:
        await run(relay.auth.who_am_i)
    told = [(one.metadata["authorization"], one.metadata.get("x-relay-workspace")) for one in server.received]
    assert told == [("Bearer a.b.c", workspace), (f"Bearer {KEY}", workspace), (f"Bearer {KEY}", None)]


async def test_a_function_tells_the_token_of_each_call(connect: Callable[..., Any], server: Server) -> None:
    minted = iter(["first", "second", "third", "fourth", "not one", None])
    server.tell("Execute", CONTENTION, actions_pb2.Execution(id="done"))
    async with connect(server.target, api_key=None, token=lambda: next(minted)) as relay:
        assert server.received == []
        await run(relay.auth.who_am_i)
        await run(relay.auth.who_am_i)
        await run(relay.actions.execute, PREVIEW, timeout=10)  # twice, the second time with the newer token
        for _ in range(2):
            with pytest.raises(ValueError, match="token must be the credential alone") as raised:
                await run(relay.auth.who_am_i)
            assert "not one" not in str(raised.value)
    told = [received.metadata["authorization"] for received in server.received]
    assert told == ["Bearer first", "Bearer second", "Bearer third", "Bearer fourth"]


@pytest.mark.parametrize("token", ["a.b.c", lambda: "a.b.c"])
async def test_a_token_is_never_shown(connect: Callable[..., Any], server: Server, token: Any) -> None:
    server.tell("GetExecution", UNAVAILABLE, UNAVAILABLE, UNAVAILABLE, UNAVAILABLE)
    async with connect(server.target, api_key=None, token=token) as relay:
        with pytest.raises(errors.Unavailable) as raised:
            await run(relay.actions.get_execution, "id")
        shown = [repr(relay), repr(vars(relay.actions)), repr(raised.value), *traceback.format_exception(raised.value)]
    assert not [text for text in shown if "a.b.c" in text]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"api_key": None}, "give either an api_key or a token"),
        ({"token": "a.b.c"}, "give either an api_key or a token"),
        ({"api_key": None, "token": ""}, "token must be the credential alone"),
        ({"api_key": None, "token": "Bearer secret"}, "token must be the credential alone"),
        ({"workspace": "mine"}, "workspace must be the workspace's id"),
        ({"workspace": ""}, "workspace must be the workspace's id"),
    ],
)
async def test_a_caller_who_can_not_be_one_is_refused(
    connect: Callable[..., Any], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem) as raised:
        async with connect("localhost:50051", **options):
            pass
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("key", ["", None, f"{KEY}\n", f" {KEY}", f"Bearer {KEY}", "rk_\u00e9", "rk\x00"])
async def test_a_key_that_can_not_be_one_is_refused(connect: Callable[..., Any], key: str) -> None:
    with pytest.raises(ValueError, match="api_key") as raised:
        async with connect("localhost:50051", api_key=key):
            pass
    assert not key or key not in str(raised.value)


@pytest.mark.parametrize(
    "target",
    ["", "localhost", "relay.example", "https://relay.example:443", "relay.example:", "a b:1", "user@host:1", "::1:80"],
)
async def test_a_target_that_can_not_be_one_is_refused(connect: Callable[..., Any], target: str) -> None:
    with pytest.raises(ValueError, match="target must be HOST:PORT"):
        async with connect(target):
            pass


@pytest.mark.parametrize(
    "target", ["relay.example:50051", "10.0.0.7:50051", "[2001:db8::1]:50051", "dns:///relay:50051", "localhost.evil:1"]
)
async def test_plaintext_to_another_host_has_to_be_asked_for(connect: Callable[..., Any], target: str) -> None:
    with pytest.raises(ValueError, match="insecure=True"):
        async with connect(target, tls=False):
            pass
    with pytest.raises(ValueError, match="give one of them"):
        async with connect(target, tls=True, insecure=True):
            pass
    assert _channel.endpoint(target, None, False).credentials is not None
    assert _channel.endpoint(target, None, True).credentials is None


@pytest.mark.parametrize(
    "target", ["localhost:1", "LOCALHOST:1", "127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "dns:///localhost:1", "unix:/x"]
)
def test_this_host_is_reached_in_plaintext_unless_told_otherwise(target: str) -> None:
    assert _channel.endpoint(target, None, False).credentials is None
    assert _channel.endpoint(target, True, False).credentials is not None


async def test_a_proxy_from_the_environment_does_not_get_local_calls(
    connect: Callable[..., Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")
    async with connect(server.target) as relay:
        await run(relay.auth.who_am_i)
    assert server.methods() == ["WhoAmI"]


async def test_unix_sockets(connect: Callable[..., Any], tmp_path: Path) -> None:
    path = f"unix:{tmp_path}/relay.sock"
    async with listening(lambda grpc_server: grpc_server.add_insecure_port(path) and path) as server:
        async with connect(path) as relay:
            await run(relay.auth.who_am_i)
        assert server.methods() == ["WhoAmI"]


async def test_tls_with_roots_of_ones_own(connect: Callable[..., Any]) -> None:
    key, certificate = self_signed("localhost")
    credentials = grpc.ssl_server_credentials([(key, certificate)])
    async with listening(
        lambda grpc_server: f"localhost:{grpc_server.add_secure_port('localhost:0', credentials)}"
    ) as server:
        async with connect(server.target, tls=grpc.ssl_channel_credentials(certificate)) as relay:
            await run(relay.auth.who_am_i)
        async with connect(server.target, tls=True) as relay:  # the system's roots do not know this certificate
            with pytest.raises(errors.Unavailable):
                await run(relay.auth.create_api_key, "ci", "developer")
        assert server.methods() == ["WhoAmI"]


def self_signed(name: str) -> tuple[bytes, bytes]:
    """A private key and its certificate, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    return key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain), certificate.public_bytes(pem)


class AioTracing(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self) -> None:
        self.seen: list[str] = []

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.seen.append(details.method.decode() if isinstance(details.method, bytes) else details.method)
        return await continuation(details, request)


class Tracing(grpc.UnaryUnaryClientInterceptor):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.seen.append(details.method)
        return continuation(details, request)


@pytest.mark.parametrize(("module", "interceptor"), [(aio, AioTracing), (client, Tracing)])
async def test_interceptors_see_every_call_and_errors_stay_typed(module: Any, interceptor: Any, server: Server) -> None:
    tracing = interceptor()
    server.tell("GetPreview", Failure(grpc.StatusCode.NOT_FOUND, (info("RESOURCE_NOT_FOUND"),)))
    relay = module.connect(server.target, api_key=KEY, interceptors=[tracing])
    await run(relay.auth.who_am_i)
    with pytest.raises(errors.NotFound) as raised:
        await run(relay.actions.get_preview, "id")
    await run(relay.close)
    assert raised.value.reason == "RESOURCE_NOT_FOUND"
    assert tracing.seen == ["/relay.v1.AuthService/WhoAmI", "/relay.v1.ActionsService/GetPreview"]


SNIPPETS = re.findall(
    r"```python\n(.*?)```", Path(__file__, "../../../clients/python/README.md").resolve().read_text(), re.DOTALL
)


@pytest.mark.parametrize("snippet", SNIPPETS)
async def test_the_readme_runs(snippet: str, server: Server) -> None:
    server.tell("Preview", PREVIEW)
    code = compile(
        snippet.replace("localhost:50051", server.target), "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    )
    if code.co_flags & inspect.CO_COROUTINE:
        await eval(code, {})
    else:
        await asyncio.to_thread(exec, code, {})
    assert server.methods() == ["Preview", "Execute"]
    assert server.received[1].request.idempotency_key == "order-4711"


def test_the_client_needs_nothing_of_the_server() -> None:
    check = "import sys, relay.aio, relay.client; sys.exit(any(name.startswith('relay_grpc') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", check], check=True)
