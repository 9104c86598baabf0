"""What the outside sees of a call: its span, its metrics, and a line in the log when it was slow."""

import logging
import time
from typing import Any

from relay_grpc.call import Call, Method
from relay_grpc.interceptors.base import Handler, Layer
from relay_grpc.telemetry import Metrics, Tracer

log = logging.getLogger(__name__)
SLOW = 5.0  # seconds; executions wait for their receivers, which may be slow, and streams for what happens


def tracing(tracer: Tracer, metrics: Metrics) -> Layer:
    def layer(method: Method, handler: Handler) -> Handler:
        observe = metrics.rpc(method.service, method.rpc).observe
        full_name = method.path[1:]

        async def traced(call: Call, request: Any) -> Any:
            trace = tracer.start(full_name, call.metadata.get("traceparent"))
            call.trace_id, call.traceparent = trace.trace_id, trace.traceparent
            try:
                return await handler(call, request)
            finally:
                seconds = time.monotonic() - call.started
                trace.end(call.code)
                observe(call.code, seconds)
                if seconds > SLOW and not (method.executions or method.streams):
                    log.warning("%s %s took %.1f s and ended %s", call.request_id, method.name, seconds, call.code)

        return traced

    return layer
