"""What Relay tells of itself: Prometheus metrics and OpenTelemetry traces.

No label holds a workspace, key, URL or error text, so the number of series follows from the API alone: under 2,000.
"""

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

# Seconds. Prometheus's own edges, and 1.2: the objective for actions (p95 under 1.2 s) is read from that edge.
RPC_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 1.2, 2.5, 5, 10)
ACTION_BUCKETS = (*RPC_BUCKETS, 30)
INTEGRATION_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300)
GROUP_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

EXPORT_SECONDS = 3.0  # for one batch of spans, retries included
FLUSH_SECONDS = 5.0  # for the last spans at shutdown


class RpcMetrics:
    """The series of one RPC method, bound once at start: looking children up by label costs more than counting."""

    __slots__ = ("_by_code", "_duration", "_labels", "_rpcs")

    def __init__(self, rpcs: Counter, duration: Histogram, service: str, method: str) -> None:
        self._rpcs = rpcs
        self._labels = (service, method)
        self._duration = duration.labels(service, method)
        self._by_code: dict[str, Counter] = {}

    def observe(self, code: str, seconds: float) -> None:
        """Counts one RPC that ended. code: the name of a gRPC status, such as "OK"."""
        counter = self._by_code.get(code)
        if counter is None:
            counter = self._by_code[code] = self._rpcs.labels(*self._labels, code)
        counter.inc()
        self._duration.observe(seconds)


class Metrics:
    """The metrics of one process, in a registry of their own; each worker process is a target of its own."""

    def __init__(self) -> None:
        # For the whole process; else each counter and histogram has one more series, which nobody reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(name, documentation, labels, registry=registry)

        def gauge(name: str, documentation: str) -> Gauge:
            return Gauge(name, documentation, registry=registry)

        def histogram(name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, documentation, labels, buckets=buckets, registry=registry)

        self._rpcs = counter("relay_rpc_total", "RPCs that ended, by gRPC status.", "service", "method", "code")
        self._rpc_duration = histogram(
            "relay_rpc_duration_seconds", "Time an RPC took.", RPC_BUCKETS, "service", "method"
        )
        self.action_duration = histogram(
            "relay_action_duration_seconds",
            "Time from the commit of an execution to the end of its first attempt.",
            ACTION_BUCKETS,
            "provider",
            "action",
        )
        self.attempts = counter("relay_attempts_total", "Attempts that ended.", "provider", "outcome")
        self.executions = counter("relay_executions_total", "Executions that ended.", "provider", "action", "state")
        self.executions_in_flight = gauge("relay_executions_in_flight", "Executions that this process works on.")
        self.oldest_due = gauge(
            "relay_oldest_due_seconds", "How long the execution that waits longest past its time has waited."
        )
        self.breaker_transitions = counter(
            "relay_breaker_transitions_total", "Times that a connection's breaker opened or closed.", "to"
        )
        self.connections_disabled = counter(
            "relay_connections_disabled_total", "Connections that were disabled for what their receiver did.", "reason"
        )
        self.rate_limited = counter("relay_rate_limited_total", "Calls refused by a rate limit.", "budget", "holder")
        self.rate_limit_shadowed = counter(
            "relay_rate_limit_shadowed_total",
            "Calls that a rate limit would have refused if it were not in shadow mode.",
            "budget",
            "holder",
        )
        self.rate_limiter_degraded = gauge(
            "relay_rate_limiter_degraded", "1 while limits are counted in this process, because Redis does not answer."
        )
        self.instances = gauge("relay_instances", "Instances of Relay that live on this database, as this one knows.")
        self.auth_failures = counter("relay_auth_failures_total", "Calls whose credential was refused.", "reason")
        self.oidc_readings = counter("relay_oidc_readings_total", "Times that an issuer's keys were read.", "outcome")
        self.key_hashes = counter("relay_key_hashes_total", "Argon2 hashes computed.")
        self.changes_listening = gauge(
            "relay_changes_listening",
            "1 while changes of keys, roles and limits are heard of at once, 0 while they take effect within seconds.",
        )
        self.audit_events = counter("relay_audit_events_total", "Audit events, by what became of them.", "outcome")
        self.audit_integration = histogram(
            "relay_audit_integration_seconds", "Time from an event to its place in the log.", INTEGRATION_BUCKETS
        )
        self.audit_oldest_pending = gauge(
            "relay_audit_oldest_pending_seconds", "How long the event that waits longest for its place has waited."
        )
        self.audit_damaged_logs = gauge(
            "relay_audit_damaged_logs", "Audit logs that this process can't extend, because they are damaged."
        )
        self.audit_unpublished = gauge(
            "relay_audit_unpublished_seconds",
            "Time since every log's newest checkpoint was published outside the database.",
        )
        self.audit_publish_failures = counter(
            "relay_audit_publish_failures_total", "Checkpoints that could not be published; they are tried again."
        )
        self.audit_contradicted_logs = gauge(
            "relay_audit_contradicted_logs",
            "Audit logs that don't continue what was published of them: tampering, or a restored backup.",
        )
        self.audit_default_events = gauge(
            "relay_audit_default_events", "Events in the DEFAULT partition: of months that have none of their own."
        )
        self.audit_partition_failures = counter(
            "relay_audit_partition_failures_total", "Times that the partitions of the coming months could not be made."
        )
        self.group_commit_size = histogram(
            "relay_group_commit_size", "Writes in one group commit.", GROUP_BUCKETS, "queue"
        )

    def rpc(self, service: str, method: str) -> RpcMetrics:
        return RpcMetrics(self._rpcs, self._rpc_duration, service, method)


# https://www.w3.org/TR/trace-context/#traceparent-header: version 00 ends after the flags, later ones may go on.
_TRACEPARENT = re.compile(
    r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
_KNOWN_FLAGS = TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID
_ids = RandomIdGenerator()

# The statuses that are the server's fault: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
_SERVER_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}


@dataclass(frozen=True, slots=True)
class Trace:
    """Where some work stands in its trace.

    trace_id: 32 hex digits. traceparent: the W3C header for what this work sends on. span: None unless it is sampled.
    """

    trace_id: str
    traceparent: str
    span: Span | None = None

    def end(self, code: str) -> None:
        """Ends the span of an RPC. code: the name of its gRPC status."""
        if self.span is not None:
            self.span.set_attribute("rpc.response.status_code", code)
            if code in _SERVER_FAULTS:
                _fail(self.span, code)
            self.span.end()


class Tracer:
    """Makes spans for sampled work alone, and a trace id for all of it.

    Parents go by their traceparent, never through OpenTelemetry's ambient context: a Call and a Job carry it as text.
    provider: None where tracing is off; then no thread runs, and an incoming traceparent goes out as it came.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("relay") if provider else None

    def start(self, method: str, traceparent: str | None) -> Trace:
        """Begins the trace of an RPC; `Trace.end` ends it.

        method: its full name, "relay.v1.ActionsService/Execute". traceparent: what the caller sent; where it sent none
        or a malformed one, a new trace begins.
        """
        return self._start(method, traceparent, SpanKind.SERVER, {"rpc.system.name": "grpc", "rpc.method": method})

    @contextmanager
    def client(self, name: str, traceparent: str | None, attributes: Mapping[str, str | int]) -> Iterator[Trace]:
        """A span around one outgoing call, such as a webhook or a statement. An exception marks it as failed.

        attributes: by OpenTelemetry's semantic conventions, and nothing secret. Of an exception only the type is kept.
        """
        trace = self._start(name, traceparent, SpanKind.CLIENT, attributes)
        if trace.span is None:
            yield trace
            return
        try:
            yield trace
        except BaseException as error:
            _fail(trace.span, type(error).__qualname__)
            raise
        finally:
            trace.span.end()

    def _start(self, name: str, header: str | None, kind: SpanKind, attributes: Mapping[str, str | int]) -> Trace:
        parent = _parse(header, is_remote=kind is SpanKind.SERVER) if header else None
        if self._tracer is None:
            return _trace(parent or SpanContext(_ids.generate_trace_id(), _ids.generate_span_id(), is_remote=False))
        if parent and not parent.trace_flags.sampled:
            return _trace(parent)
        context = set_span_in_context(NonRecordingSpan(parent), Context()) if parent else Context()
        span = self._tracer.start_span(name, context, kind, attributes)  # an unsampled root costs 6 us and is no span
        return _trace(span.get_span_context(), span if span.is_recording() else None)

    async def shutdown(self) -> None:
        """Sends the last spans, for FLUSH_SECONDS at most; what is not sent by then is lost."""
        if self._provider is not None:
            # A daemon: a collector that does not answer must not hold up the end of the process either.
            flush = Thread(target=self._provider.shutdown, name="flush spans", daemon=True)
            flush.start()
            await asyncio.to_thread(flush.join, FLUSH_SECONDS)


def _parse(header: str, *, is_remote: bool) -> SpanContext | None:
    """A W3C traceparent, or None where it is malformed."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None:
        return None
    flags = TraceFlags(int(match[3], 16) & _KNOWN_FLAGS)
    return SpanContext(int(match[1], 16), int(match[2], 16), is_remote, flags)


def _trace(context: SpanContext, span: Span | None = None) -> Trace:
    trace_id = format_trace_id(context.trace_id)
    return Trace(trace_id, f"00-{trace_id}-{format_span_id(context.span_id)}-{context.trace_flags:02x}", span)


def _fail(span: Span, error_type: str) -> None:
    span.set_attribute("error.type", error_type)
    span.set_status(StatusCode.ERROR)


def tracer_provider(endpoint: str, *, sample_ratio: float, service_version: str) -> TracerProvider:
    """Starts the export of spans to an OTLP/HTTP receiver.

    endpoint: http(s)://HOST:PORT, to which /v1/traces is added, or a URL with a path, which is used as it is.
    sample_ratio: the share of new traces that is kept, 0 to 1; a trace that a caller began goes by the caller's flag.
    """
    url = urlsplit(endpoint)
    if url.path in ("", "/"):
        url = url._replace(path="/v1/traces")
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
        resource=Resource.create({"service.name": "relay", "service.version": service_version}),
        shutdown_on_exit=False,  # Tracer.shutdown does it, in bounded time
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url.geturl(), timeout=EXPORT_SECONDS)))
    return provider
