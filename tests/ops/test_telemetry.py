import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from relay.v1 import actions_pb2

from relay_grpc import telemetry
from relay_grpc.app import serving
from relay_grpc.telemetry import Tracer, tracer_provider
from tests.harness import Relay, receiving
from tests.rpc.wire import wired

METHOD = "relay.v1.ActionsService/Execute"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01", f"00-{TRACE_ID}-{PARENT_ID}-00"


@dataclass
class Receiver:
    """An OTLP/HTTP receiver that keeps what it is sent."""

    port: int = 0
    requests: list[tuple[str, ExportTraceServiceRequest]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for _, request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    async def accept(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        self.requests.append((request.path, ExportTraceServiceRequest.FromString(await request.read())))
        return web.Response(content_type="application/x-protobuf")


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/{path:.*}", receiver.accept)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    receiver.port = runner.addresses[0][1]
    yield receiver
    await runner.cleanup()


@asynccontextmanager
async def tracing(url: str, sample_ratio: float = 1.0) -> AsyncIterator[Tracer]:
    """A tracer whose spans have all been sent when the block ends."""
    tracer = Tracer(tracer_provider(url, sample_ratio=sample_ratio, service_version="1.2.3"))
    try:
        yield tracer
    finally:
        await tracer.shutdown()


def attributes(holder: Span) -> dict[str, str | int]:
    return {a.key: a.value.string_value or a.value.int_value for a in holder.attributes}


async def test_a_sampled_call_is_a_server_span_under_its_remote_parent(receiver: Receiver) -> None:
    async with tracing(receiver.url) as tracer:
        trace = tracer.start(METHOD, SAMPLED)
        trace.end("OK")
    [(path, request)] = receiver.requests
    [span] = receiver.spans
    assert path == "/v1/traces"
    assert (span.name, span.kind) == (METHOD, Span.SPAN_KIND_SERVER)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert (trace.trace_id, trace.traceparent) == (TRACE_ID, f"00-{TRACE_ID}-{span.span_id.hex()}-01")
    assert attributes(span) == {
        "rpc.system.name": "grpc",
        "rpc.method": METHOD,
        "rpc.response.status_code": "OK",
    }
    assert span.status.code == Status.STATUS_CODE_UNSET
    resource = attributes(request.resource_spans[0].resource)
    assert (resource["service.name"], resource["service.version"]) == ("relay", "1.2.3")


@pytest.mark.parametrize(
    ("code", "failed"), [("NOT_FOUND", False), ("RESOURCE_EXHAUSTED", False), ("INTERNAL", True), ("UNAVAILABLE", True)]
)
async def test_only_the_servers_own_faults_are_errors(receiver: Receiver, code: str, failed: bool) -> None:
    async with tracing(receiver.url) as tracer:
        tracer.start(METHOD, None).end(code)
    [span] = receiver.spans
    assert (span.status.code == Status.STATUS_CODE_ERROR) is failed
    assert attributes(span)["rpc.response.status_code"] == code


async def test_an_outgoing_call_is_a_child_and_its_traceparent_goes_on(receiver: Receiver) -> None:
    async with tracing(receiver.url) as tracer:
        call = tracer.start(METHOD, None)
        with tracer.client("POST", call.traceparent, {"server.address": "receiver.example"}) as webhook:
            sent = webhook.traceparent
        call.end("OK")
    child, parent = receiver.spans
    assert (child.name, child.kind) == ("POST", Span.SPAN_KIND_CLIENT)
    assert child.trace_id == parent.trace_id == bytes.fromhex(call.trace_id)
    assert child.parent_span_id == parent.span_id
    assert sent == f"00-{call.trace_id}-{child.span_id.hex()}-{call.traceparent[-2:]}"
    assert attributes(child) == {"server.address": "receiver.example"}


async def test_a_failed_outgoing_call_tells_the_type_of_its_error_alone(receiver: Receiver) -> None:
    async with tracing(receiver.url) as tracer:
        with (
            pytest.raises(ConnectionError),
            tracer.client("POST", SAMPLED, {}),
        ):
            raise ConnectionError("whsec_secret")
    [span] = receiver.spans
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert attributes(span) == {"error.type": "ConnectionError"}
    assert b"whsec_secret" not in span.SerializeToString()


async def test_an_unsampled_parent_makes_no_span_and_goes_on_as_it_came(receiver: Receiver) -> None:
    async with tracing(receiver.url) as tracer:
        trace = tracer.start(METHOD, UNSAMPLED)
        with tracer.client("POST", trace.traceparent, {}) as webhook:
            pass
        trace.end("OK")
        assert (trace.trace_id, trace.traceparent, trace.span) == (TRACE_ID, UNSAMPLED, None)
        assert webhook == trace
    assert receiver.spans == []


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "garbage",
        TRACE_ID,
        SAMPLED.upper(),
        f" {SAMPLED}",
        f"{SAMPLED}\n",
        f"{SAMPLED}-extra",
        f"ff{SAMPLED[2:]}",
        f"00-{'0' * 32}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID[1:]}-{PARENT_ID}-01",
        f"01{SAMPLED[2:]}extra",
    ],
)
async def test_a_malformed_traceparent_begins_a_new_trace(receiver: Receiver, malformed: str) -> None:
    async with tracing(receiver.url) as tracer:
        traces = [tracer.start(METHOD, malformed), Tracer().start(METHOD, malformed)]
        traces[0].end("OK")
    [span] = receiver.spans
    assert span.trace_id.hex() == traces[0].trace_id
    assert span.parent_span_id == b""
    for trace in traces:
        assert len(trace.trace_id) == 32
        assert int(trace.trace_id, 16) not in (0, int(TRACE_ID, 16))


def test_a_later_version_of_the_header_is_understood_and_answered_in_ours() -> None:
    trace = Tracer().start(METHOD, f"01-{TRACE_ID}-{PARENT_ID}-ff-more")
    assert trace.traceparent == f"00-{TRACE_ID}-{PARENT_ID}-03"


async def test_the_ratio_applies_to_new_traces_and_the_flag_says_so(receiver: Receiver) -> None:
    async with tracing(receiver.url, sample_ratio=0.5) as tracer:
        traces = [tracer.start(METHOD, None) for _ in range(400)]
        for trace in traces:
            trace.end("OK")
            assert bool(int(trace.traceparent[-2:], 16) & 1) is (trace.span is not None)
        tracer.start(METHOD, SAMPLED).end("OK")
    assert len({trace.trace_id for trace in traces}) == 400
    sent = {span.trace_id.hex() for span in receiver.spans}
    assert sent == {trace.trace_id for trace in traces if trace.span} | {TRACE_ID}
    assert 100 < len(sent) < 300  # ten standard deviations


async def test_an_endpoint_with_a_path_is_used_as_it_is(receiver: Receiver) -> None:
    async with tracing(f"{receiver.url}/otlp/spans") as tracer:
        tracer.start(METHOD, None).end("OK")
    assert [path for path, _ in receiver.requests] == ["/otlp/spans"]


async def test_without_tracing_there_is_no_thread_and_still_a_trace_id() -> None:
    threads = set(threading.enumerate())
    tracer = Tracer()
    new, known = tracer.start(METHOD, None), tracer.start(METHOD, SAMPLED)
    new.end("OK")
    with tracer.client("POST", new.traceparent, {}) as webhook:
        assert webhook == new
    assert new.traceparent.startswith(f"00-{new.trace_id}-")
    assert new.traceparent.endswith("-00")
    assert (known.trace_id, known.traceparent, known.span) == (TRACE_ID, SAMPLED, None)
    assert set(threading.enumerate()) == threads
    await tracer.shutdown()


async def test_calls_go_on_while_the_collector_is_down(unused_tcp_port: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with asyncio.timeout(15), tracing(f"http://127.0.0.1:{unused_tcp_port}") as tracer:
            for _ in range(200):
                tracer.start(METHOD, None).end("OK")
    assert len(caplog.records) < 10
    assert {record.name.partition(".")[0] for record in caplog.records} == {"opentelemetry"}


async def test_shutdown_does_not_wait_for_a_collector_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "FLUSH_SECONDS", 0.2)
    connected, closing = asyncio.Event(), asyncio.Event()

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await closing.wait()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with tracing(f"http://{host}:{port}") as tracer:
            tracer.start(METHOD, None).end("OK")
        assert any(thread.name == "flush spans" for thread in threading.enumerate())  # it gave up before the exporter
        await connected.wait()
        closing.set()


async def test_an_execution_is_one_trace_from_its_caller_to_its_receiver(relay: Relay, receiver: Receiver) -> None:
    settings = relay.settings.model_copy(update={"otel_enabled": True, "otel_endpoint": receiver.url})
    async with receiving() as webhooks:
        async with serving(settings, relay.url) as app:
            server = replace(relay, app=app)
            async with server.connect(relay.tenant.admin) as client:
                connection = await client.connections.create_webhook("traced", webhooks.url)
                preview = await client.actions.preview("webhook.send", {"payload": {}}, connection_id=connection.id)
            async with wired(server) as wire:
                request = actions_pb2.ExecuteRequest(preview_id=preview.id)
                assert (await wire.call("ActionsService.Execute", request, traceparent=SAMPLED)).code == "OK"
        [(headers, _)] = webhooks.requests
    spans = {span.name: span for span in receiver.spans if span.trace_id.hex() == TRACE_ID}
    execute, attempt = spans[METHOD], spans["delivery.attempt"]
    assert execute.parent_span_id.hex() == PARENT_ID
    assert attempt.parent_span_id == execute.span_id
    assert headers["traceparent"].split("-")[1:3] == [TRACE_ID, attempt.span_id.hex()]
    assert attributes(attempt) == {"relay.provider": "independent", "relay.action": "webhook.send"}
